"""Class labels that no output of the model stands for: torch says "out of bounds", this says which sample."""

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from stoker.data.loader import Loader, open_feed, sample_ids
from stoker.data.reader import file_of
from stoker.errors import UserError
from stoker.recipe import unpack

if TYPE_CHECKING:
    from stoker.train import Session


@torch.no_grad()
def explain_labels(s: "Session") -> UserError | None:
    """Message that names the first sample whose label is out of range; None where that was not it.

    After a step failed, its batch is read again; after an evaluation, the val data from the beginning. On a GPU, whose
    context such a label ends, nothing can be looked at.
    """
    spec = next(iter((s.recipe.objectives or {}).values()))
    classifies = isinstance(spec.loss, nn.CrossEntropyLoss | nn.NLLLoss) or spec.loss in (F.cross_entropy, F.nll_loss)
    if not classifies or s.strategy.device.type != "cpu":
        return None
    ignored = getattr(spec.loss, "ignore_index", -100)
    split = "val" if s.between_steps else "train"
    with suppress(Exception):  # whatever fails here must not hide what failed before
        for batch, ids in _suspects(s, split):
            args, kwargs, target = unpack(s.strategy.place(batch))
            count = s.model(*args, **kwargs).shape[1]
            if target.is_floating_point():
                return None
            wrong = ((target < 0) | (target >= count)) & (target != ignored)
            if wrong.any():
                row = int(wrong.reshape(len(target), -1).any(1).nonzero()[0])
                label = int(target[row][wrong[row]].reshape(-1)[0])
                return _message(s, split, ids[row] if ids is not None else None, label, count)
    return None


def _suspects(s: "Session", split: str) -> Iterator[tuple[Any, list[int] | None]]:
    source, at = getattr(s.recipe, split), s.state.progress
    size = source.batch_size if isinstance(source, Loader) else None
    if split == "train":
        feed = open_feed(source, s.seed, batch_size=size)
        yield next(feed.epoch(at.epoch, at.batch))[0], sample_ids(source, s.seed, at.epoch, at.batch)
        return
    feed = open_feed(source, s.seed, batch_size=size or 64, evaluation=True)
    first = 0
    for batch, _ in feed.epoch(0):
        count = len(unpack(batch)[2])
        yield batch, list(range(first, first + count))  # an evaluation reads in the data's own order
        first += count


def _message(s: "Session", split: str, index: int | None, label: int, count: int) -> UserError:
    source = getattr(s.recipe, split)
    file = file_of(source.dataset, index) if index is not None and isinstance(source, Loader) else None
    which = "a sample" if index is None else f"sample {index}" + (f" ({file})" if file else "")
    one_off = f"; labels that count from 1 need target - 1, or {count + 1} outputs" if label == count else ""
    return UserError(
        f"{which} of the {split} data has the label {label}; expected 0 to {count - 1}",
        why=f"the model has {count} outputs{one_off}",
        remedy="correct the label, leave it out of the loss with ignore_index=, or give the model more outputs",
    )
