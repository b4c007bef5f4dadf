"""The whole model as a graph: traced by torch.export with sizes open where the data vary, written, run, compared."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils._pytree import tree_map

from stoker.data.seeding import isolated, seed_all
from stoker.errors import UserError
from stoker.export.compare import Wrong, difference
from stoker.export.samples import Sample, Samples, named_tensors, take_samples
from stoker.export.telling import brief, quiet
from stoker.export.writing import patient, writing
from stoker.infer import Opened

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONE_FILE_BYTES = 1_900_000_000  # a protobuf ends at 2 GiB: larger weights go into a file beside the ONNX one

Open = list[dict[int, str]]  # for every input, the names of its dimensions that may have any size
Answer = Callable[[Sample], list[Tensor]]


@dataclass(frozen=True)
class Graph:
    """What became of a graph that was written."""

    checked: str
    signature: list[tuple[str, str]]
    notes: list[str]


class _Refused(Exception):
    """What a library, or the check, says against a graph with these sizes open; `hopeless`: with any other, too."""

    def __init__(self, doing: str, reason: str, hopeless: bool = False) -> None:
        super().__init__(doing, reason)
        self.doing, self.reason, self.hopeless = doing, reason, hopeless


def require_onnx() -> None:
    """Look for the packages that an ONNX file needs, before anything else is done.

    Raises:
        UserError: one is not installed.
    """
    for name in ONNX_PACKAGES:
        try:
            with quiet():
                import_module(name)
        except ImportError as error:
            raise UserError(
                f"an ONNX file needs {name}, and it is not installed", remedy="pip install 'stoker[export]'"
            ) from error


def write_graph(opened: Opened, format: str, path: Path, batch_size: int | None) -> Graph:
    """Write the model as a graph with as many sizes open as torch can leave open, and compare both on real samples.

    Raises:
        UserError: torch cannot express it, or it does not compute what the model does.
    """
    samples = take_samples(opened, batch_size)
    first = samples.cuts[0]
    if not first.tensors or not named_tensors(first.output):
        missing = "is given" if not first.tensors else "returns"
        raise UserError(f"the model {missing} no tensor: there is nothing to make a graph of")
    refusals: list[_Refused] = []
    for sizes, left_open in _openings(samples):
        served = [s for s in (*samples.cuts, *samples.further) if _fits(s, first, left_open)]
        try:
            signature, checked = _attempt(opened.model, format, path, left_open, samples.split, served)
        except _Refused as refused:
            refusals.append(refused)
            if refused.hopeless:
                break
            continue
        notes = _size_notes(sizes, samples, refusals) + _output_notes(first.output)
        return Graph(checked, signature, notes)
    raise UserError(
        f"{type(opened.model).__name__} cannot be exported as {format}: {refusals[-1].doing}",
        why=refusals[-1].reason,
        remedy="change that part of the model's forward(); --format pt and safetensors work with any model",
    )


def _openings(samples: Samples) -> Iterator[tuple[str, Open]]:
    """Sizes to leave open: all that vary from batch to batch; those that vary with its rows; none."""
    tried = []
    for sizes, among in (
        ("all", [*samples.cuts, *samples.further]),
        ("batch", samples.cuts),
        ("none", samples.cuts[:1]),
    ):
        left_open, _ = _varying(among)
        if left_open not in tried:
            tried.append(left_open)
            yield sizes, left_open


def _varying(samples: list[Sample]) -> tuple[Open, Open]:
    """Dimensions of inputs and of outputs whose sizes differ; those of the same sizes everywhere share a name."""
    names = {tuple(sample.rows for sample in samples): "batch"}

    def axes_of(tensors: tuple[Tensor, ...]) -> dict[int, str]:
        columns = enumerate(zip(*(tensor.shape for tensor in tensors), strict=False))
        return {i: names.setdefault(sizes, f"size_{len(names)}") for i, sizes in columns if len(set(sizes)) > 1}

    inputs = list(map(axes_of, zip(*(sample.tensors for sample in samples), strict=True)))
    return inputs, list(map(axes_of, zip(*(sample.outputs for sample in samples), strict=False)))


def _fits(sample: Sample, first: Sample, left_open: Open) -> bool:
    """Whether a sample has the first one's sizes, but for those left open."""
    return all(
        a.shape[axis] == b.shape[axis]
        for a, b, axes in zip(sample.tensors, first.tensors, left_open, strict=True)
        for axis in range(a.dim())
        if axis not in axes
    )


