"""The command line: the verbs of daily use. Every verb imports what it needs itself, so ``insitu --help`` is quick."""

from cyclopts import App

from insitu import __version__
from insitu.cli import canary, intake, memory, serving, teaching, training, versions

app = App(name="insitu", version=__version__, help="Train the model you are serving, in place.")
for verb in (
    serving.demo,
    serving.serve,
    teaching.chat,
    teaching.learn,
    intake.feedback,
    serving.status,
    intake.events,
    versions.versions,
    versions.rollback,
    versions.pin,
    versions.unpin,
    versions.export,
    canary.canary,
    memory.memory,
    serving.doctor,
):
    app.command(verb)
app.command(training.train)


def main() -> None:
    """Entry point of the ``insitu`` command."""
    app()
