"""Weights that other programs wrote. Nothing of a file is run: a pickle is looked through before torch may open it."""

import json
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stoker.checkpoint.pickled import check_legacy, check_zip, is_legacy, unsupported
from stoker.errors import UserError, nearest
from stoker.naming.reasons import listed

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_INDEX_BYTES = 64 << 20
_HEAD_BYTES = 512
_HEADER_BYTES = 100 << 20  # of safetensors: no longer one is valid

# Where a training program keeps the weights, beside what else it keeps. The plain ones come first.
_PLAIN = ("state_dict", "model_state_dict", "model", "module", "params", "net", "network", "weights")
_AVERAGED = ("state_dict_ema", "model_ema", "model_ema_state_dict", "ema_state_dict", "ema", "params_ema", "ema_model")
_DEPTH = 3  # of dicts within dicts

# What a folder of the Hugging Face hub calls its weights, the better form first.
_HUB = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)

_OTHERS = {
    ".gguf": "a GGUF file, which holds quantized weights for llama.cpp",
    ".ggml": "a GGML file, which holds quantized weights for llama.cpp",
    ".h5": "an HDF5 file, as Keras and TensorFlow write it",
    ".hdf5": "an HDF5 file, as Keras and TensorFlow write it",
    ".keras": "a Keras model",
    ".msgpack": "a Flax checkpoint",
    ".index": "a part of a TensorFlow checkpoint",
    ".meta": "a part of a TensorFlow checkpoint",
    ".pb": "a TensorFlow graph",
    ".tflite": "a TensorFlow Lite model",
    ".onnx": "an ONNX graph",
    ".npz": "a file of numpy arrays",
    ".npy": "a numpy array",
    ".mlmodel": "a Core ML model",
}
_MAGIC = {
    b"GGUF": ".gguf",
    b"\x89HDF\r\n\x1a\n": ".h5",
    b"\x93NUMPY": ".npy",
}
_ELSEWHERE = {  # by a word of the kind
    "Keras": 'safetensors.numpy.save_file({w.path: w.numpy() for w in model.weights}, "weights.safetensors")',
    "TensorFlow": "AutoModel.from_pretrained(folder, from_tf=True).save_pretrained(out)",
    "Flax": "AutoModel.from_pretrained(folder, from_flax=True).save_pretrained(out)",
    "numpy": "safetensors.numpy.save_file(dict(numpy.load(path, allow_pickle=False)), 'weights.safetensors')",
    "GGUF": "AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).save_pretrained(out)",
    "ONNX": "safetensors.numpy.save_file({t.name: onnx.numpy_helper.to_array(t) for t in "
    "onnx.load(path).graph.initializer}, 'weights.safetensors')",
}


@dataclass(frozen=True)
class Foreign:
    """Tensors of a file by name, what kind of file it is, and what else it holds."""

    tensors: dict[str, torch.Tensor]
    kind: str
    notes: tuple[str, ...] = ()


