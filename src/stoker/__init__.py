"""stoker: a training run is a pure function of its recipe, its arguments and its seed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stoker import data
    from stoker.data.loader import Loader
    from stoker.errors import UserError
    from stoker.plan import Plan
    from stoker.probes.summary import summary
    from stoker.recipe import EarlyStop, Objective, Recipe
    from stoker.schedules import constant, cosine, linear
    from stoker.start import Run, fit, resume
    from stoker.weights import load, load_weights

_HOME = {
    "EarlyStop": "recipe",
    "Loader": "data.loader",
    "Objective": "recipe",
    "Plan": "plan",
    "Recipe": "recipe",
    "Run": "start",
    "UserError": "errors",
    "constant": "schedules",
    "cosine": "schedules",
    "fit": "start",
    "linear": "schedules",
    "load": "weights",
    "load_weights": "weights",
    "resume": "start",
    "summary": "probes.summary",
}

__all__ = [
    "EarlyStop",
    "Loader",
    "Objective",
    "Plan",
    "Recipe",
    "Run",
    "UserError",
    "constant",
    "cosine",
    "data",
    "fit",
    "linear",
    "load",
    "load_weights",
    "resume",
    "summary",
]


def __getattr__(name: str) -> Any:
    """Import torch only when something is used, so that `stoker --help` answers at once."""
    if name == "data":
        return import_module("stoker.data")
    if name not in _HOME:
        raise AttributeError(f"module 'stoker' has no attribute {name!r}")
    value = getattr(import_module(f"stoker.{_HOME[name]}"), name)
    globals()[name] = value
    return value
