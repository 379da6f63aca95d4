"""What the tests of where models come from put in place of a model and of the person who is asked."""

from pathlib import Path


def write_model(directory: Path) -> Path:
    import numpy as np
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    save_file({"weight": np.zeros(4)}, directory / "model.safetensors")
    return directory


def never(question: str) -> bool:
    raise AssertionError(question)