def read_foreign(path: str | Path) -> Foreign:
    """Read the tensors of a weights file, of a sharded set by its index, or of a folder as the Hugging Face hub has it.

    Raises:
        UserError: no such file, one that holds no weights, or one that could run code when it is read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _folder(path)
        if path.name.endswith(".index.json"):
            return _sharded(path)
        return _file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", remedy=_near(path)) from error


def weights_in(folder: Path) -> Path | None:
    """The file of weights that a folder is there for: by its name, or as the only one."""
    for name in _HUB:
        if (folder / name).is_file():
            return folder / name
    found = [p for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES and p.is_file()]
    return found[0] if len(found) == 1 else None


def _near(path: Path) -> str:
    if Path(f"{path}.index").is_file():
        return f"it is a TensorFlow checkpoint: where TensorFlow is, {_ELSEWHERE['TensorFlow']}"
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"give a weights file, a run, or a checkpoint{nearest(path.name, siblings)}"


def _folder(folder: Path) -> Foreign:
    path = weights_in(folder)
    if path is None:
        found = [p.name for p in sorted(folder.iterdir())]
        raise UserError(
            f"{folder} is neither a run nor a folder with one set of weights",
            why=f"it holds {listed(found) or 'nothing'}",
            remedy="name the file: one of " + ", ".join(f"*{suffix}" for suffix in SUFFIXES),
        )
    _refuse_strays(folder, path)
    found_ = _sharded(path) if path.name.endswith(".index.json") else _file(path)
    return replace(found_, kind=f"{path.name} of a folder: {found_.kind}")


def _refuse_strays(folder: Path, path: Path) -> None:
    """Refuse a file that is a link out of its folder. The hub's own cache links from snapshots/REVISION to blobs/.

    Raises:
        UserError: it is one.
    """
    target, home = path.resolve(), folder.resolve()
    snapshots = [p for p in (home, *home.parents) if p.parent.name == "snapshots"]
    blobs = [p.parent.parent / "blobs" for p in snapshots]
    if not any(target.is_relative_to(place) for place in (home, *blobs)):
        raise UserError(
            f"{path} is a link to {target}, out of its folder",
            why="a folder that was downloaded or unpacked could read any file of this machine so",
            remedy="give the file itself, or copy it into the folder",
        )


def _sharded(index: Path) -> Foreign:
    """The tensors that an index names, out of the files that it names.

    Raises:
        UserError: it is no index; a shard is missing, outside the folder, or lacks what the index promises.
    """
    if index.stat().st_size > _INDEX_BYTES:
        raise UserError(f"{index} is no index of shards: it has {index.stat().st_size} bytes")
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), shard) for name, shard in places.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is no index of shards: {error!r}", remedy="download it again") from None
    for name, shard in pairs:
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and Path(shard).name == shard
        if not plain or "\0" in shard or "\\" in shard or not shard.endswith((".safetensors", ".bin", ".pt", ".pth")):
            raise UserError(
                f"{index.name} places {name} in {shard!r}", why="shards are weights files beside their index"
            )
    shards = dict.fromkeys(shard for _, shard in pairs)
    absent = [shard for shard in shards if not (index.parent / shard).exists()]
    if absent:
        raise UserError(
            f"{index} names {len(shards)} shards, {len(absent)} of which are not beside it",
            why=listed(absent),
            remedy="download them into the same folder",
        )
    held = {}
    for shard in shards:
        _refuse_strays(index.parent, index.parent / shard)
        held[shard] = _file(index.parent / shard).tensors
    lacking = [f"{name} in {shard}" for name, shard in pairs if name not in held[shard]]
    if lacking:
        raise UserError(f"{index.name} names tensors that are not there: {listed(lacking)}", remedy="download it again")
    extra = [name for found in held.values() for name in found if name not in places]
    notes = (f"left out, for the index does not name them: {listed(extra)}",) if extra else ()
    return Foreign({name: held[shard][name] for name, shard in pairs}, f"{len(shards)} shards", notes)


def _file(path: Path) -> Foreign:
    """Tensors of one file; what it is is told by how it begins, whatever it is called."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path} is not a file", remedy="give a weights file")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    _refuse_others(path, head)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _HEADER_BYTES:
        return _safetensors(path)
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is no safetensors file, or is cut off", remedy="download it again")
    if head.startswith(b"PK"):
        check_zip(path)
        return _torch(path, mmap=True)
    if is_legacy(head):
        check_legacy(path)
        return _torch(path, mmap=False)
    raise unsupported(path, head)


