"""What data learnt from the training split (statistics, categories, a vocabulary) and a checkpoint keeps.

A data set that was fitted has an attribute `fitted`. While a run's weights are opened, `kept` hands out the state that
its checkpoint holds, so that new rows are encoded as the training rows were, with or without the training file.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from stoker.errors import UserError

_KEPT: ContextVar[Mapping[str, str]] = ContextVar("kept", default={})  # noqa: B039  (never changed in place)


@runtime_checkable
class Fitted(Protocol):
    """Something learnt from the training split."""

    name: str  # unique in a recipe

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        ...


@contextmanager
def restoring(states: Mapping[str, str]) -> Iterator[None]:
    """Let data sets that are fitted inside take over these states (JSON by name) instead of reading their rows."""
    token = _KEPT.set(states)
    try:
        yield
    finally:
        _KEPT.reset(token)


def kept(name: str) -> dict[str, Any] | None:
    """State of that name in the checkpoint that is being opened; None where there is nothing to take over."""
    text = _KEPT.get().get(name)
    return json.loads(text) if text is not None else None


def states_of(datasets: list[Any]) -> dict[str, str]:
    """JSON of what the data sets have been fitted with, by name.

    Raises:
        UserError: two of them have the same name and differ.
    """
    states: dict[str, str] = {}
    for dataset in datasets:
        fitted = fitted_of(dataset)
        if fitted is None:
            continue
        text = json.dumps(fitted.state(), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        if states.setdefault(fitted.name, text) != text:
            raise UserError(
                f"two of the recipe's data sets were fitted differently under one name, {fitted.name!r}",
                why="a checkpoint keeps one state a name",
                remedy="fit once, on the training split, and encode the others with it; or name= them apart",
            )
    return states


def explain_fitted(saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Compare what a run's data were fitted with when it was saved, and now.

    Raises:
        UserError: they differ, naming the entries.
    """
    for name in sorted({*saved, *here}):
        if saved.get(name) == here.get(name):
            continue
        if name not in saved or name not in here:
            what = f"the checkpoint has {'no ' if name not in saved else ''}data fitted under the name {name!r}"
            raise UserError(what, remedy="fit(name=...) as it was when the run began")
        differences = _differences(json.loads(saved[name]), json.loads(here[name]), "")
        raise UserError(
            f"the training data are not those that the run began with: {name!r} was fitted differently",
            why="\n          ".join(differences[:6]),
            remedy="put the data back as they were, or begin another run: --out",
        )


def _differences(then: Any, now: Any, path: str) -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted({*then, *now})
        return [line for key in keys for line in _differences(then.get(key), now.get(key), f"{path}.{key}".strip("."))]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = enumerate(zip(then, now, strict=True))
        return [line for i, (a, b) in pairs for line in _differences(a, b, f"{path}[{i}]")]
    if isinstance(then, list) and isinstance(now, list):
        return [f"{path}: {len(then)} entries then, {len(now)} now"]
    return [] if then == now else [f"{path}: {str(then)[:60]} then, {str(now)[:60]} now"]


def fitted_of(dataset: Any) -> Fitted | None:
    """Return what a data set, or the one that it wraps, was fitted with."""
    for _ in range(8):  # wrappers in wrappers: Subset, a cache, a user's own
        found = getattr(dataset, "fitted", None)
        if isinstance(found, Fitted):
            return found
        dataset = getattr(dataset, "dataset", None)
        if dataset is None:
            return None
    return None
