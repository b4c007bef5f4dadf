"""Model summary: what every module receives, returns, holds and costs, without running the model.

`stoker.probes.forward` follows one forward pass over a copy of the model; this turns what it saw into rows,
totals and text.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stoker.probes.forward import Shape, Site, Trace, size_bytes, trace

if TYPE_CHECKING:
    from rich.table import Table

NAME_WIDTH = 44
CLASS_WIDTH = 28


@dataclass(frozen=True)
class Row:
    """One module. Counts marked "own" leave out its children; all other numbers include them."""

    name: str
    """Dotted path, as `model.get_submodule` takes it; empty for the model itself."""
    class_name: str
    depth: int
    input_shapes: tuple[Shape, ...]
    """Every tensor of the first call, positional and keyword; `shapes_vary` when a later call differs."""
    output_shapes: tuple[Shape, ...]
    shapes_vary: bool
    own_trainable_params: int
    own_frozen_params: int
    own_tied_params: int
    """Own parameters that an earlier row holds as well: the totals count them there."""
    total_params: int
    total_frozen_params: int
    macs: int
    output_bytes: int
    """Bytes of all output tensors, over all calls."""
    saved_bytes: int
    """Bytes that autograd keeps for backward because of operations inside this module."""
    calls: int
    status: str
    """"called", "container" (only its children are called), "weights used" (its parameters were used without
    calling it, as attention does with its output projection), or "not called"."""


@dataclass(frozen=True)
class Summary:
    """The rows and totals of one forward pass; `print` it, or print it with rich."""

    rows: tuple[Row, ...]
    trainable_params: int
    frozen_params: int
    param_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    """One gradient per trainable parameter, in the parameter's dtype."""
    macs: int
    activation_bytes: int
    """Distinct memory of all tensors that modules return: in-place results and views count once."""
    saved_bytes: int
    """Distinct memory that autograd holds when forward returns, without parameters and buffers."""
    note: str
    """How the numbers were obtained, where that is not the usual way; empty otherwise."""
    depth: int | None = None

    @property
    def total_params(self) -> int:
        """Trainable and frozen parameters; tied ones count once."""
        return self.trainable_params + self.frozen_params

    @property
    def training_bytes(self) -> int:
        """Parameters, buffers, gradients and saved tensors; no optimizer state and no temporary memory."""
        return self.param_bytes + self.buffer_bytes + self.gradient_bytes + self.saved_bytes

    @property
    def shown(self) -> tuple[Row, ...]:
        """The rows that `depth` lets through."""
        return tuple(row for row in self.rows if self.depth is None or row.depth <= self.depth)

    def __str__(self) -> str:
        header, *lines = _cells(self)
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

        def line(cells: tuple[str, ...]) -> str:
            padded = (
                cell.ljust(width) if title in TEXT_COLUMNS else cell.rjust(width)
                for cell, width, title in zip(cells, widths, header, strict=True)
            )
            return "  ".join(padded).rstrip()

        rule = "-" * len("  ".join("-" * width for width in widths))
        return "\n".join([line(header), rule, *map(line, lines), rule, *_totals(self)])

    def __rich__(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        header, *lines = _cells(self)
        table = Table(caption=Text("\n".join(_totals(self))), caption_justify="left")
        for title in header:
            table.add_column(title, justify="left" if title in TEXT_COLUMNS else "right")
        for row, cells in zip(self.shown, lines, strict=True):
            table.add_row(*map(Text, cells), style="dim" if row.status == "not called" else None)
        return table


def summary(model: nn.Module, batch: Any, *, depth: int | None = None) -> Summary:
    """Describe every module of `model` for one forward pass over `batch`.

    The model runs in the mode (train or eval) it is in, and is left as it was in every bit.

    Args:
        model: On any device, `meta` included.
        batch: What the model is called with, without the target: a tensor, a tuple or list of positional
            inputs, or a mapping of keyword inputs.
        depth: Show only modules this deep: 0 is the model itself, 1 its children.
    """
    return _summarise(trace(model, batch), depth)


# ---- from the trace to the rows


def _summarise(seen: Trace, depth: int | None) -> Summary:
    model = seen.model
    params = list(model.parameters())
    trainable = [param for param in params if param.requires_grad]
    own = {id(buffer): buffer for buffer in model.buffers()}
    return Summary(
        rows=_rows(seen),
        trainable_params=sum(map(Tensor.numel, trainable)),
        frozen_params=sum(param.numel() for param in params if not param.requires_grad),
        param_bytes=sum(map(size_bytes, params)),
        buffer_bytes=sum(map(size_bytes, own.values())),
        gradient_bytes=sum(map(size_bytes, trainable)),
        macs=sum(macs for macs, _ in seen.macs),
        activation_bytes=sum(seen.outputs.values()),
        saved_bytes=sum(size for size, _ in seen.saved.values()),
        note="; ".join(seen.notes),
        depth=depth,
    )


@dataclass
class _Subtree:
    """A module with everything below it."""

    first: int
    params: dict[int, nn.Parameter] = field(default_factory=dict)
    modules: set[int] = field(default_factory=set)


class _Costs:
    """Amounts spent under a call stack, asked for by module."""

    def __init__(self, spent: Iterable[tuple[int, frozenset[int]]]) -> None:
        self.spent = list(spent)
        self.by_module: Counter[int] = Counter()
        for amount, stack in self.spent:
            self.by_module.update(dict.fromkeys(stack, amount))

    def of(self, module: int) -> int:
        return self.by_module[module]

    def of_any(self, modules: set[int]) -> int:
        return sum(amount for amount, stack in self.spent if not stack.isdisjoint(modules))


def _rows(seen: Trace) -> tuple[Row, ...]:
    modules = dict(seen.model.named_modules())
    never = len(seen.sites)
    subtrees = {name: _Subtree(first=never) for name in modules}
    tied: dict[str, int] = {}
    counted: set[int] = set()
    for name, module in modules.items():
        site = seen.sites.get(id(module))
        own = {id(param): param for param in module.parameters(recurse=False)}
        tied[name] = sum(param.numel() for key, param in own.items() if key in counted)
        counted |= own.keys()
        for path in _paths(name):
            subtree = subtrees[path]
            subtree.first = min(subtree.first, site.first if site else never)
            subtree.params.update(own)
            subtree.modules.add(id(module))
    position = {name: index for index, name in enumerate(modules)}
    order = sorted(modules, key=lambda name: [(subtrees[path].first, position[path]) for path in _paths(name)])
    macs, saved = _Costs(seen.macs), _Costs(seen.saved.values())
    return tuple(_row(seen, macs, saved, name, modules[name], subtrees[name], tied[name]) for name in order)


def _row(seen: Trace, macs: _Costs, saved: _Costs, name: str, module: nn.Module, subtree: _Subtree, tied: int) -> Row:
    site = seen.sites.get(id(module)) or Site(module, first=len(seen.sites))
    own = list(module.parameters(recurse=False))
    held = list(subtree.params.values())
    if site.calls:
        status = "called"
    elif subtree.first < len(seen.sites):
        status = "container"
    else:
        status = "weights used" if seen.used & subtree.params.keys() else "not called"
    container = status == "container"
    return Row(
        name=name,
        class_name=type(module).__name__,
        depth=len(_paths(name)) - 1,
        input_shapes=site.input_shapes,
        output_shapes=site.output_shapes,
        shapes_vary=site.shapes_vary,
        own_trainable_params=sum(param.numel() for param in own if param.requires_grad),
        own_frozen_params=sum(param.numel() for param in own if not param.requires_grad),
        own_tied_params=tied,
        total_params=sum(map(Tensor.numel, held)),
        total_frozen_params=sum(param.numel() for param in held if not param.requires_grad),
        macs=macs.of_any(subtree.modules) if container else macs.of(id(module)),
        output_bytes=site.output_bytes,
        saved_bytes=saved.of_any(subtree.modules) if container else saved.of(id(module)),
        calls=site.calls,
        status=status,
    )


def _paths(name: str) -> list[str]:
    """The model, every container on the way, and the module itself."""
    parts = name.split(".") if name else []
    return ["", *(".".join(parts[: index + 1]) for index in range(len(parts)))]


# ---- text

TEXT_COLUMNS = ("Module", "Class", "Input", "Output")


def _cells(summary: Summary) -> list[tuple[str, ...]]:
    """The header and a tuple of texts per shown row; columns that would say nothing are left out."""
    rows = summary.shown
    columns: dict[str, list[str]] = {
        "Module": [_left_cut(row.name or "(model)", NAME_WIDTH) for row in rows],
        "Class": [_left_cut(row.class_name, CLASS_WIDTH) for row in rows],
        "Input": [_shapes(row, row.input_shapes) for row in rows],
        "Output": [_shapes(row, row.output_shapes) if row.calls else row.status for row in rows],
        "Params": [f"{row.total_params:,}" + " (tied)" * bool(row.own_tied_params) for row in rows],
    }
    if summary.frozen_params:
        columns["Frozen"] = [f"{row.total_frozen_params:,}" for row in rows]
    columns["MACs"] = [_si(row.macs) for row in rows]
    columns["Output size"] = [_size(row.output_bytes) for row in rows]
    columns["Saved"] = [_size(row.saved_bytes) for row in rows]
    if any(row.calls > 1 for row in rows):
        columns["Calls"] = [str(row.calls) for row in rows]
    return [tuple(columns), *zip(*columns.values(), strict=True)]


def _totals(summary: Summary) -> list[str]:
    lines = [
        f"Parameters   {summary.total_params:,} ({summary.trainable_params:,} trainable, "
        f"{summary.frozen_params:,} frozen)",
        f"MACs         {summary.macs:,} ({_si(summary.macs)})",
        f"Activations  {_size(summary.activation_bytes)} returned by modules",
        f"Training     {_size(summary.training_bytes)} = parameters {_size(summary.param_bytes)} + buffers "
        f"{_size(summary.buffer_bytes)} + gradients {_size(summary.gradient_bytes)} + saved for backward "
        f"{_size(summary.saved_bytes)}; without optimizer state and temporary memory",
    ]
    return lines + ([f"Note         {summary.note}"] if summary.note else [])


def _left_cut(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def _shapes(row: Row, shapes: tuple[Shape, ...]) -> str:
    if not row.calls:
        return ""
    text = "x".join(map(str, shapes[0])) or "scalar" if shapes else "-"
    more = f" +{len(shapes) - 1}" if len(shapes) > 1 else ""
    return text + more + " …" * row.shapes_vary


def _si(count: int) -> str:
    for unit, scale in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= scale:
            return f"{count / scale:.3f} {unit}"
    return str(count)


def _size(count: int) -> str:
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
