"""Saving from a CUDA device: through pinned memory, the state at its step, while the next steps go on."""

import copy
from pathlib import Path

import pytest
import torch

from stoker.checkpoint.saver import Staging
from stoker.checkpoint.store import MODEL, STATE, Snapshot, Store, read
from stoker.start import prepare
from stoker.train import train
from tests.gpu.test_single import recipe

pytestmark = pytest.mark.gpu


def test_copies_are_pinned_and_complete() -> None:
    weights = {"w": torch.randn(1000, 100, device="cuda"), "b": torch.randn(7, device="cuda", dtype=torch.bfloat16)}
    state = {"m": torch.randn(100_000, device="cuda"), "step": torch.tensor(3.0)}
    saved = Snapshot(
        1, 0, None, {}, {}, {MODEL: weights, STATE: state}, steady=frozenset(state), finite=frozenset("wb")
    )
    expected = {name: tensor.cpu().clone() for name, tensor in {**weights, **state}.items()}
    staged = Staging().begin(saved)
    for tensor in (*weights.values(), *state.values()):
        tensor.zero_()
    assert staged.finish() is None
    copies = {**staged.snapshot.files[MODEL], **staged.snapshot.files[STATE]}
    assert all(torch.equal(copies[name], tensor) for name, tensor in expected.items())
    assert copies["w"].is_pinned() and copies["w"].device.type == "cpu"


def test_what_is_written_is_the_state_at_its_step(tmp_path: Path) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}
    with prepare(
        recipe(), steps=24, checkpoint_every=4, keep=9, out=tmp_path / "out", quiet=True, device="cuda"
    ) as run:
        s = run.session
        assert s is not None
        s.on_step = [lambda progress, _: seen.update({progress.step: copy.deepcopy(s.state.model.state_dict())})]
        train(s)
    checkpoints = [read(path) for path in Store(tmp_path / "out" / "checkpoints").all()]
    assert [found.step for found in checkpoints] == list(range(4, 25, 4))
    for found in checkpoints:
        assert all(torch.equal(found.model[name], tensor.cpu()) for name, tensor in seen[found.step].items())
