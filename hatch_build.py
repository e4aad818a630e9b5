"""Hatchling's hook that compiles the CPU kernels into the wheel, or in place for an editable install.

Without a compiler the package is installed all the same, and `moerunner env` says why the backend is absent.
"""

from __future__ import annotations

import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("moerunner", "kernels", "cpu")


class Kernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        source = Path(self.root, "src", KERNELS)
        kernels = runpy.run_path(str(source / "build.py"))
        editable = version == "editable"
        folder = source if editable else Path(tempfile.mkdtemp(prefix="moerunner"))
        missing = kernels["build"](folder)
        for path, reason in missing.items():
            self.app.display_warning(f"cpu kernels, path {path}: {reason}")
        if editable:
            return
        built = [folder / kernels["RECORD"], *folder.glob("*.so")]
        build_data["force_include"] |= {str(file): str(KERNELS / file.name) for file in built}
        if len(built) > 1:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
