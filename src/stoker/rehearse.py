"""Steps that leave no trace: on a copy of the model, to learn what a step costs before a run begins."""

import copy
from dataclasses import replace

import torch
from torch import nn

from stoker.data.loader import Loader
from stoker.data.seeding import STEP, fold, isolated, seed_all
from stoker.data.workers import choose_workers
from stoker.devices.strategy import Strategy
from stoker.interrupts import Interrupts
from stoker.plan import Plan
from stoker.recipe import Recipe
from stoker.state import TrainState
from stoker.train import Limits, Nowhere, Session, forward_backward, update


class Rehearsal:
    """Training steps on copies of the model, its losses and optimizers.

    Args:
        recipe: what is trained.
        model: the model, which stays as it is.
        strategy: the device.
        seed: the run's.
        microbatch: samples per forward pass.
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, strategy: Strategy, seed: int, microbatch: int | None = None
    ) -> None:
        with isolated():
            apart = copy.copy(recipe)
            apart.objectives = {
                name: replace(o, loss=copy.deepcopy(o.loss) if isinstance(o.loss, nn.Module) else o.loss)
                for name, o in (recipe.objectives or {}).items()
            }
            state = TrainState(apart, copy.deepcopy(model).train(), total_steps=1000, scaler=strategy.scaler())
            feed = Loader([0], 1).feed(seed)  # the batches come from whoever rehearses
        self._session = Session(
            apart,
            state,
            state.model,
            strategy,
            feed,
            None,
            seed,
            microbatch,
            Limits(None, None),
            Nowhere(),
            Interrupts(),
        )

    def step(self, batch: object) -> None:
        """Train on a batch."""
        s = self._session
        with isolated():
            seed_all(fold(s.seed, STEP, 0))
            for live in s.state.objectives:
                if live.needs_closure:
                    live.optimizer.step(lambda live=live: forward_backward(s, live, batch))  # type: ignore[misc]
                else:
                    forward_backward(s, live, batch)
                    update(s, live)
            if s.state.scaler is not None:
                s.state.scaler.update()
        s.state.progress.window_sum.clear()

    def settle(self) -> None:
        """Wait for the device."""
        if self._session.strategy.device.type != "cpu":
            torch.accelerator.synchronize(self._session.strategy.device)


def settle_workers(plan: Plan, recipe: Recipe, model: nn.Module, strategy: Strategy, seed: int) -> Plan:
    """Choose the number of workers, where the plan leaves it open, and say why.

    Raises:
        UserError: the data cannot be read.
    """
    if not plan.measure_workers or not isinstance(recipe.train, Loader):
        return plan
    size = recipe.train.batch_size or len(recipe.train.batches(seed, 0)[0])
    rehearsal = Rehearsal(recipe, model, strategy, seed, plan.microbatch)
    choice = choose_workers(recipe.train, seed, size, rehearsal.step, rehearsal.settle)
    return replace(plan, workers=choice.workers, notes=(*plan.notes, str(choice)))
