"""A sample as a line of JSON and a block of bytes, and back, exactly: nothing in them can name code to run.

JSON: None, bool, int, float and str stand for themselves; everything else is a list that begins with a tag.
"""

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from stoker.errors import UserError

_ALIGN = 64  # bytes
_WORD = 1 << 63
_TV_TENSORS = ("Image", "Video", "Mask", "BoundingBoxes", "KeyPoints")
_PLAIN_DTYPE = re.compile(r"bool|bfloat16|u?int(8|16|32|64)|float(16|32|64)|float8_\w+|complex(64|128)")
_DTYPES = {
    name: dtype
    for name, dtype in vars(torch).items()
    if isinstance(dtype, torch.dtype) and _PLAIN_DTYPE.fullmatch(name)
}
_PALETTED = ("L", "LA", "P", "PA")

# Named tuples and dataclasses that this process has met in samples: only these are ever rebuilt.
_MET: dict[str, type] = {}


def encode(sample: Any, name: str = "the sample") -> tuple[str, bytearray]:
    """Encode a sample; about 20 us for (uint8 [3, 224, 224], int).

    Args:
        sample: numbers, strings, bytes, dense CPU tensors (torchvision's tv_tensors too), arrays, PIL images; tuples,
            lists, dicts, named tuples and dataclasses of these.
        name: how an error calls it.

    Raises:
        UserError: something else is in it; the message names its place.
    """
    packer = _Packer()
    return json.dumps(packer.node(sample, name)), packer.block


def decode(header: str, block: bytearray) -> Any:
    """Rebuild what `encode` was given. Tensors and arrays lie in `block`, and may be written to.

    Raises:
        KeyError: it holds a named tuple or dataclass that this process has not met.
        ValueError, TypeError, IndexError, RuntimeError: `encode` made no such thing.
    """
    return _node(json.loads(header), block)


