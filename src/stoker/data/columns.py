"""Tensors in memory as a data set."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from stoker.errors import UserError


class Columns:
    """Tensors in memory with one row per sample: a batch is one gather, not a thousand ``__getitem__`` calls."""

    def __init__(self, tree: Any, tensors: list[torch.Tensor], rows: torch.Tensor | None = None) -> None:
        self.tree, self.tensors, self.rows = tree, tensors, rows
        self.num_rows = len(rows) if rows is not None else tensors[0].shape[0]
        self._devices = {tensor.device for tensor in tensors} - {torch.device("cpu")}

    def take(self, indices: torch.Tensor) -> Any:
        """Gather rows, as the tree the dataset was given in."""
        if self.rows is not None:
            indices = self.rows.index_select(0, indices)
        if self._devices:
            gathered = [tensor.index_select(0, indices.to(tensor.device)) for tensor in self.tensors]
        else:
            gathered = [tensor.index_select(0, indices) for tensor in self.tensors]
        if self.tree is tuple:
            return gathered  # a list, as default_collate makes of tuples
        if self.tree is None:
            return gathered[0]
        return dict(zip(self.tree, gathered, strict=True))

    def last(self) -> torch.Tensor | None:
        """The target, where there are several columns."""
        if len(self.tensors) < 2:
            return None
        return self.tensors[-1] if self.rows is None else self.tensors[-1][self.rows]

    def at(self, rows: list[int]) -> "Columns":
        """View of a subset of the rows."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return Columns(self.tree, self.tensors, index if self.rows is None else self.rows[index])


def columns_of(dataset: Any) -> Columns | None:
    """Columns of a TensorDataset, of a Subset of one, or of plain tensors and arrays; None for anything else."""
    if callable(getattr(dataset, "columns", None)):  # stoker's own: None where it is not that simple
        tensors = dataset.columns()
        return Columns(tuple, list(tensors)) if isinstance(tensors, tuple) else None
    if type(dataset) is TensorDataset:
        return Columns(tuple, list(dataset.tensors))
    if type(dataset) is Subset:
        base = columns_of(dataset.dataset)
        return base.at(list(dataset.indices)) if base is not None else None
    if isinstance(dataset, Dataset):
        return None
    tree: Any
    if isinstance(dataset, torch.Tensor | np.ndarray):
        tree, values = None, [dataset]
    elif isinstance(dataset, tuple) and dataset:
        tree, values = tuple, list(dataset)
    elif isinstance(dataset, Mapping) and dataset:
        tree, values = list(dataset), list(dataset.values())
    else:
        return None
    if not all((isinstance(value, torch.Tensor) and value.ndim) or _is_numbers(value) for value in values):
        return None
    tensors = [torch.from_numpy(_native(v)) if isinstance(v, np.ndarray) else v for v in values]
    lengths = {tensor.shape[0] for tensor in tensors}
    if len(lengths) > 1:
        raise UserError(
            f"the columns of a Loader have different lengths: {sorted(lengths)}",
            remedy="give tensors whose first dimension is the sample",
        )
    return Columns(tree, tensors)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind in "biufc"


def _native(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array as torch takes it: copied where it is read-only, reversed, or in the other byte order."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return native if native.flags.writeable and min(native.strides, default=0) >= 0 else native.copy()


class Rows:
    """Columns as a data set of samples."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return self._columns.num_rows

    def __getitem__(self, index: int) -> Any:
        row = self._columns.take(torch.tensor([index]))
        if isinstance(row, list):
            return tuple(part[0] for part in row)
        return {name: part[0] for name, part in row.items()} if isinstance(row, dict) else row[0]
