"""Compiles the native engine while installing; all the rest is in pyproject.toml.

Without a compiler the installation succeeds: the engine is then built at first use, or torch's
is taken.
"""

import runpy
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

NATIVE = Path("attending", "engine", "native")


class BuildKernel(build_py):
    """Puts the libraries beside their source, in the wheel or, if editable, in the tree."""

    def run(self) -> None:
        """Copy the package, then compile."""
        super().run()
        compiler: dict[str, Any] = runpy.run_path(str(NATIVE / "compiler.py"))
        root = Path() if self.editable_mode else Path(self.build_lib)
        try:
            compiler["compile_all"]((root / NATIVE).absolute())
        except (compiler["NotCompiled"], OSError) as error:
            self.warn(f"the native engine was not built: {error}")


setup(cmdclass={"build_py": BuildKernel})
