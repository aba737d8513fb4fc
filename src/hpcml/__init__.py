"""Slurm jobs and notebooks on GPU clusters.

In a notebook or script: ``hpcml.begin(strategy=…)``. From a login node or laptop: ``hpcml.submit(fn, …)``,
``hpcml.map(fn, …)``. On the command line: ``hpcml --help``. Everything here is imported on first use, so that
``import hpcml`` costs nothing and never touches a framework.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["begin", "data", "map", "submit"]

if TYPE_CHECKING:
    from . import data
    from .launch.functions import map_functions as map
    from .launch.functions import submit
    from .starting import begin

_HOMES = {
    "begin": ("hpcml.starting", "begin"),
    "submit": ("hpcml.launch.functions", "submit"),
    "map": ("hpcml.launch.functions", "map_functions"),
}


def __getattr__(name: str) -> Any:
    if name == "data":
        return importlib.import_module("hpcml.data")
    if name not in _HOMES:
        raise AttributeError(f"module 'hpcml' has no attribute {name!r}; it offers {', '.join(__all__)}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
