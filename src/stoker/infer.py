"""A run's weights, in use: load, evaluate, predict."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from stoker.checkpoint.store import Checkpoint
from stoker.data.batch import num_rows
from stoker.data.feeds import Feed
from stoker.data.kept import restoring
from stoker.data.loader import Loader, check_source, open_feed
from stoker.data.seeding import EVALUATION, fold, isolated, seed_all
from stoker.devices.strategy import Single, find_device
from stoker.errors import UserError
from stoker.evaluate import evaluate
from stoker.interrupts import Interrupts
from stoker.recall import recall, require_identity
from stoker.recipe import Recipe, unpack
from stoker.run import Identity, RunDir
from stoker.weights import find_checkpoint, restore_model


@dataclass(frozen=True)
class Opened:
    """A run's recipe and the weights of one of its checkpoints."""

    folder: RunDir
    identity: Identity
    recipe: Recipe
    checkpoint: Checkpoint
    model: nn.Module
    strategy: Single

    def feed(self, split: str, batch_size: int | None, workers: int) -> Feed:
        """Data of a split, in the data's own order.

        Raises:
            UserError: the recipe has no such data.
        """
        source = getattr(self.recipe, split)
        if source is None:
            raise UserError(f"the recipe has no {split} data", remedy=f"give {split}=stoker.Loader(...) in the recipe")
        check_source(source, split)
        own = [x.batch_size for x in (source, self.recipe.train) if isinstance(x, Loader) and x.batch_size]
        size = batch_size or (own[0] if own else 64)
        return open_feed(source, self.identity.seed, batch_size=size, workers=workers, evaluation=True)

    def evaluate(self, split: str, batch_size: int | None = None, workers: int = 0) -> dict[str, Any]:
        """Losses and metrics of a split by name."""
        feed = self.feed(split, batch_size, workers)
        with isolated(), Interrupts() as interrupts:
            scores = evaluate(self.model, self.recipe, self.strategy, feed, split, self.identity.seed, interrupts)
        feed.close()
        if scores is None:
            raise KeyboardInterrupt
        return scores

    def predict(self, split: str, out: str | None, batch_size: int | None, workers: int) -> tuple[Path, int]:
        """Write one row of outputs per sample; return where, and how many.

        Raises:
            UserError: the output is not a tensor with one row per sample, or the file cannot be written.
        """
        path = Path(out) if out is not None else self.folder.path / f"predictions-{split}.csv"
        if path.suffix not in (".csv", ".safetensors"):
            raise UserError(
                f"cannot write predictions as {path.suffix or 'a file without a suffix'}",
                remedy="--out NAME.csv or NAME.safetensors",
            )
        outputs = list(self.outputs(self.feed(split, batch_size, workers)))
        table = torch.cat([o.reshape(len(o), -1) if path.suffix == ".csv" else o for o in outputs])
        try:
            if path.suffix == ".csv":
                with path.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.writer(file)
                    writer.writerow(["sample", *(f"output_{i}" for i in range(table.shape[1]))])
                    writer.writerows([i, *row] for i, row in enumerate(table.tolist()))
            else:
                save_file({"output": table.contiguous()}, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        return path, len(table)

    def outputs(self, feed: Feed) -> Iterator[torch.Tensor]:
        """Yield the model's output for each batch, on the CPU."""
        model = self.model
        (spec,) = list((self.recipe.objectives or {}).values())[:1]
        with isolated(), torch.inference_mode(), self.strategy.autocast():
            for number, (batch, _) in enumerate(feed.epoch(0)):
                seed_all(fold(self.identity.seed, EVALUATION, number))
                batch = self.strategy.place(batch)
                if spec.step is None:
                    args, kwargs, _ = unpack(batch)
                    output = model(*args, **kwargs)
                else:
                    result = spec.step(model, batch, None) if spec.takes_carry else spec.step(model, batch)
                    output = result.get("output") if isinstance(result, dict) else None
                if not isinstance(output, torch.Tensor) or output.dim() == 0 or len(output) != num_rows(batch):
                    raise UserError(
                        f"the output is a {type(output).__name__}, not a tensor with one row per sample",
                        remedy='return {"loss": ..., "output": tensor} from step, or use stoker.load(run) in Python',
                    )
                yield output.float().cpu()
        feed.close()


def open_run(run: str | Path, which: str = "best", device: str | None = None) -> Opened:
    """Build a run's recipe and load a checkpoint: "best", "latest", or the path of one.

    Raises:
        UserError: no run, no such checkpoint, or weights that are not the recipe's.
    """
    folder = RunDir(Path(run))
    identity = require_identity(folder)
    checkpoint = find_checkpoint(folder, None if which in ("best", "latest") else Path(which), which)
    with restoring(checkpoint.state["fitted"]):
        recipe = recall(folder, identity)
    strategy = Single(find_device(device), identity.precision)
    model = restore_model(recipe, checkpoint, identity.seed).to(strategy.device)
    recipe.place_losses(strategy.device)
    return Opened(folder, identity, recipe, checkpoint, model, strategy)
