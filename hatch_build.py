"""Compiles the CPU kernels while the package is built, if there is a compiler; without one the package does without them."""

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    """For wheels, editable ones too. A wheel that holds the kernels is of this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        kernels = runpy.run_path(str(Path(self.root) / "src" / "insitu" / "optim" / "step" / "kernels.py"))
        if (reason := kernels["install"]()) is not None:
            self.app.display_warning(f"insitu is built without its CPU kernels: {reason}")
            return
        build_data["pure_python"], build_data["infer_tag"] = False, True
        for made in (kernels["INSTALLED"], kernels["RECORD"]):
            build_data["artifacts"].append(f"/{made.relative_to(self.root)}")
