"""One forward pass over a copy of a model, followed module by module.

The copy runs on fake tensors: shapes, dtypes and the autograd graph are real, the numbers are not, so nothing
is computed or allocated. A model whose control flow depends on values (detection, routing) runs for real on a
CPU copy instead, and the notes say so.
"""

import contextlib
import copy
import dataclasses
import itertools
import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from stoker.errors import UserError

Shape = tuple[int, ...]

# Equal for the same memory, and while one exists the allocator cannot give its identity to other memory.
weak_ref: Callable[[torch.UntypedStorage], Any] = StorageWeakRef


@dataclass
class Site:
    """What the hooks saw of one module."""

    module: nn.Module
    first: int
    input_shapes: tuple[Shape, ...] = ()
    output_shapes: tuple[Shape, ...] = ()
    shapes_vary: bool = False
    output_bytes: int = 0
    calls: int = 0


class _Parents:
    """Stands in for FlopCounterMode's module tracker, which names modules by class and hooks the backward."""

    def __init__(self) -> None:
        self.stack: list[int] = []

    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...

    @property
    def parents(self) -> list[str]:
        """One key: the whole call stack, so that any set of modules can be charged exactly once."""
        return [" ".join(map(str, self.stack))]


class _UsedParameters(TorchDispatchMode):
    """Notes which tensors operators receive; tells a module that is bypassed from one that is idle."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ids: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for arg in args:
            self.ids.update(map(id, arg) if isinstance(arg, list | tuple) else (id(arg),))
        return func(*args, **(kwargs or {}))


@dataclass
class Trace:
    """One forward pass over `model`, which is the copy; costs come with the ids of the modules on the stack."""

    model: nn.Module
    notes: list[str]
    sites: dict[int, Site] = field(default_factory=dict)
    parents: _Parents = field(default_factory=_Parents)
    outputs: dict[Any, int] = field(default_factory=dict)
    saved: dict[Any, tuple[int, frozenset[int]]] = field(default_factory=dict)
    macs: list[tuple[int, frozenset[int]]] = field(default_factory=list)
    used: set[int] = field(default_factory=set)

    def run(self, batch: Any) -> None:
        thread = threading.get_ident()

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                self.parents.stack.append(id(module))
                self.sites.setdefault(id(module), Site(module, first=len(self.sites)))

        def leave(module: nn.Module, args: Any, *kwargs_and_output: Any) -> None:
            if threading.get_ident() == thread and self.parents.stack[-1:] == [id(module)]:
                self.parents.stack.pop()
                if len(kwargs_and_output) == 2:  # after a forward that raised, torch passes no kwargs
                    kwargs, output = kwargs_and_output
                    self._record(self.sites[id(module)], (args, kwargs), output)

        def pack(tensor: Tensor) -> Tensor:
            storage = _storage(tensor)
            if storage is not None:
                entry = (storage.nbytes(), frozenset(self.parents.stack))
                self.saved.setdefault(weak_ref(storage), entry)
            return tensor.detach()  # the tensor itself would hold the node that holds it: never freed

        counter = FlopCounterMode(display=False, custom_mapping=_formulas())
        counter.skip_unsupported = True  # an operator without formula costs nothing; older torch ignores this
        counter.mod_tracker = self.parents  # type: ignore[assignment]
        used = _UsedParameters()
        with contextlib.ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(enter).remove)
            handle = register_module_forward_hook(leave, with_kwargs=True, always_call=True)
            stack.callback(handle.remove)
            stack.callback(_global_forward_hooks_with_kwargs.pop, handle.id, None)  # remove() forgets this one
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
            stack.enter_context(used)
            stack.enter_context(counter)
            output = _call(self.model, batch)
        self._forget_own_and_freed()
        del output  # until here it keeps the graph, and with it the saved tensors, alive
        self.used = used.ids
        self.macs = [
            (sum(ops.values()) // 2, frozenset(map(int, key.split()))) for key, ops in counter.get_flop_counts().items()
        ]

    def _record(self, site: Site, inputs: Any, output: Any) -> None:
        taken = tuple(tuple(tensor.shape) for tensor in _tensors(inputs))
        given = tuple(tuple(tensor.shape) for tensor in _tensors(output))
        if site.calls == 0:
            site.input_shapes, site.output_shapes = taken, given
        site.shapes_vary |= (site.input_shapes, site.output_shapes) != (taken, given)
        site.calls += 1
        for tensor in _tensors(output):
            site.output_bytes += tensor.numel() * tensor.element_size()
            storage = _storage(tensor)
            if storage is not None:
                self.outputs.setdefault(weak_ref(storage), storage.nbytes())

    def _forget_own_and_freed(self) -> None:
        held = (*self.model.parameters(), *self.model.buffers())
        own = {weak_ref(storage) for tensor in held if (storage := _storage(tensor)) is not None}
        self.saved = {ref: kept for ref, kept in self.saved.items() if ref not in own and not ref.expired()}
        self.outputs = {ref: size for ref, size in self.outputs.items() if ref not in own}


_Attempt = Callable[[nn.Module, Any, bool], Trace]


def trace(model: nn.Module, batch: Any) -> Trace:
    """Follow one forward pass of a copy of `model`; the model and the random generators stay as they were."""
    with _globals_restored():
        return _first_that_runs(getattr(model, "_orig_mod", model), batch)


def _first_that_runs(model: nn.Module, batch: Any) -> Trace:
    """Try fake tensors, then real ones; in the model's own mode, then in eval mode."""
    lazy = any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers()))
    attempts: tuple[_Attempt, ...] = (_real,) if lazy else (_fake, _real)
    modes = (False, True) if any(module.training for module in model.modules()) else (False,)
    errors: list[Exception] = []
    for evaluate, attempt in itertools.product(modes, attempts):
        try:
            seen = attempt(model, batch, evaluate)
        except Exception as error:
            errors.append(error.with_traceback(None))  # a traceback would keep the failed copy alive
            continue
        if lazy:
            seen.notes.append(
                "lazy parameters: a CPU copy ran for real to infer them; the model itself is still "
                "uninitialised, call it once before building its optimizer"
            )
        elif attempt is _real:
            seen.notes.append(f"a CPU copy ran for real, as fake tensors do not do: {_brief(errors[-1])}")
        if evaluate:
            seen.notes.append(f"ran in eval mode, as train mode fails: {_brief(errors[len(attempts) - 1])}")
        return seen
    failed = errors[len(attempts) - 1]
    on_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    raise UserError(
        f"{type(model).__name__} does not run on this batch.",
        why=_brief(failed, limit=600),
        remedy="build it on CPU instead of meta, in case its forward reads values of its buffers"
        if on_meta
        else "call the model on the batch yourself to see where it fails. A tensor is passed as model(x), "
        "a tuple or list as model(*batch), a mapping as model(**batch); the target does not belong to it.",
    ) from failed


