"""`stoker compare`: two runs side by side, in words, in numbers and in small curves."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from stoker.catalog.compare import Comparison, Curve
from stoker.catalog.listing import aligned, finite, status_of
from stoker.catalog.runfiles import is_number, printable
from stoker.catalog.runs import main_metric

_BLOCKS, _PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
_CURVE_WIDTH = 48
_CURVES, _DIFF_LINES, _ROWS, _VALUE_WIDTH = 4, 60, 20, 60  # what is shown without --all
_WORDS = {"git_commit": "git commit"}


def lines_of(comparison: Comparison, everything: bool, width: int | None, blocks: bool) -> list[str]:
    """The whole report; names and values are safe to send to a terminal.

    Args:
        comparison: what to report.
        everything: also what is the same, uncut.
        width: of the terminal; None where there is none.
        blocks: whether the output can show block characters.
    """
    c = comparison
    out = aligned([[label, printable(run.path), printable(_standing(run))] for label, run in _labelled(c)], width=width)
    out += ["", *_verdict(c), ""]
    same = _same(c)
    out += [f"same {', '.join(same)}"] if same else []
    out += _parts(c, everything, width)
    if c.source:
        out += ["", "source", *_cut(["  " + printable(line) for line in c.source], _DIFF_LINES, everything)]
    out += ["", *_table(c, everything, width)] if c.curves else ["", "nothing was logged by either"]
    out += _curves(c, everything, _BLOCKS if blocks else _PLAIN_BLOCKS)
    return out


def _labelled(c: Comparison) -> list[tuple[str, Any]]:
    return list(zip("AB", c.runs, strict=True))


def _standing(run: Any) -> str:
    at = "" if run.step is None or run.status in ("stopped", "damaged") else f", step {run.step}"
    return status_of(run) + at


def _verdict(c: Comparison) -> list[str]:
    lines = [printable(c.verdict)]
    lines += [f"  {printable(c.explanation)}"] if c.explanation else []
    if c.decided and c.first_difference is not None:
        lines.append(f"  what decides it differs: {printable(', '.join(c.decided))}")
    elif c.decided and c.bits:
        lines.append(f"  though these differ: {printable(', '.join(c.decided))}")
    if c.steps[0] != c.steps[1]:
        longer = 0 if c.steps[0] > c.steps[1] else 1
        one, other = "AB"[longer], "AB"[1 - longer]
        lines.append(f"  the events of {one} go on to step {c.steps[longer]}, those of {other} end at {min(c.steps)}")
    for label, alone in zip("AB", c.alone, strict=True):
        if alone:
            names = ", ".join(dict.fromkeys(name for _, name in alone))
            first = f"from step {alone[0][0]} on" if len(alone) > 1 else f"at step {alone[0][0]}"
            lines.append(f"  {len(alone)} values are in {label} alone, {first}: {printable(names)}")
    same = [step for step, equal in c.weights.items() if equal]
    if same:
        lines.append(f"  the weights in the checkpoints of step {', '.join(map(str, same))} have the same bits")
    differ = [step for step, equal in c.weights.items() if not equal]
    if differ:
        lines.append(f"  the weights in the checkpoints of step {', '.join(map(str, differ))} differ")
    return lines + [f"  note: {printable(note)}" for note in c.notes]


def _same(c: Comparison) -> list[str]:
    found = [_WORDS.get(part, part) for part in c.parts if part not in c.differences]
    found += [] if c.source else ["source"]
    return [*found, "architecture"] if c.architecture == {} else found


def _parts(c: Comparison, everything: bool, width: int | None) -> list[str]:
    out: list[str] = []
    for part in c.parts:
        rows = c.differences.get(part, {})
        if everything:
            rows = {**{name: (value, value) for name, value in c.recorded[0][part].items()}, **rows}
        if rows:
            out += ["", _WORDS.get(part, part), *_pairs(rows, everything, width)]
    if c.architecture:
        out += ["", "architecture", *_pairs(c.architecture, everything, width)]
    return out


def _pairs(rows: Mapping[str, tuple[Any, Any]], everything: bool, width: int | None) -> list[str]:
    cells = [["", "A", "B"]]
    cells += [[printable(name), *(_value(v, everything) for v in pair)] for name, pair in rows.items()]
    return _cut(["  " + line for line in aligned(cells, width=width and width - 2)], _ROWS, everything)


def _value(value: Any, everything: bool = False) -> str:
    text = printable(value)
    return text if everything or len(text) <= _VALUE_WIDTH else text[: _VALUE_WIDTH - 3] + "..."


def _cut(lines: Sequence[str], limit: int, everything: bool) -> list[str]:
    if everything or len(lines) <= limit + 1:
        return list(lines)
    return [*lines[:limit], f"  ... {len(lines) - limit} more lines: --all"]


# Curves


def _table(c: Comparison, everything: bool, width: int | None) -> list[str]:
    shown = [curve for curve in c.curves.values() if everything or _differs(curve) or curve.name in _main(c)]
    cells = [["", "values", "last A", "last B", "B - A", "best A", "best B", "B - A", "bits differ"]]
    for curve in shown:
        counts = dict.fromkeys((str(len(curve.a)), str(len(curve.b))))
        last, best = curve.last, curve.best
        first = curve.first_difference
        at = f"from step {first[0]} on" if first is not None else "no" if curve.compared else "not comparable"
        cells.append(
            [
                printable(curve.name),
                ", ".join(counts),
                *map(_short, last),
                _minus(last),
                *map(_short, best),
                _minus(best),
                at,
            ]
        )
    left = [curve for curve in c.curves.values() if curve not in shown]
    lines = aligned(cells, [False, *[True] * 7], width)
    return [*lines, f"same bits: {', '.join(printable(curve.name) for curve in left)}"] if left else lines


def _differs(curve: Curve) -> bool:
    return curve.first_difference is not None or not curve.compared


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if is_number(value) else _value(value)


def _minus(pair: tuple[Any, Any]) -> str:
    a, b = pair
    return f"{b - a:+.3g}" if is_number(a) and is_number(b) else ""


def _main(c: Comparison) -> list[str]:
    """The names whose curves are drawn: what the runs are judged by, losses, validation."""
    last = {name: next((v for v in curve.last[::-1] if v is not None), None) for name, curve in c.curves.items()}
    first = [run.best_name for run in c.runs] + [main_metric(last), "val/loss", "train/loss"]
    names = [*first, *(name for name in c.curves if name.startswith("val/"))]
    return [name for name in dict.fromkeys(names) if name is not None and is_number(last.get(name))][:_CURVES]


def _curves(c: Comparison, everything: bool, blocks: str) -> list[str]:
    names = [name for name, curve in c.curves.items() if everything and _scale(curve)] or _main(c)
    rows = []
    for name in names:
        curve = c.curves[name]
        scale = _scale(curve)
        if scale is None:
            continue
        columns = _columns(sorted({step for step, _ in (*curve.a, *curve.b)}))
        for label, points in (("A", curve.a), ("B", curve.b)):
            if points:
                drawn = sparkline(points, columns, scale, blocks)
                about = f"{scale[0]:.4g} to {scale[1]:.4g}, steps {columns[0][0]} to {columns[-1][1]}"
                first = label == "A" or not curve.a
                rows.append([printable(name) if first else "", label, drawn, about if first else ""])
    return ["", *aligned(rows)] if rows else []


def _scale(curve: Curve) -> tuple[float, float] | None:
    values = [float(v) for _, v in (*curve.a, *curve.b) if is_number(v) and math.isfinite(v)]
    return (min(values), max(values)) if values else None


def _columns(steps: Sequence[int]) -> list[tuple[int, int]]:
    """First and last step of each column: a column a step where there is room, equal spans of steps else."""
    if len(steps) <= _CURVE_WIDTH:
        return [(step, step) for step in steps]
    first, span = steps[0], steps[-1] - steps[0] + 1
    edges = [first + span * i // _CURVE_WIDTH for i in range(_CURVE_WIDTH + 1)]
    return [(low, high - 1) for low, high in pairwise(edges)]


def sparkline(
    points: Sequence[tuple[int, Any]], columns: Sequence[tuple[int, int]], scale: tuple[float, float], blocks: str
) -> str:
    """A character a column: the height of the mean in it, "!" for what is not finite, a space for nothing."""
    low, high = scale
    out, at = [], 0
    ordered = sorted(((step, value) for step, value in points if is_number(value)), key=lambda point: point[0])
    for _, end in columns:
        inside = []
        while at < len(ordered) and ordered[at][0] <= end:
            inside.append(float(ordered[at][1]))
            at += 1
        if not inside:
            out.append(" ")
        elif not all(map(math.isfinite, inside)):
            out.append("!")
        else:
            mean = sum(value / len(inside) for value in inside)
            share = (mean / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.0  # halves: no overflow
            out.append(blocks[min(max(int(share * len(blocks)), 0), len(blocks) - 1)])
    return "".join(out)


def as_json(c: Comparison) -> str:
    """The comparison as one line of JSON."""
    curves = {
        name: {
            "points": [len(curve.a), len(curve.b)],
            "last": curve.last,
            "best": curve.best,
            "mode": curve.mode,
            "compared": curve.compared,
            "first_difference": curve.first_difference,
        }
        for name, curve in c.curves.items()
    }
    values = {
        "a": str(c.a),
        "b": str(c.b),
        "status": [run.status for run in c.runs],
        "verdict": c.verdict,
        "explanation": c.explanation,
        "bits": c.bits,
        "compared": c.compared,
        "first_difference": c.first_difference,
        "same_to": c.same_to,
        "steps": c.steps,
        "alone": c.alone,
        "weights": c.weights,
        "decided": c.decided,
        "same": _same(c),
        "differences": c.differences,
        "architecture": c.architecture,
        "source": c.source,
        "curves": curves,
        "notes": c.notes,
    }
    return json.dumps(finite(values), allow_nan=False)
