"""``insitu train get-data``: text to train on."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from insitu.cli.common import plainly


@plainly
def get_data(
    name: Literal["andrea16"],
    /,
    *,
    out: Path,
    sources: Annotated[str | None, Parameter(help="A part of the sources, their names joined by commas.")] = None,
) -> None:
    """Fetch a set of text sources by pinned packages, clean it, and write a manifest.

    Args:
        name: andrea16: sixteen real sources in the roles of those that ANDREA was trained on, 80 MB of text.
        out: Directory for the cleaned files; give it to a training run as data.directory or in INSITU_DATA.
    """
    from insitu.data.andrea16 import get

    assert name == "andrea16"
    get(out, None if sources is None else sources.split(","), lambda line: print(line, file=sys.stdout, flush=True))
