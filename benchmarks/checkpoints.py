"""What saving costs: ResNet-50 with AdamW (308 MB), beside torch.save and torch's own asynchronous saving.

    python benchmarks/checkpoints.py [--rounds 9] [--seconds 80] [--only blocked,memory,throughput]

Needs torchvision. The method and its reasons are in `benchmarks/README.md`.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.distributed import checkpoint as dcp

import stoker
from stoker.checkpoint.saver import Saver
from stoker.start import prepare
from stoker.train import Nowhere, save, see_copied, train

SAVE_EVERY_S = 20.0


def recipe(size: int) -> stoker.Recipe:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 3, size, size, generator=generator), torch.randint(0, 1000, (64,), generator=generator)
    return stoker.Recipe(
        model=lambda: torchvision.models.resnet50(),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4),
        train=stoker.Loader((x, y), 16, shuffle=True),
    )


def timed(function: Callable[[], Any]) -> float:
    os.sync()  # what was written before shall not be flushed at its cost
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def blocked(folder: Path, rounds: int) -> None:
    """Time that a training loop waits for a save, by each way of saving, in turns with torch.save."""
    warnings.simplefilter("ignore")
    with prepare(recipe(32), steps=2, out=folder / "run", quiet=True) as started:
        s = started.session
        assert s is not None
        train(s)
        optimizer = s.state.objectives[0].optimizer
        tree = {"model": s.state.model.state_dict(), "optimizer": optimizer.state_dict()}
        file, begun = folder / "state.pt", list[Any]()

        def by_dcp() -> None:
            begun.append(dcp.async_save(tree, checkpoint_id=folder / "dcp"))

        def by_stoker() -> None:
            save(s)
            see_copied(s)  # here at once; in a training, beside the next step's forward and backward pass

        ways = {"stoker": lambda: save(s), "stoker, all copied": by_stoker, "dcp.async_save": by_dcp}
        for name, way in ways.items():  # one after the other: torch's leaves threads behind
            times: dict[str, list[float]] = {name: [], "torch.save": []}
            for i in range(rounds + 1):
                s.record.settle()
                found = timed(way)
                s.record.settle()
                if begun:
                    begun.pop().result()
                times[name] += [found] if i else []  # the first save of each way is left out: it allocates
                times["torch.save"] += [timed(lambda: torch.save(tree, file))] if i else []
                file.unlink(missing_ok=True)  # its pages are had again: the best case for torch.save
            reference = statistics.median(times["torch.save"])
            for way_name, values in times.items():
                low, middle, high = statistics.quantiles(values, n=4)
                ms = f"{middle * 1e3:7.1f} ms ({low * 1e3:.1f}-{high * 1e3:.1f})"
                print(f"{way_name:19} {ms:24} {middle / reference:.1%}")


def peak(folder: Path, way: str) -> None:
    """Train in this process and print its peak memory and the size of the state."""
    options = {"checkpoint_every": 2} if way != "none" else {}
    out = folder / ("half" if way == "resume" else way)
    if way == "resume":
        started = stoker.fit(recipe(32), steps=8, out=out, quiet=True, **options)
    elif way == "none":  # nor the last step's save, nor memory for it
        Saver.reserve = lambda *_, **__: None  # type: ignore[method-assign]
        with prepare(recipe(32), steps=8, out=out, quiet=True) as begun:
            assert begun.session is not None
            begun.session.record = Nowhere()
            started = train(begun.session)  # type: ignore[assignment]
    else:
        started = stoker.fit(recipe(32), steps=8 if way == "async" else 4, out=out, quiet=True, **options)
    del started
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def memory(folder: Path) -> None:
    """Peak memory of a training with and without saves, and of one that is resumed."""
    found = {}
    for way in ("none", "async", "half", "resume"):
        command = [sys.executable, __file__, "--peak", way, "--folder", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = int(done.stdout)
    files = next((folder / "async" / "checkpoints").glob("step-*")).glob("*.safetensors")
    state = sum(file.stat().st_size for file in files)
    print(f"state {state / 1e6:.0f} MB; peak without saves {found['none'] / 1e6:.0f} MB")
    print(f"with saves +{(found['async'] - found['none']) / state:.2f} states")
    print(f"resumed    {found['resume'] / found['async'] - 1:+.1%} of the peak of a training that was not")


def throughput(folder: Path, seconds: float, rounds: int) -> None:
    """Steps per second with a save every 20 s beside none, in turns."""
    step_s = 0.0
    ratios = []
    for i in range(rounds):
        rates = {}
        for every in (None, SAVE_EVERY_S):
            marks: list[float] = []
            options = {} if every is None else {"checkpoint_every": max(round(every / step_s), 1)}
            steps = 40 if not step_s else max(round(seconds / step_s), 4)
            out = folder / f"t{i}-{every}"
            stoker.fit(
                recipe(96),
                steps=steps,
                out=out,
                quiet=True,
                on_step=[lambda progress, metrics, marks=marks: marks.append(time.perf_counter())],
                **options,
            )
            rates[every] = (len(marks) - 1) / (marks[-1] - marks[0])
            step_s = 1 / rates[every]
            shutil.rmtree(out)
        ratios.append(rates[SAVE_EVERY_S] / rates[None])
        print(
            f"round {i}: {rates[None]:.2f} steps/s without, {rates[SAVE_EVERY_S]:.2f} with: {ratios[-1]:.1%}",
            flush=True,
        )
    print(f"throughput with a save every {SAVE_EVERY_S:g} s: {statistics.median(ratios):.1%} (median of {rounds})")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--only", default="blocked,memory,throughput")
    parser.add_argument("--folder")
    parser.add_argument("--peak")
    options = parser.parse_args()
    if options.peak:
        peak(Path(options.folder), options.peak)
        return
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, load {load:.1f}")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if "blocked" in options.only:
            blocked(folder, options.rounds)
        if "memory" in options.only:
            memory(folder)
        if "throughput" in options.only:
            throughput(folder, options.seconds, max(options.rounds // 3, 1))


if __name__ == "__main__":
    main()
