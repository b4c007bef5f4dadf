"""Tiny Shakespeare: characters. `stoker train examples/shakespeare/recipe.py --steps 2000 --eval-every 500`.

nanoGPT's CPU recipe, but for how wide the weights begin. `val/loss` is the mean over every character of the
validation split, each in the context of its window of 64; nanoGPT estimates the same from 20 random batches.
"""

import torch
from shakespeare_task import GPT, groups, load, loss

import stoker


def recipe(
    layers: int = 4,
    heads: int = 4,
    width: int = 128,
    block: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    batch_size: int = 12,
    data: str = "",
) -> stoker.Recipe:
    """Predict the next character of Shakespeare with a small GPT."""
    train, val, num_codes = load(block, data)
    return stoker.Recipe(
        model=lambda: GPT(num_codes, block, layers, heads, width),
        loss=loss,
        params=lambda model: groups(model, weight_decay),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99)),
        schedule=stoker.cosine(warmup_steps=100, final=0.1),
        clip_norm=1.0,
        train=stoker.Loader(train, batch_size, shuffle=True),
        val=stoker.Loader(val, 128),
    )
