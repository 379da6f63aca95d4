"""Undo images: copies of versions in full, so that going back to them takes no longer than a copy.

They are a cache: not synced, and checked whenever they are used. The files that must last are the differences.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from insitu.live.checkpoint import save_tensors

_NAME = "undo-v{}.safetensors"


class Images:
    """Those of one directory of versions, each by the version whose bytes it has."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, version: int) -> Path:
        return self.directory / _NAME.format(version)

    def save(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """It appears whole or not at all. Raises OSError when there is no room."""
        image = self.path(version)
        partial = image.with_suffix(".partial")
        try:
            save_tensors(dict(tensors), partial, durable=False)
            partial.replace(image)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def keep_only(self, versions: Collection[int | None]) -> None:
        kept = {self.path(version) for version in versions if version is not None}
        for image in self.directory.glob(_NAME.format("*")):
            if image not in kept:
                image.unlink(missing_ok=True)
