"""Data: ready-made data sets, splits, collate functions and stores. See `docs/data.md`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stoker.data.collating import masked, pad, ragged
    from stoker.data.folders import images
    from stoker.data.packing import pack
    from stoker.data.splitting import folds, split
    from stoker.data.tables import table
    from stoker.data.texts import Vocabulary

_HOME = {
    "Vocabulary": "texts",
    "folds": "splitting",
    "images": "folders",
    "masked": "collating",
    "pack": "packing",
    "pad": "collating",
    "ragged": "collating",
    "split": "splitting",
    "table": "tables",
}

__all__ = ["Vocabulary", "folds", "images", "masked", "pack", "pad", "ragged", "split", "table"]


def __getattr__(name: str) -> Any:
    """Import a room's module when one of its names is used."""
    if name not in _HOME:
        raise AttributeError(f"module 'stoker.data' has no attribute {name!r}")
    value = getattr(import_module(f"stoker.data.{_HOME[name]}"), name)
    globals()[name] = value
    return value
