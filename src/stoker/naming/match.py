"""Saved tensors beside a module's own: what fits, what does not, and what the likely reason is."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from stoker.errors import UserError, nearest, told
from stoker.naming import names
from stoker.naming.reasons import SHOWN, Shape, fit_names, likely, listed, number


class Differing(NamedTuple):
    """A tensor that is there and here, in another shape or type."""

    name: str
    saved: Any
    own: Any


@dataclass(frozen=True)
class LoadReport:
    """What of saved tensors went into a module, and what did not.

    Attributes:
        taken: names that fit and were taken.
        missing: names that the module has and the saved tensors lack.
        unexpected: names that the saved tensors have and the module lacks.
        reshaped: (name, saved shape, own shape) of what has the same name and another shape.
        retyped: (name, saved type, own type) of what cannot be cast: only floating types are, into one another.
        cast: (name, saved type, own type) of what was cast.
        stripped: what was dropped from the saved names, such as "module." and "model.".
        tied: names that are missing, but one tensor with another that was taken.
        hints: likely reasons of all that does not fit.
        notes: what else there is to know about where the tensors came from.
        source: what the tensors came from.
    """

    taken: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[Differing, ...] = ()
    retyped: tuple[Differing, ...] = ()
    cast: tuple[Differing, ...] = ()
    stripped: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = "the saved tensors"
    kept: tuple[str, ...] = field(default=(), repr=False)  # missing, but counters of batches that old files lack

    @property
    def complete(self) -> bool:
        """Whether everything fits, on both sides."""
        return not (set(self.missing) - set(self.kept) or self.unexpected or self.reshaped or self.retyped)

    def __str__(self) -> str:
        own = len(self.taken) + len(self.missing) + len(self.reshaped) + len(self.retyped) + len(self.tied)
        lines = [f"{len(self.taken)} of {own} tensors taken from {self.source}"]
        lines += [f"prefix: {prefix!r} is dropped from the saved names" for prefix in self.stripped]
        types = Counter((d.saved, d.own) for d in self.cast)
        lines += [f"cast: {number(count)} from {then} to {now}" for (then, now), count in types.items()]
        lines += [f"tied: {listed(self.tied)} (one tensor with another that was taken)"] if self.tied else []
        lines += [f"missing there: {listed(self.missing)}"] if self.missing else []
        lines += [f"unknown here: {listed(self.unexpected)}"] if self.unexpected else []
        for what, differing in (("shape", self.reshaped), ("type", self.retyped)):
            pairs = [f"{d.name} ({d.saved} there, {d.own} here)" for d in differing]
            lines += [f"another {what}: {listed(pairs)}"] if pairs else []
        return "\n".join([*lines, *self.hints, *self.notes])


def _shape(value: Any) -> Shape | None:
    """Shape of a tensor; None for extra state, and for a parameter that takes its shape from what is loaded."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) and not is_lazy(value) else None


def short(dtype: torch.dtype) -> str:
    """Name of a type without its package."""
    return str(dtype).removeprefix("torch.")


def compare(saved: Mapping[str, Any], own: Mapping[str, Any], *, exact: bool = False) -> LoadReport:
    """Put saved values beside a state dict's, by name; `exact` takes no type but the same."""
    taken: list[str] = []
    reshaped: list[Differing] = []
    retyped: list[Differing] = []
    cast: list[Differing] = []
    for name, mine in own.items():
        if name not in saved:
            continue
        theirs = saved[name]
        shapes = _shape(theirs), _shape(mine)
        if isinstance(theirs, torch.Tensor) != isinstance(mine, torch.Tensor):
            retyped.append(Differing(name, type(theirs).__name__, type(mine).__name__))
        elif None not in shapes and shapes[0] != shapes[1]:
            reshaped.append(Differing(name, *shapes))
        elif isinstance(mine, torch.Tensor) and theirs.dtype != mine.dtype:
            types = Differing(name, short(theirs.dtype), short(mine.dtype))
            castable = theirs.dtype.is_floating_point and mine.dtype.is_floating_point and not exact
            (cast if castable else retyped).append(types)
            taken += [name] if castable else []
        else:
            taken.append(name)
    absent = [name for name in own if name not in saved]
    tied = () if exact else _tied(own, taken, absent)
    missing = tuple(name for name in absent if name not in tied)
    unexpected = tuple(name for name in saved if name not in own)
    report = LoadReport(tuple(taken), missing, unexpected, tuple(reshaped), tuple(retyped), tuple(cast), tied=tied)
    old = not exact and not any(name.endswith("num_batches_tracked") for name in saved)
    report = replace(report, kept=tuple(name for name in missing if old and name.endswith("num_batches_tracked")))
    hints = likely(
        {name: _shape(own[name]) for name in missing if name not in report.kept},
        {name: _shape(saved[name]) for name in unexpected},
        reshaped,
        list(own),
        list(saved),
    )
    there, here = ([_shape(value) for value in side.values()] for side in (saved, own))
    if len(hints) > 1 and not reshaped and missing and there == here:
        by_order = "dict(zip(model.state_dict(), tensors.values(), strict=True))"
        hints.insert(0, f"all {len(own)} shapes are the same in the same order; {by_order} names them so")
    if report.kept:
        hints.append(
            f"{number(len(report.kept))} named num_batches_tracked stay as they are: old files lack them, and only a "
            "BatchNorm with momentum=None uses them"
        )
    return replace(report, hints=tuple(hints))


