"""Saving beside the training: what it costs in memory, layouts that change, what retention keeps where saves fail."""

import errno
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import stoker
from stoker.checkpoint.saver import Saver, Staging
from stoker.checkpoint.store import MODEL, STATE, Snapshot, Store, read, snapshot
from stoker.errors import UserError


def taken(step: int, best: list[int] | None = None, **tensors: torch.Tensor) -> Snapshot:
    return snapshot(
        step=step,
        epoch=0,
        loss=None,
        metrics={},
        model=tensors or {"w": torch.full((10,), float(step))},
        ema=None,
        state={"progress": {"step": step}},
        best=best or [],
    )


@pytest.fixture
def events(tmp_path: Path) -> Any:
    descriptor = os.open(tmp_path / "events", os.O_CREAT | os.O_RDWR)
    yield descriptor
    os.close(descriptor)


MEMORY = """
import os, sys, threading, time
from pathlib import Path
import torch
from stoker.checkpoint.saver import Saver
from stoker.checkpoint.store import Store
from tests.checkpoint.test_saver import taken

def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

peak, folder, kind = [0], Path(sys.argv[1]), sys.argv[2]
def watch():
    while True:
        peak[0] = max(peak[0], rss())
        time.sleep(0.001)

whole = 300 if os.environ.get("STOKER_NIGHTLY") else 120
sizes = {"plain": [whole] * 20, "grows": [whole, whole + 5, whole + 10, whole + 15], "first": [300]}[kind]
tensor = torch.ones(sizes[-1] << 18)
events = os.open(folder / "events", os.O_CREAT | os.O_RDWR)
saver = Saver(Store(folder / "checkpoints", keep=1))
saver.store.write(taken(1, w=torch.ones(4)))
base = rss()
threading.Thread(target=watch, daemon=True).start()
saver.reserve(sizes[0] << 20, pinned=False)  # and the first save comes at once
after = []
for i, size in enumerate(sizes):
    saver.save(taken(i + 2, w=tensor[: size << 18]), events)
    saver.settle()
    after.append(rss() - base)
print(peak[0] - base, after[0], after[-1], sizes[-1] << 20)
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["plain", "grows", "first"])
def test_memory(tmp_path: Path, kind: str) -> None:
    """A save takes one copy of the state, and no more: not at first, not later, not where the state has grown."""
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path, kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, first, last, size = map(int, done.stdout.split())
    assert peak <= 1.1 * size
    assert kind == "grows" or last - first <= 4 << 20


def test_layouts_that_change(tmp_path: Path, events: int) -> None:
    """Larger, smaller, other types, other shapes, none at all, a scalar, a view, tied: each is saved as it is."""
    whole = torch.randn(50, 40)
    layouts: list[dict[str, torch.Tensor]] = [
        {"a": whole},
        {"a": whole, "b": torch.randn(3000)},
        {"a": whole[:, 3]},
        {"b": torch.arange(7), "c": torch.tensor(True), "d": torch.zeros(0, 5)},
        {"a": whole.t()},
        {"a": whole, "tied": whole, "e": torch.randn(4).expand(6, 4)},
        {"h": torch.randn(5).bfloat16(), "i": torch.randn(5).half(), "j": torch.randn(3, dtype=torch.complex64)},
        {"a": whole},
    ]
    saver = Saver(Store(tmp_path / "checkpoints", keep=99))
    expected = []
    for step, tensors in enumerate(layouts, 1):
        expected.append({name: tensor.clone() for name, tensor in tensors.items()})
        saver.save(taken(step, **tensors), events)
        for tensor in {t.data_ptr(): t for t in tensors.values()}.values():
            if tensor.numel() and tensor._base is None:
                tensor.zero_()
        whole.normal_()
    saver.settle(last=True)
    saver.close()
    for path, then in zip(saver.store.all(), expected, strict=True):
        found = read(path).model
        assert found.keys() == then.keys()
        assert all(torch.equal(found[k], then[k]) and found[k].dtype == then[k].dtype for k in then)


def test_one_write_at_a_time(tmp_path: Path, events: int, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    write = Store.write

    def slowly(self: Store, saved: Snapshot) -> Path:
        running.append(saved.step)
        assert len(running) == 1
        time.sleep(0.02)
        running.clear()
        assert threading.current_thread() is not threading.main_thread()
        return write(self, saved)

    monkeypatch.setattr(Store, "write", slowly)
    saver = Saver(Store(tmp_path / "checkpoints", keep=99))
    for step in range(1, 8):
        saver.save(taken(step), events)
    assert len(saver.store.all()) >= 6
    saver.settle(last=True)
    saver.close()
    assert [read(path).model["w"][0] for path in saver.store.all()] == [1, 2, 3, 4, 5, 6, 7]


# ------------------------------------------------------------------ failures


def failing(saver: Saver, number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let writes fail from now on; return what is said."""
    said: list[str] = []
    saver.warn = said.append

    def fail(self: Store, saved: Snapshot) -> Path:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Store, "write", fail)
    return said