def _attempt(
    model: nn.Module, format: str, path: Path, left_open: Open, split: str, served: list[Sample]
) -> tuple[list[tuple[str, str]], str]:
    """Trace, write, load and compare, with these sizes open.

    Raises:
        _Refused: one of them fails.
    """
    program = _trace(model, served[0], left_open, flat=format == "onnx")
    names = [name for name, _ in named_tensors(served[0].output)]
    inputs = [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    ]
    if format == "onnx":
        names = _distinct(names, inputs)
        answer, reader = _write_onnx(program, path, inputs, names, left_open), "onnxruntime"
    else:
        answer, reader = _write_pt2(program, path), "torch.export.load"
    checked = f"{reader}, on {_counts(served)} of {split}: {_compare(model, served, answer, reader)}"
    given = [("input", *found) for found in zip(inputs, served[0].tensors, left_open, strict=True)]
    returned = [("output", *found) for found in zip(names, served[0].outputs, _varying(served)[1], strict=True)]
    return [(kind, f"{name} {_shape(tensor, axes)}") for kind, name, tensor, axes in given + returned], checked


def _trace(model: nn.Module, sample: Sample, left_open: Open, flat: bool) -> ExportedProgram:
    # Copies: torch.export leaves marks on the tensors that it was shown, and would heed them the next time.
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (sample.args, sample.kwargs))
    shapes = ShapesCollection()
    for (_, tensor), axes in zip(named_tensors((args, kwargs)), left_open, strict=True):
        if axes:
            shapes[tensor] = dict.fromkeys(axes, Dim.DYNAMIC)
    try:
        with quiet(), isolated(), torch.no_grad(), _returning(model, sample.output, flat):
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes if any(left_open) else None)
    except Exception as error:
        raise _Refused("torch.export cannot follow it", brief(error)) from error


@contextmanager
def _returning(model: nn.Module, output: Any, flat: bool) -> Iterator[None]:
    """Let forward() return what a graph can: tensors in a row, or in plain containers.

    On the module itself: a module around it would put a prefix before the names of all weights.
    """
    if not flat and _is_plain(output):
        yield
        return
    forward = model.forward

    @functools.wraps(forward)
    def returning(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        return tuple(tensor for _, tensor in named_tensors(found)) if flat else _plain(found)

    before = vars(model).get("forward")
    model.forward = returning
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


_LEAVES = (Tensor, bool, int, float, str, type(None))


def _is_plain(tree: Any) -> bool:
    if type(tree) in (list, tuple):
        return all(map(_is_plain, tree))
    return all(map(_is_plain, tree.values())) if type(tree) is dict else isinstance(tree, _LEAVES)


def _plain(tree: Any) -> Any:
    """Dicts, lists and tuples of tensors and numbers; without entries that are None, and what else there is."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items() if value is not None and not _is_foreign(value)}
    if is_dataclass(tree) and not isinstance(tree, type):
        return _plain({f.name: getattr(tree, f.name) for f in fields(tree)})
    if isinstance(tree, list | tuple):
        return (list if isinstance(tree, list) else tuple)(map(_plain, tree))
    return None if _is_foreign(tree) else tree


def _is_foreign(value: Any) -> bool:
    known = isinstance(value, (*_LEAVES, Mapping, list, tuple)) or (is_dataclass(value) and not isinstance(value, type))
    return not known


def _output_notes(output: Any) -> list[str]:
    """Say what of the model's output a graph does not return."""
    entries = dict(output) if isinstance(output, Mapping) else vars(output) if is_dataclass(output) else {}
    left = [f"{name} ({type(value).__name__})" for name, value in entries.items() if _is_foreign(value)]
    return [f"not among the outputs: {', '.join(left)}"] if left else []


# ---- files


def _distinct(names: list[str], taken: list[str]) -> list[str]:
    """Names of outputs that are no input's, and no other output's."""
    found: list[str] = []
    for name in names:
        while name in taken or name in found:
            name += "_out"
        found.append(name)
    return found


def _write_onnx(program: ExportedProgram, path: Path, inputs: list[str], outputs: list[str], left_open: Open) -> Answer:
    """Write an ONNX file; return what onnxruntime answers with it."""
    import onnxruntime

    try:
        with quiet():
            converted = torch.onnx.export(
                program,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=left_open,  # as names: which dimensions are open is in the program
                dynamo=True,
                verbose=False,
            )
        assert converted is not None  # it is, only where it was given a file
    except Exception as error:
        raise _Refused("torch.onnx cannot convert it", brief(error)) from error
    held = (*program.state_dict.values(), *program.constants.values())
    size_bytes = sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))
    with writing(path), quiet():
        converted.save(path, external_data=size_bytes > ONE_FILE_BYTES)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its exceptions say it all
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _Refused("onnxruntime cannot load it", brief(error)) from error

    def answer(sample: Sample) -> list[Tensor]:
        arrays = {name: tensor.cpu().numpy() for name, tensor in zip(inputs, sample.tensors, strict=True)}
        needed = {given.name for given in session.get_inputs()}
        return [torch.from_numpy(a) for a in session.run(outputs, {n: a for n, a in arrays.items() if n in needed})]

    return answer


