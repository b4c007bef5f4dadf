"""`stoker runs`: which of the runs found are shown, in what order, and how a table of them reads."""

import ast
import datetime
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from stoker.catalog.runfiles import is_number, printable
from stoker.catalog.runs import DAMAGED, FINISHED, STOPPED, TRAINING, Listed
from stoker.errors import UserError, nearest

COLUMNS = (
    "path",
    "recipe",
    "seed",
    "status",
    "reason",
    "step",
    "epoch",
    "best",
    "best_name",
    "best_step",
    "written",
    "size",
)
_ARGUMENT = "args."  # what an argument is called by where a column has its name
_MAX_COLUMNS = 6  # of arguments; more of them share one
_MISSING = object()
_OPERATORS = ("!=", ">=", "<=", "==", "=", ">", "<")
_FINISHED = {"epochs": "all epochs", "steps": "all steps"}


def value_of(run: Listed, name: str) -> Any:
    """A run's value of a name: a column's, else an argument's, else a metric's last; `_MISSING` if it has none."""
    if name in COLUMNS:
        value = written(run) if name == "written" else getattr(run, name)
        if name in ("path", "reason"):
            return str(value)
        return _MISSING if value is None else value
    if name.startswith(_ARGUMENT) and name.removeprefix(_ARGUMENT) in run.arguments:
        return run.arguments[name.removeprefix(_ARGUMENT)]
    return run.arguments[name] if name in run.arguments else run.metrics.get(name, _MISSING)


def written(run: Listed) -> str | None:
    """When a run was last written, in local time; as text it sorts and compares as time does."""
    if run.written is None:
        return None
    return datetime.datetime.fromtimestamp(run.written).strftime("%Y-%m-%d %H:%M:%S")


def require_names(runs: Sequence[Listed], names: Sequence[str]) -> None:
    """See that every name is a column, or some run's argument or metric.

    Raises:
        UserError: one is none, with the nearest that is.
    """
    arguments = sorted({name for run in runs for name in run.arguments})
    metrics = sorted({name for run in runs for name in run.metrics})
    known = [*COLUMNS, *arguments, *metrics, *(_ARGUMENT + name for name in arguments)]
    for name in names:
        if name not in known:
            raise UserError(
                f"no run has a value '{printable(name)}'{nearest(name, [printable(n) for n in known])}",
                why=f"arguments: {_some(arguments)}; metrics: {_some(metrics)}",
                remedy=f"or a column: {', '.join(COLUMNS)}",
            )


def _some(names: Sequence[str]) -> str:
    words = [printable(name) for name in names[:20]] + (["..."] if len(names) > 20 else [])
    return ", ".join(words) or "none"


@dataclass(frozen=True)
class Condition:
    """`--where NAME OPERATOR TEXT`."""

    name: str
    operator: str
    text: str

    def holds(self, run: Listed) -> bool:
        """Whether a run has the value, and it is as asked for."""
        value = value_of(run, self.name)
        if value is _MISSING:
            return False
        if self.operator in ("=", "!="):
            return same(value, self.text) == (self.operator == "=")
        number = number_of(self.text)
        if is_number(value) and number is not None:
            return _ordered(value, self.operator, number)
        comparable = number is None or self.name in COLUMNS  # "x" is not greater than 9
        return isinstance(value, str) and comparable and _ordered(value, self.operator, self.text)


def condition(expression: str) -> Condition:
    """Parse `lr>0.01`, `recipe=digits`, `seed!=3`.

    Raises:
        UserError: it is no such expression.
    """
    at = min((i for o in _OPERATORS if (i := expression.find(o)) >= 0), default=-1)
    operator = next((o for o in _OPERATORS if at >= 0 and expression.startswith(o, at)), "")
    name, text = expression[: max(at, 0)].strip(), expression[at + len(operator) :].strip()
    if not name or (operator == "=" and text[:1] in ("<", ">")):
        raise UserError(
            f"--where '{printable(expression)}' is not a condition",
            why="" if operator else "it has no =, !=, <, <=, > or >= (unquoted, < and > are the shell's own)",
            remedy="write NAME, one of = != < <= > >=, and a value: --where 'lr>0.01' --where recipe=digits",
        )
    return Condition(name, "=" if operator == "==" else operator, text)