class _Packer:
    """Turns nodes into JSON; bytes go into one aligned block."""

    def __init__(self) -> None:
        self.block = bytearray()

    def put(self, data: Any) -> int:
        """Append bytes; return where they begin."""
        self.block += bytes(-len(self.block) % _ALIGN)
        start = len(self.block)
        self.block += data
        return start

    def node(self, value: Any, place: str) -> Any:
        """JSON of a value; `place` is its path, for messages."""
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        writer = _WRITERS.get(kind)
        if writer is not None:
            return writer(self, value, place)
        if isinstance(value, torch.Tensor):
            return self._tv_tensor(value, place)
        if isinstance(value, np.generic):
            return self._scalar(value, place)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._record("N", value, list(zip(value._fields, value, strict=True)), place)
        if is_dataclass(value):
            return self._record("K", value, [(f.name, getattr(value, f.name)) for f in fields(value)], place)
        if kind.__name__ == "Image" and kind.__module__ == "PIL.Image":
            return self._image(value, place)
        raise _refused(value, place)

    def _int(self, value: int, place: str) -> Any:
        return value if -_WORD <= value < _WORD else ["I", hex(value)]

    def _float(self, value: float, place: str) -> Any:
        return value if math.isfinite(value) else ["F", struct.pack("<d", value).hex()]

    def _complex(self, value: complex, place: str) -> Any:
        return ["C", struct.pack("<dd", value.real, value.imag).hex()]

    def _bytes(self, value: bytes | bytearray, place: str) -> Any:
        return ["B" if type(value) is bytes else "Y", self.put(value), len(value)]

    def _list(self, value: list[Any], place: str) -> Any:
        return ["L", *(self.node(part, f"{place}[{i}]") for i, part in enumerate(value))]

    def _tuple(self, value: tuple[Any, ...], place: str) -> Any:
        return ["U", *(self.node(part, f"{place}[{i}]") for i, part in enumerate(value))]

    def _dict(self, value: dict[Any, Any], place: str) -> Any:
        out: list[Any] = ["D"]
        for key, part in value.items():
            out += [self.node(key, f"a key of {place}"), self.node(part, f"{place}[{key!r}]")]
        return out

    def _record(self, tag: str, value: Any, parts: list[tuple[str, Any]], place: str) -> Any:
        kind = type(value)
        if set(getattr(value, "__dict__", {})) - {name for name, _ in parts}:
            raise _refused(value, place)
        name = f"{kind.__module__}.{kind.__qualname__}({', '.join(name for name, _ in parts)})"
        _MET[name] = kind
        return [tag, name, *(self.node(part, f"{place}.{field}") for field, part in parts)]

    def _tensor(self, value: torch.Tensor, place: str) -> Any:
        plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.requires_grad or vars(value) or str(value.dtype)[6:] not in _DTYPES:
            raise _refused(value, place)
        if value.is_conj() or value.is_neg():
            value = value.resolve_conj().resolve_neg()
        flat, strides = value, None
        if not value.is_contiguous():
            order = sorted(range(value.dim()), key=value.stride, reverse=True)
            flat = value.permute(order)
            if flat.is_contiguous():
                strides = value.stride()  # channels last, say: the order in memory is kept
            else:
                flat = value.contiguous()
        elif 1 in value.shape:  # a stride that is never used still tells kernels which format is meant
            strides = value.stride()
        start = self.put(flat.reshape(-1).view(torch.uint8).numpy().data) if value.numel() else 0
        return ["T", str(value.dtype)[6:], value.shape, strides, start]

    def _tv_tensor(self, value: torch.Tensor, place: str) -> Any:
        kind = type(value)
        if kind.__name__ not in _TV_TENSORS or not kind.__module__.startswith("torchvision.tv_tensors"):
            raise _refused(value, place)
        extra = dict(vars(value))
        if "format" in extra:
            extra["format"] = extra["format"].name
        return ["V", kind.__name__, self._tensor(value.as_subclass(torch.Tensor), place), self._dict(extra, place)]

    def _array(self, value: np.ndarray[Any, Any], place: str) -> Any:
        if value.dtype.kind not in "biufcmMSU":
            raise _refused(value, place)
        flat, strides = value, None
        if not value.flags.c_contiguous:
            order = sorted(range(value.ndim), key=lambda axis: value.strides[axis], reverse=True)
            flat = value.transpose(order)
            if flat.flags.c_contiguous:
                strides = value.strides
        elif 1 in value.shape:
            strides = value.strides
        return ["A", value.dtype.str, value.shape, strides, self.put((value if strides is None else flat).tobytes())]

    def _scalar(self, value: np.generic, place: str) -> Any:
        if type(value) in (np.str_, np.bytes_):
            return ["S", "str" if type(value) is np.str_ else "bytes", self.node(value.item(), place)]
        array = np.asarray(value)
        if array.dtype.kind not in "biufcmM":
            raise _refused(value, place)
        return ["S", array.dtype.str, self.put(array.tobytes())]

    def _image(self, value: Any, place: str) -> Any:
        palette = None
        value.load()  # a palette that was put on it is applied only then
        if value.palette is not None and value.mode in _PALETTED:
            kind = value.im.getpalettemode()
            palette = self._tuple((kind, value.im.getpalette(kind, kind)), place)
        info: list[Any] = ["D"]
        for key, part in value.info.items():
            size = len(self.block)
            try:
                info += [self.node(key, place), self.node(part, place)]
            except UserError:  # a note of the file's reader, such as a resolution as a fraction: no part of the picture
                del self.block[size:]
        data = value.tobytes()
        return ["P", value.mode, value.size, self.put(data), len(data), palette, info]


_WRITERS: dict[type, Callable[[_Packer, Any, str], Any]] = {
    int: _Packer._int,
    float: _Packer._float,
    complex: _Packer._complex,
    bytes: _Packer._bytes,
    bytearray: _Packer._bytes,
    list: _Packer._list,
    tuple: _Packer._tuple,
    dict: _Packer._dict,
    torch.Tensor: _Packer._tensor,
    np.ndarray: _Packer._array,
}


