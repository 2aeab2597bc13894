"""Imports from a source checkout, where two of the package's folders lie beside it.

An installation maps them below ``parallax_core``. A checkout that comes first on the path, as the working
directory does on the workers of a Ray that was started there, has to do so itself.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_FOLDERS = {f"parallax_core.{name}": _ROOT / name for name in ("cuda_kernels", "distributed")}


class _Finder:
    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in _FOLDERS:
            return None
        folder = _FOLDERS[name]
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def map_folders() -> None:
    """Make the folders beside a checkout's package importable below it; nothing in an installation."""
    if (_ROOT / "setup.cfg").is_file() and all((f / "__init__.py").is_file() for f in _FOLDERS.values()):
        # Last, so that an installation's own finder goes first.
        sys.meta_path.append(_Finder)