def test_the_best_stays_while_a_better_one_has_no_room(
    tmp_path: Path, events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2, better than step 1, cannot be saved: step 1 stays the best there is, however many come after it."""
    saver = Saver(Store(tmp_path / "checkpoints", keep=1, keep_best=1))
    saver.save(taken(1, best=[1]), events)
    saver.settle()
    with monkeypatch.context() as context:
        said = failing(saver, errno.ENOSPC, context)
        saver.save(taken(2, best=[2]), events)
        saver.settle()
    assert len(said) == 1
    assert "step 2" in said[0]
    for step in (3, 4, 5):
        saver.save(taken(step, best=[2]), events)
    saver.settle(last=True)
    best = saver.store.best()
    assert best is not None
    assert read(best).step == 1
    assert [read(path).step for path in saver.store.all()] == [1, 5]
    saver.save(taken(6, best=[6, 2]), events)
    saver.settle(last=True)
    assert [read(path).step for path in saver.store.all()] == [6]
    saver.close()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("policy", ["continue", "wait", "stop"])
def test_what_is_not_a_full_disk_ends_the_run(
    tmp_path: Path, events: int, monkeypatch: pytest.MonkeyPatch, number: int, policy: str
) -> None:
    saver = Saver(Store(tmp_path / "checkpoints"), policy)
    saver.save(taken(1), events)
    saver.settle()
    failing(saver, number, monkeypatch)
    saver.save(taken(2), events)
    with pytest.raises(UserError, match=r"(?s)step-00000002.*goes on from step-00000001"):
        saver.settle()
    saver.close()


def test_the_last_save_has_to_be_there(tmp_path: Path, events: int, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(Store(tmp_path / "checkpoints"))
    saver.save(taken(1), events)
    saver.settle()
    failing(saver, errno.EDQUOT, monkeypatch)
    saver.save(taken(2), events)
    saver.settle()  # nothing is said of it but a warning
    with pytest.raises(UserError, match=r"(?s)quota.*make room.*same command"):
        saver.settle(last=True)
    saver.close()


def test_staging_holds_one_copy() -> None:
    staging = Staging()
    addresses = {staging.stage(of_state(torch.arange(n))).files[STATE]["a"].data_ptr() for n in (10, 10, 5)}
    assert len(addresses) == 1


def of_state(tensor: torch.Tensor, weight: float = 1.0, **more: Any) -> Snapshot:
    """A snapshot of one weight and one tensor of state."""
    return Snapshot(1, 0, None, {}, {}, {MODEL: {"w": torch.tensor([weight, 1.0])}, STATE: {"a": tensor}}, **more)


def test_what_an_optimizer_keeps_is_copied_later() -> None:
    tensor = torch.arange(1000)
    staged = Staging().begin(of_state(tensor, steady=frozenset({"a"})))
    assert not torch.equal(staged.snapshot.files[STATE]["a"], tensor)
    assert staged.finish() is None
    assert torch.equal(staged.snapshot.files[STATE]["a"], torch.arange(1000))
    staged = Staging().begin(of_state(tensor.view(10, 100).t(), steady=frozenset({"a"})))  # copied at once
    tensor += 1
    assert torch.equal(staged.snapshot.files[STATE]["a"], torch.arange(1000).view(10, 100).t())


def test_what_changes_before_it_is_copied_is_refused() -> None:
    tensor = torch.arange(1000)
    staged = Staging().begin(of_state(tensor, steady=frozenset({"a"})))
    tensor += 1
    with pytest.raises(UserError, match="changed outside of its step"):
        staged.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("weight", "found"), [(math.nan, "w"), (math.inf, "w"), (-math.inf, "w"), (3.0, None)])
def test_weights_that_are_not_finite_are_named(dtype: torch.dtype, weight: float, found: str | None) -> None:
    saved = of_state(torch.arange(3), weight, finite=frozenset({"w"}))
    saved.files[MODEL]["w"] = saved.files[MODEL]["w"].to(dtype)  # type: ignore[index]
    assert Staging().begin(saved).finish() == found


def test_a_sum_that_overflows_is_no_fault() -> None:
    saved = of_state(torch.arange(3), torch.finfo(torch.float32).max, finite=frozenset({"w"}))
    saved.files[MODEL]["w"].fill_(torch.finfo(torch.float32).max)
    assert Staging().begin(saved).finish() is None


class Own(torch.optim.AdamW):
    """An optimizer of the user's, which may change its state whenever it likes."""


@pytest.mark.parametrize(("optimizer", "later"), [(torch.optim.AdamW, True), (Own, False), (torch.optim.LBFGS, False)])
def test_whose_state_is_copied_later(optimizer: Any, later: bool, tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    x = torch.randn(8, 3)
    made = stoker.Recipe(
        model=lambda: torch.nn.Linear(3, 1),
        loss=torch.nn.MSELoss(),
        optimizer=lambda params: optimizer(params, lr=0.01),
        train=stoker.Loader((x, x[:, :1]), 4),
    )
    begin = Staging.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "begin", lambda self, saved: (seen.append(saved), begin(self, saved))[1])
        stoker.fit(made, steps=2, out=tmp_path / "out", quiet=True)
    assert [bool(saved.steady) for saved in seen] == [later]
