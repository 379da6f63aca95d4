"""What the verbs share: where the server is, and how a mistake is told."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from insitu.live.config import default_state_dir

StateDir = Annotated[Path | None, Parameter(help="State directory of the server; ~/.local/state/insitu by default.")]


def plainly(verb: Callable[..., None]) -> Callable[..., None]:
    """Show what a user can mend as one line on stderr and exit with 1; anything else is our bug and keeps its traceback."""

    @wraps(verb)
    def run(*args: Any, **options: Any) -> None:
        from insitu.data.messages import DataError
        from insitu.live.client import ClientError
        from insitu.live.records import StateError

        try:
            verb(*args, **options)
        except (ClientError, DataError, StateError) as error:
            sys.exit(f"insitu: {error}")
        except KeyboardInterrupt:
            sys.exit(130)

    return run


def connect(state_dir: Path | None) -> Any:
    from insitu.live.client import Client

    return Client(state_dir or default_state_dir())