def same(value: Any, text: str) -> bool:
    """Whether a value is what a word spells: 0.001 is 1e-3, True is true, None is none, [64, 64] is 64,64."""
    if is_number(value):
        number = number_of(text)
        return number is not None and (value == number or (math.isnan(value) and math.isnan(number)))
    if isinstance(value, bool) or value is None:
        return str(value).lower() == text.lower().replace("null", "none")
    if isinstance(value, str):
        return value == text
    try:
        return bool(_as_json(value) == _as_json(ast.literal_eval(text)))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def number_of(text: str) -> int | float | None:
    """The number that a word spells, if it does."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _ordered(value: Any, operator: str, other: Any) -> bool:
    if operator == "<":
        return bool(value < other)
    if operator == ">":
        return bool(value > other)
    return bool(value <= other) if operator == "<=" else bool(value >= other)


def select(
    runs: Sequence[Listed], where: Sequence[str] = (), sort: str | None = None, reverse: bool = False
) -> list[Listed]:
    """The runs for which every condition holds, sorted by a name: numbers, then texts; without a value last.

    Raises:
        UserError: a condition is none, or a name that no run has.
    """
    conditions = [condition(expression) for expression in where]
    require_names(runs, [c.name for c in conditions] + ([sort] if sort is not None else []))
    found = [run for run in runs if all(c.holds(run) for c in conditions)]
    if sort is None:
        return found[::-1] if reverse else found
    kinds: list[list[Listed]] = [[], [], [], []]  # numbers, texts, nan, none
    for run in found:
        kinds[_kind(value_of(run, sort))].append(run)
    kinds[0].sort(key=lambda run: value_of(run, sort), reverse=reverse)
    kinds[1].sort(key=lambda run: spelled(value_of(run, sort)), reverse=reverse)
    kinds[:2] = kinds[1::-1] if reverse else kinds[:2]
    return [run for kind in kinds for run in kind]


def _kind(value: Any) -> int:
    if value is _MISSING:
        return 3
    if isinstance(value, bool) or is_number(value):
        return 2 if math.isnan(value) else 0
    return 1


def differing(runs: Sequence[Listed]) -> dict[str, list[str]]:
    """For each recipe, the arguments that are not the same in all its runs shown."""
    found: dict[str, list[str]] = {}
    for recipe in dict.fromkeys(run.recipe for run in runs if run.recipe is not None):
        group = [run.arguments for run in runs if run.recipe == recipe]
        names = dict.fromkeys(name for arguments in group for name in arguments)
        found[recipe] = [n for n in names if len({repr(arguments.get(n, _MISSING)) for arguments in group}) > 1]
    return found


def default_columns(runs: Sequence[Listed]) -> list[str]:
    """Columns of a table; of the arguments those in which the runs differ, in one column where they are many."""
    by_recipe = differing(runs)
    names = next(iter(by_recipe.values()), [])
    shown = [_ARGUMENT + name if name in COLUMNS else name for name in names]
    if len(by_recipe) > 1 or len(names) > _MAX_COLUMNS:
        shown = ["arguments"] if any(by_recipe.values()) else []
    return ["path", "recipe", *shown, "seed", "status", "step", "epoch", "best", "written", "size"]


def table(runs: Sequence[Listed], columns: Sequence[str]) -> tuple[list[list[str]], list[bool]]:
    """Cells of a table, the headings first; and which columns hold nothing but numbers."""
    by_recipe = differing(runs)
    rows = [[printable(name) for name in columns]]
    for run in runs:
        own = {name: run.arguments[name] for name in by_recipe.get(run.recipe or "", []) if name in run.arguments}
        words = "  ".join(f"{name}={spelled(value)}" for name, value in own.items())
        rows.append([printable(words if name == "arguments" else cell(run, name)) for name in columns])
    right = []
    for name in columns:
        values = [value for run in runs if (value := value_of(run, name)) is not _MISSING]
        right.append(name != "best" and bool(values) and all(is_number(value) for value in values))
    return rows, right


def cell(run: Listed, name: str) -> str:
    """What a table shows of a run's value."""
    value = value_of(run, name)
    if value is _MISSING:
        return ""
    if name == "status":
        return status_of(run)
    if name == "best":
        at = f" @{run.best_step}" if run.best_step is not None else " (last)"
        return f"{value:.5g} {run.best_name}{at}"
    if name == "written":
        return str(value)[:16]
    if name == "size":
        return bytes_of(value)
    if isinstance(value, float) and name not in run.arguments:
        return f"{value:.5g}"
    return spelled(value)


def status_of(run: Listed) -> str:
    """A run's status in words."""
    more = f" ({run.reason})" if run.reason else ""
    return {
        FINISHED: f"finished: {_FINISHED.get(run.reason, run.reason)}",
        STOPPED: f"stopped at step {run.step}{more}",
        TRAINING: f"training now{more}",
        DAMAGED: f"damaged: {run.reason}",
    }[run.status]


def spelled(value: Any) -> str:
    """A value as the command line spells it."""
    return "" if value is _MISSING else str(value)


def bytes_of(size: float) -> str:
    """Spell a number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def as_json(run: Listed, columns: Sequence[str] | None = None) -> str:
    """One line of JSON: every column, the arguments and the metrics; or the asked-for names alone."""
    values: Mapping[str, Any]
    if columns is None:
        values = {name: value_of(run, name) for name in COLUMNS}
        values = {**values, "arguments": run.arguments, "metrics": run.metrics}
    else:
        values = {name: run.arguments if name == "arguments" else value_of(run, name) for name in columns}
    return json.dumps({name: finite(value) for name, value in values.items()}, allow_nan=False)


def finite(value: Any) -> Any:
    """A value as JSON has it: what is missing is null, nan and infinities are strings, as in events."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return None if value is _MISSING else value


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool] = (), width: int | None = None) -> list[str]:
    """Lines of a table, every column as wide as its widest cell; on a terminal too narrow for that, cells are folded.

    Args:
        rows: its cells, the headings first.
        right: which columns are flush right.
        width: of the terminal; None where lines may have any length.
    """
    from rich.cells import cell_len

    flush = [*right, *([False] * (len(rows[0]) - len(right)))]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    if width is not None and sum(widths) + 2 * len(widths) > width:
        return _folded(rows, flush, width)
    lines = []
    for row in rows:
        spaces = [" " * (room - cell_len(text)) for room, text in zip(widths, row, strict=True)]
        cells = [s + text if end else text + s for text, s, end in zip(row, spaces, flush, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _folded(rows: Sequence[Sequence[str]], flush: Sequence[bool], width: int) -> list[str]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for end in flush:
        grid.add_column(justify="right" if end else "left", overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(grid)
    return [line.rstrip() for line in captured.get().splitlines()]


def say(lines: Sequence[str]) -> None:
    """Print lines; a character that the terminal has no code for is spelled."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for line in lines:
        click.echo(line.encode(encoding, "backslashreplace").decode(encoding))


def terminal_width() -> int | None:
    """Columns of the terminal; None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
