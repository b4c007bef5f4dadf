"""A run's model for other programs: weights by name (pt, safetensors), or the whole model as a graph (onnx, pt2).

Nothing takes its name unseen: weights are read back and compared bit for bit; a graph runs on real samples of the
run's own data, beside the model that it was made from.
"""

from dataclasses import dataclass
from pathlib import Path

from stoker.errors import UserError, nearest
from stoker.export.graph import require_onnx, write_graph
from stoker.export.weights import write_weights
from stoker.export.writing import replacing
from stoker.infer import open_run
from stoker.start import Run

SUFFIXES = {"pt": ".pt", "safetensors": ".safetensors", "onnx": ".onnx", "pt2": ".pt2"}


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        path: where.
        checked: how it was checked, in words.
        checkpoint: name of the checkpoint whose weights it holds.
        size_bytes: of the file, and of its weights where these are in a file beside it.
        signature: inputs and outputs of a graph: ("input" or "output", "NAME TYPE [SHAPE]").
        notes: what its reader should know, such as sizes that are fixed.
    """

    path: Path
    checked: str
    checkpoint: str
    size_bytes: int
    signature: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def export(
    run: Run | str | Path,
    format: str,
    out: str | Path | None = None,
    *,
    which: str = "best",
    device: str | None = None,
    batch_size: int | None = None,
) -> Exported:
    """Write a run's model; a file of that name is replaced once the new one is complete and checked.

    Args:
        run: a Run, or a run's folder.
        format: "pt" or "safetensors" (the evaluated weights by name), "onnx" or "pt2" (the model as a graph).
        out: the file (default: RUN/export/RECIPE.FORMAT).
        which: "best", "latest", or the path of a checkpoint.
        device: where a pt2 graph is made, and then runs (default: the CPU); the other formats have no device.
        batch_size: samples in the batch that a graph is made on (default: the evaluation's).

    Raises:
        UserError: no run or checkpoint, a model that the format cannot express, a file that is not what the model
            computes or cannot be written; no file is then left, and one that was there stays.
    """
    if format not in SUFFIXES:
        raise UserError(
            f"there is no format {format!r}{nearest(format, list(SUFFIXES))}", remedy=f"one of {', '.join(SUFFIXES)}"
        )
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}", remedy="--batch-size 8, for example")
    if format == "onnx":
        require_onnx()
    folder = run.dir if isinstance(run, Run) else Path(run)
    target = _target(Path(out), format) if out is not None else None
    opened = open_run(folder, which, device if device is not None and format == "pt2" else "cpu")
    target = target or folder / "export" / f"{opened.identity.recipe}{SUFFIXES[format]}"
    checkpoint = opened.checkpoint.path.resolve().name
    with replacing(target, chosen=out is not None) as partial:
        if format in ("pt", "safetensors"):
            checked = write_weights(opened.model, format, partial)
            return Exported(target, checked, checkpoint, _size_bytes(partial.parent))
        graph = write_graph(opened, format, partial, batch_size)
        size = _size_bytes(partial.parent)
        return Exported(target, graph.checked, checkpoint, size, tuple(graph.signature), tuple(graph.notes))


def _target(path: Path, format: str) -> Path:
    """Where to write, looked at before the run is opened.

    Raises:
        UserError: a folder, in no folder, or a name that promises another format.
    """
    own = SUFFIXES[format]
    if path.is_dir():
        raise UserError(f"{path} is a folder", remedy=f"--out {path / f'model{own}'}")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}", remedy=f"mkdir -p {path.parent}")
    if path.suffix != own and path.suffix in SUFFIXES.values():
        raise UserError(
            f"{path.name} is named as if it were {path.suffix[1:]}, and the format is {format}",
            remedy=f"--out {path.with_suffix(own)}, or --format {path.suffix[1:]}",
        )
    return path


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
