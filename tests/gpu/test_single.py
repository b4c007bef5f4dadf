"""One CUDA device: resumed to the same bits, a nan found late is still traced to its module, precisions."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stoker
from stoker.devices.strategy import Single
from tests.laws.runs import assert_same

pytestmark = pytest.mark.gpu


class Log(nn.Module):
    """Undefined for what is negative."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x)


def recipe(middle: Any = nn.ReLU) -> stoker.Recipe:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 16, generator=generator), torch.randint(0, 4, (256,), generator=generator)
    return stoker.Recipe(
        model=lambda: nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), middle(), nn.Dropout(0.2), nn.Linear(32, 4)),
        loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0, 0.5])),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        schedule=stoker.cosine(warmup_steps=5),
        train=stoker.Loader((x, y), 32, shuffle=True),
        val=stoker.Loader((x, y)),
        clip_norm=1.0,
        ema=0.9,
    )


class Drawn(torch.utils.data.Dataset[Any]):
    """Samples in host memory, one of which cannot be read."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if i == 5:
            raise ValueError("five")
        return torch.full((256,), float(i)) + torch.rand(256), i


@pytest.mark.parametrize("workers", [0, 2])
def test_the_side_stream_hands_out_what_was_read(workers: int) -> None:
    loader = stoker.Loader(Drawn(), 8, shuffle=True, on_error="skip")
    plain, ahead = loader.feed(0), Single(torch.device("cuda")).ahead(loader.feed(0, workers=workers))
    for epoch in range(3):
        for (ours, last), (x, end) in zip(ahead.epoch(epoch), plain.epoch(epoch), strict=True):
            scratch = torch.randn(512, 512, device="cuda")
            assert (scratch @ scratch).isfinite().all()  # the device is busy while the next batch comes
            assert ours[0].is_cuda and torch.equal(ours[0].cpu(), x[0]) and torch.equal(ours[1].cpu(), x[1])
            assert last == end and len(ahead.skipped) == len(plain.skipped)
    assert len(ahead.skipped) == 3
    ahead.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_stop_changes_no_bit(tmp_path: Path, precision: str) -> None:
    options: Any = {"epochs": 4, "device": "cuda", "precision": precision, "quiet": True, "log_every": 4}
    stoker.fit(recipe(), out=tmp_path / "whole", **options)

    def stop(progress: Any, metrics: Any) -> None:
        if progress.step in (5, 17):
            signal.raise_signal(signal.SIGTERM)

    for _ in range(3):
        run = stoker.fit(recipe(), out=tmp_path / "stopped", on_step=[stop], **options)
    assert run.reason == "epochs"
    assert next(run.model.parameters()).is_cuda

    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_a_nan_found_at_the_log_line_is_traced_to_its_step_and_module(tmp_path: Path) -> None:
    with pytest.raises(stoker.UserError, match=r"in step 1 .*\n.*module 2 \(Log\)"):
        stoker.fit(recipe(Log), epochs=4, device="cuda", quiet=True, out=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