def _fake(model: nn.Module, batch: Any, evaluate: bool) -> Trace:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = _device(model)

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_meta:  # meta does not mix with the tensors a forward makes; a fake CPU tensor does
            with mode, torch.no_grad():
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                return nn.Parameter(empty, requires_grad=tensor.requires_grad)
            return empty.requires_grad_(tensor.requires_grad)
        return mode.from_tensor(tensor if tensor.is_leaf else tensor.detach())

    def convert_input(tensor: Tensor) -> Tensor:
        with mode, torch.no_grad():
            return convert(tensor).to(device).requires_grad_(tensor.requires_grad)

    seen = Trace(_copied(model, convert, evaluate), [])
    inputs = _copied_batch(batch, convert_input)
    with mode:
        seen.run(inputs)
    return seen


def _real(model: nn.Module, batch: Any, evaluate: bool) -> Trace:
    held = [*model.parameters(), *model.buffers()]
    needed = 3 * sum(map(size_bytes, held))  # the copy, and as much again for what its forward makes, twice
    if needed > psutil.virtual_memory().available:
        raise UserError("the forward depends on values, and a copy of the model does not fit into memory")
    made_up = any(tensor.is_meta for tensor in held)

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_leaf and tensor.device.type == "cpu":
            return copy.deepcopy(tensor)
        moved = _made_up(tensor) if tensor.is_meta else tensor.detach().to("cpu", copy=True)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(moved, requires_grad=tensor.requires_grad)
        return moved.requires_grad_(tensor.requires_grad)

    notes = ["the model is on meta, so values were made up: counts may depend on them"] * made_up
    seen = Trace(_copied(model, convert, evaluate), notes)
    seen.run(_copied_batch(batch, convert))
    return seen


