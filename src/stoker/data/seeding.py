"""Randomness as arithmetic: every draw comes from a generator keyed by where it happens, never by what ran before.

Nothing random is therefore part of a run's state: a step, a sample or an evaluation draws the same numbers whether
or not the run was interrupted, watched, or fed by another number of workers.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_MASK = (1 << 64) - 1

# First element of a key's path: keeps the streams apart.
STEP, SAMPLE, ORDER, EVALUATION, COLLATE = 1, 2, 3, 4, 5


def fold(seed: int, *path: int) -> int:
    """Key (64 bit) of a place in the run, e.g. ``fold(seed, SAMPLE, epoch, index)``.

    Each element is absorbed by one round of SplitMix64 (Steele, Lea & Flood, 2014), a bijection of 64-bit words.
    """
    key = seed & _MASK
    for element in path:
        key = (key ^ (element & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        key = (key ^ key >> 27) * 0x94D049BB133111EB & _MASK
        key ^= key >> 31
    return key


def seed_all(key: int) -> None:
    """Seed the global generators of torch (CPU and initialised CUDA devices), numpy and random.

    About 7 us: ``torch.manual_seed`` alone costs 100 us, because it visits every backend that might exist.
    """
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    random.seed(key)


def seed_all_plainly(seed: int) -> None:
    """Seed as a plain training script does before it builds its model, so that both build the same one."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def draws() -> tuple[float, float, float]:
    """One draw from each global generator: equal draws after equal seeds mean that nobody drew in between."""
    return random.random(), float(np.random.random_sample()), torch.rand(()).item()


@contextmanager
def isolated() -> Iterator[None]:
    """Leave the global generators of torch, numpy and random as they were found."""
    state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