def _place(value: Any) -> Any:
    """What two names of one tensor have in common."""
    alive = isinstance(value, torch.Tensor) and not is_lazy(value) and value.numel() and not value.is_meta
    return (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype) if alive else None


def _tied(own: Mapping[str, Any], taken: Iterable[str], absent: Sequence[str]) -> tuple[str, ...]:
    """Absent names of tensors that have another name, which is there: files often keep one name of them only."""
    places = {_place(own[name]) for name in taken} - {None} if absent else set()
    return tuple(name for name in absent if _place(own[name]) in places)


def load_tensors(
    module: nn.Module,
    saved: Mapping[str, Any],
    *,
    source: str,
    partial: bool = False,
    notes: Sequence[str] = (),
    prefixes: bool = True,
) -> LoadReport:
    """Load tensors by name into a module: all of them or, where that is asked for, those that fit.

    Raises:
        UserError: they do not fit, or none does; the module is then as it was.
    """
    own = names.state_dict(module)
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in own.values()):
        raise UserError(
            f"cannot load {source} into a model on the meta device",
            why="its tensors have no memory",
            remedy='model.to_empty(device="cpu") first',
        )
    stripped: list[str] = []
    more: list[str] = []
    if prefixes:
        saved, stripped, more = fit_names(saved, own)
    report = compare(saved, own)
    report = replace(report, source=source, stripped=tuple(stripped), notes=(*notes, *more))
    if not report.taken:
        raise mismatch(report, f"nothing of {source} fits the model", saved, own)
    if not report.complete and not partial:
        raise mismatch(report, f"{source} does not fit the model", saved, own)
    _refuse_untied(own, saved, report)
    _load(module, own, {**own, **{name: saved[name] for name in report.taken}}, source)
    return report


def _refuse_untied(own: Mapping[str, Any], saved: Mapping[str, Any], report: LoadReport) -> None:
    """Refuse two different tensors for one: the last would win, in silence.

    Raises:
        UserError: naming both.
    """
    first: dict[Any, str] = {}
    for name in report.taken:
        place = _place(own[name])
        other = first.setdefault(place, name) if place is not None else name
        if other != name and not torch.equal(saved[other], saved[name]):
            raise UserError(
                f"{other} and {name} are one tensor in the model, and two different ones in {report.source}",
                remedy="untie them in the model, or leave one of them out of what is loaded",
            )


_LOADING = ("_load_from_state_dict", "load_state_dict", "set_extra_state")


def _loads_its_own_way(part: nn.Module) -> bool:
    overridden = any(getattr(type(part), name) is not getattr(nn.Module, name) for name in _LOADING)
    hooked = part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks
    return bool(hooked) or (overridden and not type(part).__module__.startswith("torch."))


def _load(module: nn.Module, own: Mapping[str, Any], values: Mapping[str, Any], source: str) -> None:
    """Load what was compared. Only code of the model's own can fail now: for its sake a copy is kept meanwhile.

    Raises:
        UserError: it did; every tensor is then what it was.
    """
    kept = any(map(_loads_its_own_way, module.modules()))
    before = {n: v.clone() for n, v in own.items() if isinstance(v, torch.Tensor) and not is_lazy(v)} if kept else {}
    try:
        names.load_state_dict(module, values)
    except Exception as error:
        with torch.no_grad():
            for name, tensor in before.items():
                own[name].copy_(tensor)
        raise told(error, f"loading {source} into the model") from error


class Words(NamedTuple):
    """How messages call the two sides."""

    missing: str = "missing there"
    unknown: str = "unknown here"
    there: str = "there"
    here: str = "here"


LOADED = Words()
RESUMED = Words("missing in the checkpoint", "unknown to the recipe", "in the checkpoint", "in the recipe")


def mismatch(report: LoadReport, what: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> UserError:
    """The error for a report that is not complete."""
    lines = explain(report, saved, own)
    lines += [f"dropped from the saved names: {', '.join(report.stripped)}"] if report.stripped else []
    remedy = "give the model that the weights were saved from"
    if report.taken:
        remedy = f"partial=True (--partial) takes the {number(len(report.taken))} that fit, and says which"
    return UserError(what, why="\n          ".join([*lines, *report.notes]), remedy=remedy)


def explain(report: LoadReport, saved: Mapping[str, Any], own: Mapping[str, Any], words: Words = LOADED) -> list[str]:
    """Lines that say what does not fit and why that may be."""

    def first(found: Sequence[Any], line: Callable[[Any], str]) -> list[str]:
        more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        return [line(entry) for entry in found[:SHOWN]] + more

    def both(entry: Differing) -> str:
        return f"{entry.name}: {_spelled(saved[entry.name])} {words.there}, {_spelled(own[entry.name])} {words.here}"

    missing = [name for name in report.missing if name not in report.kept]
    unexpected = list(report.unexpected)
    return [
        *report.hints,
        *first(missing, lambda name: f"{words.missing}: {name}{nearest(name, unexpected[:1000])}"),
        *first(unexpected, lambda name: f"{words.unknown}: {name}"),
        *first([*report.reshaped, *report.retyped], both),
    ]


def _spelled(value: Any) -> str:
    return f"{_shape(value)} {value.dtype}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
