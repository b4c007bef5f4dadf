"""Batches on their way to a CUDA device while the step before them is computed."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from stoker.data.batch import map_tree
from stoker.data.feeds import Feed
from stoker.data.reader import Skipped


class _Sent(NamedTuple):
    batch: Any
    last: bool
    arrived: torch.cuda.Event
    following: tuple[int, int]  # epoch and batch,
    state: Any  # and the feed's before that one
    skipped: list[Skipped]


class SideStream:
    """A feed whose next batch is copied, from pinned memory and on a stream of its own, while one is in use."""

    def __init__(self, feed: Feed, device: torch.device) -> None:
        self._feed, self._device, self._stream = feed, device, torch.cuda.Stream(device)
        self._state: Any = None
        self._used: Any = None  # the state before the batch that was handed out last,
        self._at: tuple[int, int] | None = None  # and the epoch and batch that come after it
        self.skipped: list[Skipped] = []

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        held: _Sent | None = None
        for number, (batch, last) in enumerate(self._feed.epoch(epoch, start), start + 1):
            sent = self._send(batch, last, (epoch + 1, 0) if last else (epoch, number))
            if held is not None:
                yield self._hand_out(held)
            held = sent
        if held is not None:
            yield self._hand_out(held)

    def _send(self, batch: Any, last: bool, following: tuple[int, int]) -> _Sent:
        with torch.cuda.stream(self._stream):
            moved = map_tree(self._copy, batch)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        skipped = list(self._feed.skipped)
        self._feed.skipped.clear()
        return _Sent(moved, last, arrived, following, self._feed.state(*following), skipped)

    def _copy(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.device == self._device:
            return leaf
        # Pinned here, not by the workers: torch's allocator of pinned memory knows when the copy is through.
        pinned = leaf.pin_memory() if leaf.device.type == "cpu" and leaf.layout is torch.strided else leaf
        return pinned.to(self._device, non_blocking=True)

    def _hand_out(self, sent: _Sent) -> tuple[Any, bool]:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(sent.arrived)

        def use(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and leaf.is_cuda and leaf.layout is torch.strided:
                leaf.record_stream(current)  # so that its memory is not given to the next copy while it is read
            return leaf

        map_tree(use, sent.batch)
        self.skipped += sent.skipped
        self._used, self._at = self._state, sent.following  # in this order: a signal may come in between
        self._state = sent.state
        return sent.batch, sent.last

    def state(self, epoch: int, batch: int) -> Any:
        if self._state is None and not batch:
            self._state = self._feed.state(epoch, batch)
        return self._state

    def restore(self, state: Any, *, force: bool = False) -> None:
        self._feed.restore(state, force=force)
        self._state = self._used = state

    def cut(self, epoch: int, batch: int) -> None:
        self._feed.cut(epoch, batch)
        if self._at != (epoch, batch):
            self._state = self._used

    def close(self) -> None:
        self._feed.close()
