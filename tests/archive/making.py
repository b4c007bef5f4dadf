"""A recipe with modules of its own, and archives taken apart and put together again."""

import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import stoker
from stoker.source import load_source

RECIPE = '''
import os
import signal
import time

import shapes
import stoker
import torch
from torch import nn


def recipe(lr: float = 0.05, nudge: float = 0.0, clock_from: int = 0, data: str = ""):
    """Two classes, divided by a plane."""
    if data and not os.path.exists(data):
        raise FileNotFoundError(data)
    calls = []

    def step(model, batch):
        x, y = batch
        if model.training:
            calls.append(1)
            if str(len(calls)) == os.environ.get("STOP_AT"):
                signal.raise_signal(signal.SIGTERM)
        late = model.training and clock_from and len(calls) >= clock_from
        noise = 0.1 + time.time_ns() % 10**9 / 1e9 if late else 0.0
        output = model(x)
        return {"loss": nn.functional.cross_entropy(output, y) * (1 + nudge + noise), "output": output, "target": y}

    width = shapes.width()
    return stoker.Recipe(
        model=lambda: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 2)),
        step=step,
        optimizer=lambda params: torch.optim.Adam(params, lr=lr),
        train=stoker.Loader(shapes.rows(64, 0), 8, shuffle=True),
        val=stoker.Loader(shapes.rows(24, 1)),
        metrics={"right": lambda output, target: (output.argmax(1) == target).float()},
        ema=0.9,
    )
'''
SHAPES = """
import torch

import sizes


def width():
    return sizes.WIDTH


def rows(n, seed):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return x, (x.sum(1) > 0).long()
"""
STEPS = 24  # of three epochs


def write_recipe(folder: Path, width: int = 6) -> Path:
    """The recipe and its modules; the second is imported by the first only."""
    folder.mkdir(exist_ok=True)
    (folder / "shapes.py").write_text(SHAPES)
    (folder / "sizes.py").write_text("WIDTH = 0" + " + 1" * width + "\n")  # each of another size: byte code is cached
    file = folder / "planes.py"
    file.write_text(RECIPE)
    return file


def trained(file: Path, out: Path, *words: str, **options: Any) -> Path:
    """Train the recipe as the command line does, in a process that has not imported modules of these names."""
    for name in ("shapes", "sizes"):
        sys.modules.pop(name, None)
    source = load_source(str(file))
    given = {"epochs": 3, "log_every": 1, "quiet": True, **options}
    stoker.fit(source.recipe(source.arguments(words)), out=out, **given)
    return out


Member = tuple[zipfile.ZipInfo, bytes]


def members(archive: Path) -> list[Member]:
    with zipfile.ZipFile(archive) as opened:
        return [(info, opened.read(info)) for info in opened.infolist()]


def put_together(path: Path, content: Iterable[Member]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in content:
            archive.writestr(info, data)
    return path


def entry(name: str, mode: int = 0o100644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def manifest_of(content: Iterable[Member]) -> dict[str, Any]:
    (text,) = [data for info, data in content if info.filename == "manifest.json"]
    return dict(json.loads(text))


def with_manifest(content: Iterable[Member], manifest: Any) -> list[Member]:
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    return [(entry(info.filename), text if info.filename == "manifest.json" else data) for info, data in content]