def _made_up(tensor: Tensor) -> Tensor:
    values = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return values.normal_(std=0.02) if isinstance(tensor, nn.Parameter) else values


def _copied(model: nn.Module, convert: Callable[[Tensor], Tensor], evaluate: bool) -> nn.Module:
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        # plain attributes that are results of operations (weight_norm's weight) refuse to be copied
        held += [value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf]
        for tensor in held:
            if id(tensor) not in memo:
                memo[id(tensor)] = convert(tensor)
    twin = copy.deepcopy(model, memo)
    return twin.eval() if evaluate else twin


def _copied_batch(batch: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    return tree_map(lambda leaf: convert(leaf) if isinstance(leaf, Tensor) else copy.deepcopy(leaf), batch)


def _call(model: nn.Module, batch: Any) -> Any:
    with torch.inference_mode(False), torch.enable_grad():
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextlib.contextmanager
def _globals_restored() -> Iterator[None]:
    """Random generators as they were; compiled code off, and attention's fused path, which hides products."""
    numpy = sys.modules.get("numpy")
    log = logging.getLogger("torch._subclasses.fake_tensor")  # reports as an error what has a fall-back here
    silent, log.disabled = log.disabled, True
    fast = torch.backends.mha.get_fastpath_enabled()
    states = random.getstate(), torch.get_rng_state(), numpy and numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else None
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eager or contextlib.nullcontext():
            yield
    finally:
        log.disabled = silent
        torch.backends.mha.set_fastpath_enabled(fast)
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if numpy:
            numpy.random.set_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


# ---- operations that torch's counter has no formula for; a formula gets shapes and returns FLOPs


def _rnn_layer_flops(x: Shape, w_ih: Shape, w_hh: Shape, *_: Any, out_shape: Shape = (), **__: Any) -> int:
    return 2 * prod(x[:-1]) * (prod(w_ih) + prod(w_hh))


def _rnn_flops(x: Shape, weights: list[Shape], *_: Any, out_shape: Shape = (), **__: Any) -> int:
    return 2 * prod(x[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _grouped_flops(a: Shape, b: Shape, *_: Any, out_shape: Shape = (), **__: Any) -> int:
    rows, columns = a[-2], b[-1]
    groups = a[0] if len(a) == 3 and len(b) == 3 else 1
    return 2 * groups * rows * a[-1] * columns  # 2-d operands hold the rows of all groups


def _deform_flops(x: Shape, weight: Shape, *_: Any, out_shape: Shape = (), **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


def _sdpa_flops(q: Shape, k: Shape, v: Shape, *_: Any, out_shape: Shape = (), **__: Any) -> int:
    return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _formulas() -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten.mv: lambda a, *_, **__: 2 * prod(a),
        aten.dot: lambda a, *_, **__: 2 * prod(a),
        aten.addmv: lambda _, a, *__, **___: 2 * prod(a),
        aten.addbmm: lambda _, a, b, *__, **___: 2 * prod(a) * b[-1],
        aten._trilinear: lambda a, w, b, *_, out_shape, **__: 2 * prod(out_shape) * prod(w[1:]),
        aten.mkldnn_rnn_layer: _rnn_layer_flops,
        aten._cudnn_rnn: _rnn_flops,
        aten._grouped_mm: _grouped_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,  # 2.11 does not count it
    }
    if "torchvision" in sys.modules:
        formulas[torch.ops.torchvision.deform_conv2d] = _deform_flops
    return formulas


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers, mappings and dataclasses (ModelOutput is both)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for spec in dataclasses.fields(value):
            yield from _tensors(getattr(value, spec.name))


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse and some wrapped tensors have none
        return None


def size_bytes(tensor: Tensor) -> int:
    """Bytes of the elements; none while a lazy parameter waits for its shape."""
    return 0 if is_lazy(tensor) else tensor.numel() * tensor.element_size()


def _device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return torch.device("cpu") if tensor.is_meta else tensor.device
    return torch.device("cpu")


def _brief(error: Exception, limit: int = 160) -> str:
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}".rstrip(": ")
    return text if len(text) <= limit else text[: limit - 1] + "…"
