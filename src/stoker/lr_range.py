"""Learning-rate range test (Smith, "Cyclical learning rates for training neural networks", 2017)."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console as Terminal

from stoker.data.loader import Loader, check_source, open_feed
from stoker.data.seeding import STEP, fold, isolated, seed_all
from stoker.devices.strategy import Single, find_device
from stoker.errors import UserError
from stoker.interrupts import Interrupts
from stoker.recipe import Recipe
from stoker.source import load_source
from stoker.start import build_state
from stoker.train import Limits, Nowhere, Session, finish_step, forward_backward, update
from stoker.watch.console import terminal

_SMOOTHING = 0.9  # of the exponential moving average over losses
_DIVERGED = 4.0  # stop once the smoothed loss exceeds its minimum this many times


@dataclass(frozen=True)
class RangeTest:
    """Rates tried, the loss at each (smoothed), and the rate at which it fell fastest."""

    rates: list[float]
    losses: list[float]
    suggestion: float | None


def range_test(
    recipe: Recipe, *, low: float, high: float, steps: int, seed: int, device: str | None = None
) -> RangeTest:
    """Train for `steps` steps at rates that rise geometrically from `low` to `high`; nothing is written.

    Raises:
        UserError: bounds that do not ascend, or the recipe's optimizer cannot be stepped this way.
    """
    if not (0 < low < high) or steps < 10:
        raise UserError(
            f"cannot test {steps} rates from {low} to {high}", remedy="0 < --from < --to, --steps 10 or more"
        )
    size = recipe.train.batch_size if isinstance(recipe.train, Loader) else None
    check_source(recipe.train, "train", batch_size=size)
    strategy = Single(find_device(device))
    limits = Limits(None, steps)
    with isolated():
        state = build_state(recipe, strategy, limits, seed)
        if any(live.needs_closure for live in state.objectives):
            raise UserError(
                "a range test needs an optimizer that takes one gradient a step",
                why="LBFGS searches its own rate",
            )
        feed = open_feed(recipe.train, seed, batch_size=size)
        s = Session(recipe, state, state.model, strategy, feed, None, seed, None, limits, Nowhere(), Interrupts())
        rates, losses = _sweep(s, [low * (high / low) ** (i / (steps - 1)) for i in range(steps)])
    return RangeTest(rates, losses, steepest(rates, losses))


def _sweep(s: Session, schedule: list[float]) -> tuple[list[float], list[float]]:
    """Rates and smoothed losses, up to where the loss diverges. Groups keep the ratios of their own rates."""
    groups = [group for live in s.state.objectives for group in live.optimizer.param_groups]
    ratios = [group["lr"] / groups[0]["lr"] if groups[0]["lr"] else 1.0 for group in groups]
    rates: list[float] = []
    losses: list[float] = []
    average, progress = 0.0, s.state.progress
    while len(rates) < len(schedule):
        for batch, last in s.feed.epoch(progress.epoch, progress.batch):
            rate = schedule[len(rates)]
            for group, ratio in zip(groups, ratios, strict=True):
                group["lr"] = rate * ratio
            seed_all(fold(s.seed, STEP, progress.step))
            total = 0.0
            for live in s.state.objectives:
                total += float(forward_backward(s, live, batch))
                update(s, live)
            average = _SMOOTHING * average + (1 - _SMOOTHING) * total
            smoothed = average / (1 - _SMOOTHING ** (len(rates) + 1))
            if not math.isfinite(smoothed) or _diverged(smoothed, losses):
                return rates, losses
            rates.append(rate)
            losses.append(smoothed)
            finish_step(s, last)
            if len(rates) == len(schedule):
                break
    return rates, losses


def _diverged(loss: float, losses: list[float]) -> bool:
    lowest = min(losses, default=math.inf)
    return loss > lowest + (_DIVERGED - 1) * abs(lowest)


def steepest(rates: list[float], losses: list[float]) -> float | None:
    """Rate at which the smoothed loss falls fastest per decade, before its minimum; None if it never falls."""
    lowest = min(range(len(losses)), key=losses.__getitem__, default=0)
    slopes = [
        (losses[i + 2] - losses[i - 2]) / math.log10(rates[i + 2] / rates[i - 2]) for i in range(2, max(lowest - 1, 2))
    ]
    if not slopes or min(slopes) >= 0:
        return None
    return rates[2 + slopes.index(min(slopes))]


def lr_range(
    file: str,
    arguments: Sequence[str],
    *,
    low: float,
    high: float,
    steps: int,
    seed: int,
    device: str | None,
    out: str,
) -> None:
    """Run the test, write OUT.csv and OUT.html, print the suggestion."""
    source = load_source(file)
    result = range_test(
        source.recipe(source.arguments(arguments), seed), low=low, high=high, steps=steps, seed=seed, device=device
    )
    screen = terminal()
    table = Path(f"{out}.csv")
    try:
        with table.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.writer(lines)
            writer.writerow(["lr", "loss"])
            writer.writerows(zip(result.rates, result.losses, strict=True))
        written = [str(table), plot(result, Path(f"{out}.html"))]
    except OSError as error:
        raise UserError(f"cannot write {table}: {error.strerror}", remedy="choose another --out") from error
    screen.print(f"{len(result.rates)} rates from {result.rates[0]:.2g} to {result.rates[-1]:.2g}")
    if result.suggestion is None:
        screen.print("the loss never fell: try a lower --from, more --steps, or look at the model")
    else:
        screen.print(f"steepest fall at lr={result.suggestion:.2g}")
    screen.print("written: " + ", ".join(name for name in written if name))


def plot(result: RangeTest, path: Path) -> str:
    """Write the plot as one self-contained page; without plotly, say which extra brings it."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        Terminal(stderr=True).print("no plot: plotly is not installed; pip install 'stoker[plot]'", markup=False)
        return ""
    figure = go.Figure(go.Scatter(x=result.rates, y=result.losses, mode="lines", name="smoothed loss"))
    if result.suggestion is not None:
        figure.add_vline(x=result.suggestion, line_dash="dash")
        # Not add_vline's own annotation: on a logarithmic axis plotly takes its place for an exponent.
        where = math.log10(result.suggestion)
        label = f"steepest fall at lr={result.suggestion:.2g}"
        figure.add_annotation(x=where, y=1, yref="paper", yanchor="bottom", showarrow=False, text=label)
    xaxis = {"type": "log", "title": "learning rate", "exponentformat": "e", "dtick": 1}
    figure.update_layout(xaxis=xaxis, yaxis={"title": "loss (smoothed)"})
    figure.write_html(path, include_plotlyjs=True)
    return str(path)