def _refuse_others(path: Path, head: bytes) -> None:
    """Refuse what is no file of torch's, naming what it is.

    Raises:
        UserError: it is such a file.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise UserError(f"{path} is empty", remedy="download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is not the weights but a pointer to them, as git clone leaves it without git-lfs",
            remedy=f"git lfs pull --include {path.name}, in the clone",
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(
            f"{path} is a web page", why="the download led to a page instead", remedy="download the file itself"
        )
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")) or head[257:262] == b"ustar":
        raise UserError(f"{path} is compressed or an archive", remedy="unpack it, and give what is inside")
    suffix = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), path.suffix.lower())
    kind = _OTHERS.get(suffix) or ("a part of a TensorFlow checkpoint" if ".data-0" in path.name else None)
    if kind is not None:
        line = next((line for word, line in _ELSEWHERE.items() if word in kind), "")
        raise UserError(
            f"{path} is {kind}: not tensors by name, as PyTorch modules have them",
            remedy=f"where it can be read: {line}" if line else "export it as safetensors",
        )


def _safetensors(path: Path) -> Foreign:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is a damaged safetensors file: {error}", remedy="download it again") from None
    notes = () if path.suffix == ".safetensors" else (f"{path.name} is a safetensors file, whatever it is called",)
    return Foreign(tensors, "safetensors", notes)


def _torch(path: Path, *, mmap: bool) -> Foreign:
    """Let torch read a file that was looked through.

    Raises:
        UserError: torch cannot, or it holds no state dict.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storages and protocols, which are no concern of the reader's
            # Mapped, a storage cannot reach beyond the file, whatever size its record claims.
            return state_dict_in(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap), path)
    except UserError:
        raise
    except Exception as error:  # whatever a forged file makes of the parser
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"{path} cannot be read as weights: {type(error).__name__}: {first[:300]}",
            why="it is cut off or damaged, or was not written by torch.save",
            remedy="download or write it again",
        ) from None


def state_dict_in(content: Any, path: str | Path) -> Foreign:
    """The state dict in what a file holds.

    Raises:
        UserError: there is none, or more than one and no telling which.
    """
    if _is_state_dict(content):
        return _strict(content, "a state dict", ())
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not tensors by name",
            remedy="save model.state_dict() instead",
        )
    found = dict(_candidates(content, "", 1))
    leaf = {place: place.rpartition("/")[2] for place in found}
    plain = sorted((p for p in found if leaf[p] in _PLAIN), key=lambda p: (p.count("/"), _PLAIN.index(leaf[p])))
    others = [p for p in found if leaf[p] not in _PLAIN + _AVERAGED]
    averaged = [p for p in found if leaf[p] in _AVERAGED]
    chosen = (plain or (others if len(others) == 1 else []) or (averaged if not others else []))[:1]
    if not chosen:
        loaded = f"torch.load({str(path)!r}, weights_only=True)" if isinstance(path, Path) else "source"
        what = f"{len(found)} sets of tensors: {listed(list(found))}" if found else "no tensors by name"
        keys = "".join(f"[{part!r}]" for part in next(iter(found), "KEY").split("/"))
        raise UserError(
            f"{path} holds {what}",
            why=f"its entries are {listed([str(key) for key in content])}",
            remedy=f"choose: stoker.load_weights(model, {loaded}{keys})",
        )
    lightning = "pytorch-lightning_version" in content
    kind = "a Lightning checkpoint" if lightning else f"a checkpoint's {chosen[0]!r}"
    rest = [place for place in found if place not in chosen]
    notes = [f"it also holds {listed(rest)}, which is not taken"] if rest else []
    if averaged and chosen[0] in plain:
        notes = [f"it also holds an average of the weights, {listed(averaged)}: the plain weights are taken"]
        more = [place for place in rest if place not in averaged]
        notes += [f"it also holds {listed(more)}, which is not taken"] if more else []
    return _strict(found[chosen[0]], kind, tuple(notes))


def _is_state_dict(value: Any) -> bool:
    """Whether this is tensors by name; extra state of modules may be among them."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) for key in value):
        return False
    tensors = [isinstance(v, torch.Tensor) for k, v in value.items() if not k.endswith("_extra_state")]
    return bool(tensors) and all(tensors)


def _candidates(content: Mapping[Any, Any], path: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, value in content.items():
        place = f"{path}/{key}" if path else str(key)
        if _is_state_dict(value):
            yield place, value
        elif isinstance(value, Mapping) and depth < _DEPTH and not str(key).startswith("optimizer"):
            yield from _candidates(value, place, depth + 1)


def _strict(found: Mapping[str, Any], kind: str, notes: tuple[str, ...]) -> Foreign:
    """Dense tensors only; the rest is named."""
    tensors = {
        name: value.detach()
        for name, value in found.items()
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized
    }
    rest = [name for name in found if name not in tensors]
    if rest:
        notes = (*notes, f"left out, being no dense tensors: {listed(rest)}")
    return Foreign(tensors, kind, notes)
