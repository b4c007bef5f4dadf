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
    state: Any  # of the feed, after this batch
    skipped: list[Skipped]


class SideStream:
    """A feed whose next batch is copied, from pinned memory and on a stream of its own, while one is in use."""

    def __init__(self, feed: Feed, device: torch.device) -> None:
        self._feed, self._device, self._stream = feed, device, torch.cuda.Stream(device)
        self._state: Any = None
        self._used: Any = None  # the state before the batch that is being fetched
        self.skipped: list[Skipped] = []

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        held: _Sent | None = None
        self._used = self._state
        for batch, last in self._feed.epoch(epoch, start):
            sent = self._send(batch, last)
            if held is not None:
                yield self._hand_out(held)
                self._used = self._state
            held = sent
        if held is not None:
            yield self._hand_out(held)

    def _send(self, batch: Any, last: bool) -> _Sent:
        with torch.cuda.stream(self._stream):
            moved = map_tree(self._copy, batch)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        skipped = list(self._feed.skipped)
        self._feed.skipped.clear()
        return _Sent(moved, last, arrived, self._feed.state(), skipped)

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
        self._state = sent.state
        return sent.batch, sent.last

    def state(self) -> Any:
        return self._state

    def restore(self, state: Any, *, force: bool = False) -> None:
        self._feed.restore(state, force=force)

    def cut(self) -> None:
        self._feed.cut()
        self._state = self._used

    def close(self) -> None:
        self._feed.close()