def _write_pt2(program: ExportedProgram, path: Path) -> Answer:
    """Write a program of torch.export; return what it answers once loaded."""
    program.example_inputs = None  # they would be part of the file: samples of the run's data
    with writing(path), quiet(), patient(path) as file:
        torch.export.save(program, file)
    try:
        with quiet():
            loaded = torch.export.load(path).module()
    except Exception as error:
        raise _Refused("torch.export.load cannot load it", brief(error)) from error

    def answer(sample: Sample) -> list[Tensor]:
        with torch.no_grad(), isolated():
            return [tensor for _, tensor in named_tensors(loaded(*sample.args, **sample.kwargs))]

    return answer


# ---- comparison


def _compare(model: nn.Module, served: list[Sample], answer: Answer, reader: str) -> str:
    """Say how far the graph's answers are from the model's.

    Raises:
        _Refused: too far, or there is no answer.
    """
    draws, largest = _draws(model, served[0]), 0.0
    for sample in served:
        try:
            with quiet():
                found = answer(sample)
            largest = max(largest, difference(found, sample.outputs, values=not draws))
        except Wrong as wrong:
            first = sample is served[0]
            raise _Refused(f"{reader} computes something else", f"on {_rows(sample)}: {wrong}", first) from wrong
        except Exception as error:
            raise _Refused(f"{reader} cannot run it on {_rows(sample)}", brief(error)) from error
    if draws:
        return "the same shapes; the model draws random numbers, so values were not compared"
    return f"at most {largest:.2g} from the model's outputs" if largest else "the same bits as the model's outputs"


def _draws(model: nn.Module, sample: Sample) -> bool:
    """Whether the model answers otherwise when it is asked again."""
    with isolated(), torch.no_grad(), contextlib.suppress(Exception):
        seed_all(1)
        again = model(*sample.args, **sample.kwargs)
        try:
            difference([t for _, t in named_tensors(again)], sample.outputs)
        except Wrong:
            return True
    return False


def _rows(sample: Sample) -> str:
    return "the batch" if sample.rows is None else f"{sample.rows} row{'s' * (sample.rows != 1)}"


def _counts(served: list[Sample]) -> str:
    counts = [str(sample.rows) for sample in served if sample.rows is not None]
    if not counts:
        return "a batch"
    *most, last = counts
    return f"{', '.join(most)} and {last} rows" if most else _rows(served[0])


# ---- words


def _shape(tensor: Tensor, axes: Mapping[int, str]) -> str:
    sizes = ", ".join(axes.get(axis, str(size)) for axis, size in enumerate(tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} [{sizes}]"


def _size_notes(sizes: str, samples: Samples, refusals: list[_Refused]) -> list[str]:
    """Say which sizes are fixed, and why."""
    if sizes == "all" and any(_varying(samples.cuts)[0]):
        return []
    why = f", since otherwise {refusals[0].doing}: {refusals[0].reason}" if refusals else ""
    if sizes == "batch":
        return [f"sizes besides the batch's are fixed, though they vary in the data{why}"] if refusals else []
    rows = samples.cuts[0].rows
    if len(samples.cuts) == 1 and rows == 1:
        why = ", which is what the batch has; --batch-size 2 leaves it open"
    return [f"the batch size is fixed at {_rows(samples.cuts[0])}{why}"]
