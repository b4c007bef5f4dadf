"""Samples come back as they were, to the bit and the type, or are refused by name."""

import collections
import dataclasses
import enum
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stoker.data import samplecodec
from stoker.data.samplecodec import decode, encode
from stoker.errors import UserError


class Pair(NamedTuple):
    """A named tuple."""

    image: Any
    label: int


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """A dataclass."""

    image: Any
    label: int = 0


def again(value: Any) -> Any:
    """There and back, over bytes that nobody else holds."""
    header, payload = encode(value)
    return decode(str(header), bytearray(bytes(payload)))


def bits(tensor: torch.Tensor) -> bytes:
    """Contents, whatever the dtype."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.booleans()), inner)
        | st.builds(Pair, inner, st.integers())
        | st.builds(Item, inner, st.integers())
    ),
    max_leaves=10,
)


@given(nested)
def test_plain_values(value: Any) -> None:
    assert repr(again(value)) == repr(value)  # tells -0.0 from 0.0, 1 from True, tuples from lists


@pytest.mark.parametrize("word", [0x7FF8000000000001, 0xFFF8000000000000, 0x7FF0000000000000, 1, 0x8000000000000000])
def test_floats_to_the_bit(word: int) -> None:
    value = struct.unpack("<d", struct.pack("<Q", word))[0]
    assert struct.pack("<d", again(value)) == struct.pack("<d", value)


@pytest.mark.parametrize("value", [-(1 << 63) - 1, 1 << 63, "\ud800", "\0", "NaN", float("inf"), {1: {}}])
def test_odd_values(value: Any) -> None:
    assert again([10**5000]) == [10**5000]
    assert again(value) == value
    assert type(again(value)) is type(value)


@pytest.mark.parametrize("name", sorted(samplecodec._DTYPES))
def test_every_dtype(name: str) -> None:
    dtype = getattr(torch, name)
    raw = torch.arange(6 * dtype.itemsize, dtype=torch.uint8)
    tensor = (raw % 2 if dtype is torch.bool else raw).view(dtype).view(2, 3)
    for case in (tensor, tensor[1, 2], tensor[:0], tensor.t(), tensor[:, ::2]):
        back = again((case,))[0]
        assert (back.dtype, back.shape, bits(back)) == (case.dtype, case.shape, bits(case))


@given(st.permutations(range(4)), st.sampled_from([(1, 2, 3, 4), (3, 1, 1, 2), (2, 2, 2, 2)]))
def test_the_order_in_memory(order: list[int], shape: tuple[int, ...]) -> None:
    """Channels last, say: kernels for it may round otherwise."""
    tensor = torch.arange(math.prod(shape), dtype=torch.int16).view(shape).permute(order)
    back = again(tensor)
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)
    array = tensor.numpy()
    assert again(array).strides == array.strides
    assert np.array_equal(again(array), array)


def test_views() -> None:
    base = torch.arange(24.0).view(4, 6)
    for view in (base[1:, 2:4], base[0].expand(3, 6), base.as_strided((2, 2), (0, 3)), base[::2].t()):
        assert torch.equal(again(view), view)
    conjugate = torch.tensor([1 + 2j]).conj()
    assert torch.equal(again(conjugate), conjugate)
    assert len(encode(torch.zeros(10_000)[:2])[1]) <= 64  # what is seen of it, not what it was cut from


ARRAYS = [
    np.arange(6).reshape(2, 3)[::-1],
    np.array([1, 2], ">i4"),
    np.array(["a", "bc"]),
    np.array([b"a", b"bc"]),
    np.array("2020-01-01", "datetime64[D]"),
    np.array([True]),
    np.zeros((0, 3), np.float16),
    np.longdouble([1]) / 3,
    np.array(5),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: array.dtype.str)
def test_arrays(array: Any) -> None:
    back = again([array])[0]
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert back.flags.writeable
    scalar = array.reshape(-1)[0] if array.size else np.float16(1)
    assert type(again(scalar)) is type(scalar)
    assert again(scalar) == scalar
    assert repr(again(np.str_(""))) == "np.str_('')"


def test_samples_may_be_written_to() -> None:
    header, payload = encode((torch.zeros(3), np.zeros(3)))
    first, second = (decode(header, bytearray(payload)) for _ in range(2))
    first[0].fill_(1)
    first[1].fill(1)
    assert second[0].sum() == second[1].sum() == 0


def test_tv_tensors() -> None:
    tv = pytest.importorskip("torchvision.tv_tensors")
    image = tv.Image(torch.arange(12, dtype=torch.uint8).view(2, 2, 3).permute(2, 0, 1))
    boxes = tv.BoundingBoxes([[1, 2, 3, 4]], format="CXCYWH", canvas_size=(5, 6), clamping_mode=None)
    for value in (image, tv.Mask(torch.ones(1, 2, dtype=torch.bool)), tv.Video(torch.zeros(1, 3, 2, 2)), boxes):
        back = again({"x": value})["x"]
        assert type(back) is type(value)
        assert vars(back) == vars(value)
        assert back.stride() == value.stride()
        assert torch.equal(back, value)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "I;16"])
def test_pictures(mode: str) -> None:
    image_of = pytest.importorskip("PIL.Image").new
    image = image_of(mode, (5, 3))
    image.frombytes(bytes(range(80))[: len(image.tobytes())])
    if mode == "P":
        image.putpalette(bytes(range(12)), "RGBA")
    image.info = {"dpi": (72, 72), "icc_profile": b"\0\1", "unkept": object()}
    back = again((image, 1))[0]
    assert type(back) is type(image)
    assert back.info == {"dpi": (72, 72), "icc_profile": b"\0\1"}
    back.info = image.info
    assert back == image
    if mode == "P":
        assert back.convert("RGBA") == image.convert("RGBA")


class Colour(enum.IntEnum):
    """A subclass of int."""

    RED = 1


def test_what_cannot_be_kept(shared_data: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    path = next((shared_data / "flowers700" / "val").rglob("*.jpg"))
    loose = Item(1)
    with image.open(path) as opened:
        opened.load()
    cases: list[tuple[Any, str, str]] = [
        (({"a": [object()]},), "flower 3[0]['a'][0]", "object"),
        ([collections.OrderedDict(a=1)], "flower 3[0]", "dict(...)"),
        (Pair(Colour.RED, 1), "flower 3.image", "Colour"),
        ((torch.zeros(1, requires_grad=True),), "flower 3[0]", "gradient"),
        ((torch.eye(2).to_sparse(),), "flower 3[0]", "dense"),
        ((torch.nn.Parameter(torch.zeros(1)),), "flower 3[0]", "Parameter"),
        (np.array([object()]), "flower 3", "dtype object"),
        (np.zeros(1, [("a", "i4")]), "flower 3", "dtype"),
        (np.ma.masked_array([1], [True]), "flower 3", "MaskedArray"),
        ((lambda: 1,), "flower 3[0]", "function"),
        (opened, "flower 3", "convert('RGB')"),
        ({loose: 1, "x": {1, 2}}, "flower 3['x']", "set"),
    ]
    for value, place, word in cases:
        with pytest.raises(UserError) as caught:
            encode(value, "flower 3")
        assert f"cannot keep {place}: " in caught.value.what
        assert word in str(caught.value)
    tensor = torch.zeros(1)
    tensor.note = "x"  # type: ignore[attr-defined]
    with pytest.raises(UserError):
        encode(tensor)


def test_only_types_that_were_met_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    header, payload = encode(Pair(1, 2))
    monkeypatch.setattr(samplecodec, "_MET", {})
    with pytest.raises(KeyError):
        decode(header, payload)


@given(st.binary(max_size=200), st.integers(0, 60), st.integers(0, 255))
def test_foreign_bytes_are_an_error_or_a_value(payload: bytes, place: int, byte: int) -> None:
    """Whatever a file says, nothing else happens."""
    header = bytearray(encode((torch.zeros(3), np.zeros(2), b"x", 1 << 70))[0].encode())
    header[place % len(header)] = byte
    try:
        decode(header.decode("latin-1"), bytearray(payload))
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, MemoryError, AttributeError):
        return
