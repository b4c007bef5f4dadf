"""A state tree through JSON and safetensors and back: the same tree, or a message that names the place."""

import collections
import enum
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stoker.checkpoint.store import read
from stoker.checkpoint.tree import flatten, unflatten
from stoker.errors import UserError
from tests.checkpoint.test_store import save

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (3,), (2, 0, 3), (2, 3)]


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    """Any type and shape; also every second element of a larger one, transposed ones, expanded ones."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
    bytes_ = math.prod(shape) * dtype.itemsize
    raw = torch.tensor(list(draw(st.binary(min_size=bytes_, max_size=bytes_))), dtype=torch.uint8)
    if dtype is torch.bool:
        raw = raw % 2
    tensor = raw.view(dtype).reshape(shape) if bytes_ else torch.empty(shape, dtype=dtype)
    how = draw(st.sampled_from(["plain", "strided", "transposed", "expanded"]))
    if how == "strided" and tensor.dim():
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if how == "transposed" and tensor.dim() == 2:
        return tensor.t()
    if how == "expanded":
        return tensor.expand(2, *tensor.shape)
    return tensor


keys = st.one_of(
    st.text(max_size=3), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text(max_size=2))
)
tricky = st.sampled_from(["$float", "$tensor", "$tuple", "$dict", "$counter", "a/b", "a", "b", "1", "key0", ""])
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), tricky, st.floats().map(np.float64)
)
leaves = st.one_of(scalars, tensors())
counters = st.dictionaries(
    st.one_of(st.integers(), st.text(max_size=2)), st.one_of(st.integers(), st.floats()), max_size=3
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(keys, tricky), inner, max_size=4),
        counters.map(collections.Counter),
    ),
    max_leaves=12,
)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes of a tensor's elements."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).flatten().view(torch.uint8)


def same(a: Any, b: Any) -> bool:
    """Equal in type, shape, structure, order and bits; nan is nan."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and raw(a).equal(raw(b))
    if isinstance(a, np.generic):
        a = a.item()
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=False)
        return len(a) == len(b) and all(same(k, m) and same(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(trees)
@example(collections.Counter({1: math.inf, 2: math.nan}))
@example({"$tensor": "x", "y": [{"$tuple": [1]}]})
@example({(1, "a"): {None: {True: -0.0}}})
@example(torch.tensor(1.0))
def test_round_trip(tree: Any) -> None:
    encoded, found = flatten(tree)
    text = json.dumps(encoded, allow_nan=False)
    assert same(tree, unflatten(json.loads(text), found))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(tree=trees)
def test_round_trip_through_a_checkpoint(tmp_path: Path, tree: Any) -> None:
    path = save(tmp_path / "checkpoints", 1, state={"tree": tree})
    assert same(tree, read(path).state["tree"])


def test_one_memory_in_many_places(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    tree = {"whole": base, "again": base, "part": base[2:4], "view": base.reshape(2, 3).t()}
    assert same(tree, read(save(tmp_path, 1, state={"tree": tree})).state["tree"])


@pytest.mark.parametrize(
    "tree",
    [
        {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}},
        {1: torch.tensor(1), "1": torch.tensor(2)},
        {"a": [torch.tensor(1)], "a/0": torch.tensor(2)},
    ],
)
def test_places_that_spell_alike(tree: Any) -> None:
    encoded, found = flatten(tree)
    assert same(tree, unflatten(encoded, found))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3).T,
        np.arange(6)[::-1],
        np.array(3.5),
        np.zeros((0, 2), np.float16),
    ],
)
def test_arrays_come_back_as_tensors(tmp_path: Path, array: Any) -> None:
    back = read(save(tmp_path, 1, state={"array": array})).state["array"]
    assert same(torch.from_numpy(array.copy()), back)


def test_a_gradient_is_left_behind(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    _, found = flatten({"w": weight, "y": weight * 2})
    assert not any(tensor.requires_grad for tensor in found.values())


class Colour(enum.Enum):
    """Neither data nor a tensor."""

    RED = 1


@pytest.mark.parametrize(
    "stranger",
    [object(), len, lambda: 0, torch.nn.Linear(1, 1), Colour.RED, {1, 2}, b"bytes", 1j, torch.float32, Path("x")],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("place", ["carry", "carry/hidden/2", "carry/7"])
def test_what_is_no_data_is_refused_by_place(stranger: Any, place: str) -> None:
    tree = {"carry": stranger, "carry/hidden/2": {"hidden": [0, (), stranger]}, "carry/7": {7: stranger}}
    with pytest.raises(UserError, match=f"cannot save {place}: a {type(stranger).__name__} is neither data nor"):
        flatten(tree if place == "carry" else {"carry": tree[place]})


@pytest.mark.parametrize(
    "array", [np.array([object()]), np.array(["text"]), np.array(["2020-01-01"], "datetime64[D]")], ids=["O", "U", "M"]
)
def test_an_array_that_is_no_tensor_is_refused_by_place(array: Any) -> None:
    with pytest.raises(UserError, match="cannot save carry/x: "):
        flatten({"carry": {"x": array}})


@pytest.mark.parametrize("layout", ["sparse", "meta"])
def test_a_tensor_without_bytes_is_refused_by_place(tmp_path: Path, layout: str) -> None:
    tensor = torch.eye(2).to_sparse() if layout == "sparse" else torch.empty(2, device="meta")
    with pytest.raises(UserError, match="carry/x"):
        save(tmp_path, 1, state={"carry": {"x": tensor}})
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("step-")]


def test_a_named_tuple_keeps_its_fields_or_is_refused() -> None:
    """A carry that comes back as another type than it was would fail only after a resume."""
    State = collections.namedtuple("State", "hidden cell")
    tree = {"carry": State(torch.ones(1), torch.zeros(1))}
    try:
        encoded, found = flatten(tree)
    except UserError as error:
        assert "carry" in str(error)
    else:
        assert unflatten(encoded, found)["carry"].hidden.item() == 1


def test_names_that_safetensors_reserves(tmp_path: Path) -> None:
    tree = {"__metadata__": torch.tensor(1.0), "": torch.tensor(2.0)}
    encoded, found = flatten(tree)
    save_file({f"x{name}": value for name, value in found.items()}, tmp_path / "t")
    assert len(load_file(tmp_path / "t")) == 2
    assert same(tree, read(save(tmp_path / "c", 1, state=tree)).state)
    assert same(tree, unflatten(encoded, found))