def _refused(value: Any, place: str) -> UserError:
    kind = type(value)
    remedy = "return tensors, arrays, numbers and strings, in tuples, lists or dicts; or leave out cache="
    if isinstance(value, torch.Tensor):
        remedy = "return a dense CPU tensor that requires no gradient; or leave out cache="
    elif isinstance(value, dict):
        remedy = "return dict(...) of it; or leave out cache="
    elif kind.__module__.startswith("PIL."):
        remedy = "return image.convert('RGB'), which is read from its file; or leave out cache="
    return UserError(
        f"the cache cannot keep {place}: it is a {kind.__module__.removeprefix('builtins')}.{kind.__qualname__}"
        + (f" of dtype {value.dtype}" if isinstance(value, np.ndarray) else ""),
        why="only what can be rebuilt exactly, and without running code that a file names, is kept",
        remedy=remedy,
    )


# ---- reading


def _node(node: Any, block: bytearray) -> Any:
    return _READERS[node[0]](node, block) if type(node) is list else node


def _read_tensor(node: Any, block: bytearray) -> torch.Tensor:
    _, name, shape, strides, start = node
    dtype, count = _DTYPES[name], math.prod(shape)
    if count == 0:
        return torch.empty_strided(shape, strides, dtype=dtype) if strides else torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(block, dtype=dtype, count=count, offset=start)
    return flat.view(shape) if strides is None else flat.as_strided(shape, strides)


def _read_array(node: Any, block: bytearray) -> np.ndarray[Any, Any]:
    _, name, shape, strides, start = node
    dtype = np.dtype(name)
    return np.ndarray(shape, dtype, block, start, strides) if math.prod(shape) else np.empty(shape, dtype)


def _read_scalar(node: Any, block: bytearray) -> Any:
    _, name, value = node
    if name in ("str", "bytes"):
        return np.str_(value) if name == "str" else np.bytes_(_node(value, block))
    return np.ndarray((), np.dtype(name), block, value)[()]


def _read_tv_tensor(node: Any, block: bytearray) -> Any:
    from torchvision import tv_tensors

    _, name, tensor, extra = node
    if name not in _TV_TENSORS:
        raise ValueError(f"no tv_tensor {name}")
    value = _read_tensor(tensor, block).as_subclass(getattr(tv_tensors, name))
    for key, part in _read_dict(extra, block).items():
        setattr(value, key, tv_tensors.BoundingBoxFormat[part] if key == "format" else part)
    return value


def _read_image(node: Any, block: bytearray) -> Any:
    from PIL import Image

    _, mode, size, start, length, palette, info = node
    image = Image.frombytes(mode, tuple(size), bytes(block[start : start + length]))
    if palette is not None:
        kind, colours = _node(palette, block)
        image.putpalette(colours, kind)
        image.load()
    image.info = _read_dict(info, block)
    return image


def _read_dict(node: Any, block: bytearray) -> dict[Any, Any]:
    return {_node(node[i], block): _node(node[i + 1], block) for i in range(1, len(node), 2)}


def _read_record(node: Any, block: bytearray) -> Any:
    kind = _MET[node[1]]
    values = [_node(part, block) for part in node[2:]]
    if node[0] == "N":
        return tuple.__new__(kind, values)
    value: Any = object.__new__(kind)
    for field, part in zip(fields(value), values, strict=True):
        object.__setattr__(value, field.name, part)
    return value


_READERS: dict[str, Callable[[Any, bytearray], Any]] = {
    "I": lambda node, block: int(node[1], 16),
    "F": lambda node, block: struct.unpack("<d", bytes.fromhex(node[1]))[0],
    "C": lambda node, block: complex(*struct.unpack("<dd", bytes.fromhex(node[1]))),
    "B": lambda node, block: bytes(block[node[1] : node[1] + node[2]]),
    "Y": lambda node, block: block[node[1] : node[1] + node[2]],
    "L": lambda node, block: [_node(part, block) for part in node[1:]],
    "U": lambda node, block: tuple(_node(part, block) for part in node[1:]),
    "D": _read_dict,
    "N": _read_record,
    "K": _read_record,
    "T": _read_tensor,
    "V": _read_tv_tensor,
    "A": _read_array,
    "S": _read_scalar,
    "P": _read_image,
}
