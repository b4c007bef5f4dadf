"""Collate functions: torch's own, bit for bit; padding that masks undo; batches that pieces add up to."""

import pickle
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import default_collate

from stoker.data.batch import num_rows, split
from stoker.data.collating import CollateError, collate, masked, pad, ragged
from stoker.errors import UserError

Point = namedtuple("Point", ["x", "y"])


@dataclass
class Text:
    tokens: Any
    label: Any
    tokens_mask: Any = None


def assert_same(found: Any, expected: Any) -> None:
    """Equal in structure, types, dtypes and bits."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.is_contiguous() and torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    elif isinstance(expected, Mapping | UserDict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif is_dataclass(expected):
        for f in fields(expected):
            assert_same(getattr(found, f.name), getattr(expected, f.name))
    else:
        assert found == expected


class Arena:
    """Hands out tensors, and knows them again."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.full(shape, 1, dtype=dtype)
        self.given.append(tensor.data_ptr())
        return tensor

    def holds(self, tree: Any) -> bool:
        if isinstance(tree, torch.Tensor):
            return tree.data_ptr() in self.given
        parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else []
        return all(map(self.holds, parts))


# ------------------------------------------------------------------ the default


def readonly(array: Any) -> Any:
    array.flags.writeable = False
    return array


SAMPLES: dict[str, list[Any]] = {
    "tensor and int": [(torch.randn(3, 2), i) for i in range(4)],
    "one sample": [(torch.randn(3), 1)],
    "numbers": [(1, 2.5, True, np.float32(1.5), np.int16(3)), (2, 3.5, False, np.float32(2.5), np.int16(4))],
    "int and float": [1, 2.5],
    "strings": [("a", b"b", torch.ones(1)), ("ü", b"", torch.ones(1))],
    "dict": [{"x": torch.ones(2), "y": 1, "s": "a"}, {"y": 2, "x": torch.zeros(2), "s": "b"}],
    "extra key": [{"x": 1}, {"x": 2, "y": 3}],
    "ordered": [OrderedDict(b=1, a=np.ones(2)), OrderedDict(b=1, a=np.zeros(2))],
    "user dict": [UserDict(a=1), UserDict(a=2)],
    "proxy": [MappingProxyType({"a": 1}), MappingProxyType({"a": 2})],
    "namedtuple": [Point(torch.ones(2), 1), Point(torch.zeros(2), 2)],
    "lists": [[1, 2], [3, 4]],
    "nested": [((torch.ones(2), {"k": [1.5, "s"]}), 1), ((torch.zeros(2), {"k": [2.5, "t"]}), 2)],
    "arrays": [(np.arange(6).reshape(2, 3), np.float64(1)), (np.ones((2, 3), dtype=np.int64), np.float64(2))],
    "array dtypes": [np.ones(2, dtype=d) for d in ("int64", "float32")],
    "half": [torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)],
    "dtypes": [torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.float64)],
    "strided": [torch.randn(4, 3).T, torch.randn(4, 3).T],
    "no elements": [torch.empty(0, 3), torch.empty(0, 3)],
    "scalars": [torch.tensor(1), torch.tensor(2)],
    "zero-dimensional arrays": [np.array(1), np.array(2)],
    "range": [range(3), range(1, 4)],
    "gradients": [torch.ones(2, requires_grad=True), torch.ones(2)],
}


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=list(SAMPLES))
def test_as_torch_does_it(samples: list[Any]) -> None:
    expected = default_collate(samples)
    assert_same(collate(samples), expected)
    arena = Arena()
    found = collate(samples, arena)
    assert_same(found, expected)
    assert arena.holds(found)
    assert (len(arena.given) > 0) == ("tensor" in repr(expected))


values = st.recursive(
    st.sampled_from(["tensor", "array", "int", "float", "bool", "str"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3),
    ),
    max_leaves=8,
)


def made(shape: Any, draw: np.random.Generator) -> Any:
    if isinstance(shape, dict):
        return {key: made(value, draw) for key, value in shape.items()}
    if isinstance(shape, list | tuple):
        return type(shape)(made(value, draw) for value in shape)
    number = int(draw.integers(100))
    return {
        "tensor": torch.full((2, 3), float(number)),
        "array": np.full((3,), number, dtype=np.int32),
        "int": number,
        "float": number / 3,
        "bool": number > 50,
        "str": str(number),
    }[shape]


@settings(max_examples=80)
@given(values, st.integers(1, 5), st.integers(0, 99))
def test_any_tree_as_torch_does_it(shape: Any, rows: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    samples = [made(shape, draw) for _ in range(rows)]
    expected = default_collate(samples)
    assert_same(collate(samples), expected)
    assert_same(collate(samples, Arena()), expected)


def test_what_torch_does_not_take() -> None:
    batch = collate([Text(torch.ones(2), 1), Text(torch.zeros(2), 2)])
    assert type(batch) is Text and batch.tokens.shape == (2, 2)
    assert batch.label.tolist() == [1, 2] and batch.tokens_mask is None
    assert collate([(1, None), (2, None)])[1] is None
    array = readonly(np.arange(3))
    assert collate([array, array[::-1].copy()[::-1]]).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert collate([(array[::-1], 0), (array.astype(">i8"), 1)])[0].tolist() == [[2, 1, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("samples", "rows", "text", "remedy"),
    [
        ([(torch.ones(3, 4, 4), 1), (torch.ones(3, 4, 4), 1), (torch.ones(3, 2, 4), 1)], (0, 2),
         "element 0 has shape (3, 4, 4) in sample 0 of the batch and shape (3, 2, 4) in sample 2", "fields={0: (1,)}"),
        ([{"ids": torch.ones(3).long()}, {"ids": torch.ones(2).long()}], (0, 1), "'ids' has shape (3,)", "pad()"),
        ([{"audio": torch.ones(3)}, {"audio": torch.ones(2)}], (0, 1), "'audio' has", "pad(fields=('audio',))"),
        ([{"ids": [1, 2]}, {"ids": [1]}], (0, 1), "'ids' has length 2 in", "pad()"),
        ([(1, None), (2, 3)], (0, 1), "element 1 is None in sample 0 of the batch and an int in", "same structure"),
        ([(1, torch.ones(1)), (2, None)], (0, 1), "element 1 is a tensor in", "same structure"),
        ([{"a": {"b": 1}}, {"a": {"c": 1}}], (0, 1), "sample 1 of the batch has no 'b' in 'a'", "same keys"),
        ([{"a": 1}, (1,)], (0, 1), "what the data set returns is a dict", "same structure"),
        ([(1, 2), (1, 2, 3)], (0, 1), "has length 2 in sample 0 of the batch and 3 in sample 1", "collate="),
        ([object(), object()], (0,), "returns is an object, which has no batched form", "return tensors"),
        ([{"s": np.array(["a"])}] * 2, (0,), "'s' cannot be stacked", "return tensors"),
        ([torch.ones(2, 2).to_sparse()] * 2, (0,), "cannot be stacked", "return tensors"),
        ([2**70, 1], (0,), "cannot be stacked", "return tensors"),
        ([Point(1, 2), (1, 2)], (0, 1), "is a Point in", "same structure"),
    ],
)  # fmt: skip
def test_what_does_not_fit(samples: list[Any], rows: tuple[int, ...], text: str, remedy: str) -> None:
    with pytest.raises(CollateError) as caught:
        collate(samples)
    assert caught.value.rows == rows
    assert text in caught.value.what
    assert remedy in caught.value.remedy


def test_samples_are_called_by_the_readers_names() -> None:
    with pytest.raises(CollateError) as caught:
        collate([torch.ones(2), torch.ones(3)])
    named = caught.value.named(lambda row: f"sample {[40, 7][row]} (a{row}.jpg)")
    assert "shape (2,) in sample 40 (a0.jpg) and shape (3,) in sample 7 (a1.jpg)" in named.what
    assert type(named) is UserError and named.remedy == caught.value.remedy
    with pytest.raises(UserError, match="no samples"):
        collate([])


# ------------------------------------------------------------------ padding

lengths_ = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=60)
@given(lengths_, st.sampled_from(["int64", "int32", "uint8", "uint16"]), st.integers(1, 8), st.integers(0, 9))
def test_the_mask_gives_the_samples_back(lengths: list[int], dtype: str, multiple_of: int, value: int) -> None:
    draw = np.random.default_rng(sum(lengths))
    arrays = [draw.integers(0, 99, n).astype(dtype) for n in lengths]
    expected = None
    for wrap in (lambda a: a, torch.from_numpy, lambda a: a.tolist()):
        samples = [{"ids": wrap(a), "n": len(a)} for a in arrays]
        batch = pad(value, multiple_of=multiple_of)(samples)
        ids, mask = batch["ids"], batch["ids_mask"]
        assert list(batch) == ["ids", "ids_mask", "n"]
        assert ids.shape == mask.shape == (len(lengths), -(-max(lengths) // multiple_of) * multiple_of)
        assert mask.dtype == torch.bool and mask.sum(1).tolist() == lengths
        assert [row[m].tolist() for row, m in zip(ids, mask, strict=True)] == [a.tolist() for a in arrays]
        assert (ids[~mask] == value).all()
        assert expected is None or torch.equal(ids.long(), expected)
        expected = ids.long()
    assert ids.dtype == torch.int64  # that of lists


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=5))
def test_several_dimensions_that_vary(shapes: list[tuple[int, int]]) -> None:
    images = [torch.randn(3, h, w) for h, w in shapes]
    image, mask, label = pad(-1, fields={0: (1, 2)}, multiple_of=2)([(image, 0) for image in images])
    height, width = max(h for h, _ in shapes), max(w for _, w in shapes)
    assert image.shape == (len(shapes), 3, height + height % 2, width)
    assert mask.shape == (len(shapes), height + height % 2, width) and label.shape == (len(shapes),)
    for row, (h, w) in enumerate(shapes):
        assert torch.equal(image[row, :, :h, :w], images[row])
        assert mask[row, :h, :w].all() and mask[row].sum() == h * w
    assert (image[~mask[:, None].expand_as(image)] == -1).all()


@settings(max_examples=40)
@given(st.lists(st.lists(st.lists(st.integers(-9, 9), max_size=4), min_size=1, max_size=3), min_size=1, max_size=4))
def test_lists_of_lists(documents: list[list[list[int]]]) -> None:
    batch = pad(7, allow_empty=True)([{"words": document} for document in documents])
    words, mask = batch["words"], batch["words_mask"]
    assert words.shape == mask.shape
    for row, document in enumerate(documents):
        assert mask[row].sum() == sum(map(len, document))
        for i, sentence in enumerate(document):
            assert words[row, i][mask[row, i]].tolist() == sentence
    assert (words[~mask] == 7).all()


def ids(*lengths: int) -> list[torch.Tensor]:
    return [torch.arange(1, n + 1) for n in lengths]


def shape_of(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.dim(), tree.dtype
    if isinstance(tree, dict):
        return {key: shape_of(value) for key, value in tree.items()}
    return [shape_of(value) for value in tree] if isinstance(tree, list) else type(tree)


@pytest.mark.parametrize("function", [pad(), pad(fields=("ids", "box")), ragged(), ragged("ids")])
def test_the_structure_does_not_depend_on_the_batch(function: Any) -> None:
    def sample(n: int) -> Any:
        return {"ids": torch.arange(n), "tags": [1] * 2, "box": torch.ones(2, 4), "w": 0.5, "labels": n}

    expected = shape_of(function([sample(3), sample(3)]))
    assert shape_of(function([sample(3)])) == expected
    assert shape_of(function([sample(3), sample(5), sample(1)])) == expected


def test_where_masks_go() -> None:
    a, b = ids(2, 3)
    batch = pad()([(a, 0.5, b, 1), (b, 0.5, a, 0)])
    assert [part.shape for part in batch] == [(2, 3), (2, 3), (2,), (2, 3), (2, 3), (2,)]
    assert pad()([a, b])[1].tolist() == [[True, True, False], [True, True, True]]
    text = pad()([Text(a, 1), Text(b, 0)])
    assert text.tokens_mask.tolist() == [[True, True, False], [True, True, True]]
    with pytest.raises(UserError, match="'x' has no place in a Point") as caught:
        pad()([Point(a, 1), Point(b, 0)])
    assert "x_mask" in caught.value.remedy
    deep = pad()([({"q": [1, 2]}, 0), ({"q": [1]}, 0)])
    assert deep[0]["q_mask"].sum() == 3


def test_a_mask_of_ones_own_is_kept() -> None:
    encoded = [{"input_ids": [5] * n, "attention_mask": [1] * n, "token_type_ids": [0] * n} for n in (2, 3)]
    batch = pad(1)(encoded)
    assert list(batch) == ["input_ids", "attention_mask", "token_type_ids"]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["input_ids"].tolist() == [[5, 5, 1], [5, 5, 5]]
    made = pad()([{"input_ids": [5] * n, "labels": 1} for n in (2, 3)])
    assert list(made) == ["input_ids", "attention_mask", "labels"] and made["attention_mask"].dtype == torch.bool
    known = pad()([(torch.ones(n, dtype=torch.bool), 1) for n in (2, 3)])
    assert known[0].tolist() == [[True, True, False], [True, True, True]] and len(known) == 2


def test_targets_are_padded_with_what_losses_leave_out() -> None:
    a, b = ids(2, 3)
    *_, target = pad()([(a, a), (b, b)])
    assert target.tolist() == [[1, 2, -100], [1, 2, 3]]
    batch = pad()([{"ids": a, "labels": a.to(torch.uint8)}, {"ids": b, "labels": b.to(torch.uint8)}])
    assert list(batch) == ["ids", "ids_mask", "labels"] and batch["labels"].tolist() == [[1, 2, -100], [1, 2, 3]]
    real = pad(fields=(0, -1))([(a, a.float()), (b, b.float())])
    assert len(real) == 3 and real[-1].isnan().tolist() == [[False, False, True], [False] * 3]
    assert pad(values={"y": 0})([{"x": 1, "y": a}, {"x": 1, "y": b}])["y"].tolist() == [[1, 2, 0], [1, 2, 3]]
    with pytest.raises(UserError, match="padding could not be told"):
        pad()([(a, a > 1), (b, b > 1)])


def test_options() -> None:
    a, b = ids(2, 5)
    assert pad(max_length=4, multiple_of=4)([a, b])[0].tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert pad(9, values={"u": 8})([{"t": a, "u": a}, {"t": b, "u": b}])["u"][0].tolist() == [1, 2, 8, 8, 8]
    padded, mask = pad(allow_empty=True)([[], [1]])
    assert padded.tolist() == [[0], [1]] and mask.tolist() == [[False], [True]]
    padded, mask = pad(allow_empty=True)([[], []])
    assert padded.shape == mask.shape == (2, 0) and padded.dtype == torch.int64
    again = pickle.loads(pickle.dumps(pad(3, fields={"x": (1, 2)}, values={"x": 1})))
    assert again == pad(3, fields={"x": (1, 2)}, values={"x": 1})
    arena = Arena()
    batch = pad()([{"ids": a, "w": [0.5] * 2, "y": 1}, {"ids": b, "w": [0.5], "y": 2}], arena)
    assert arena.holds(batch) and batch["w"].dtype == torch.float32
    assert batch["ids"][0].tolist() == [1, 2, 0, 0, 0] and batch["ids_mask"].sum() == 7


@pytest.mark.parametrize(
    ("function", "samples", "text", "remedy"),
    [
        (pad(), [[1], []], "of sample 1 of the batch has length 0", "allow_empty=True"),
        (pad(), [(torch.ones(2), [1]), (torch.ones(3), [1])], "element 0 has shape (2,)", "fields=(0, 1)"),
        (pad(fields="a"), [{"a": torch.ones(2, 3)}, {"a": torch.ones(2, 4)}], "'a' has shape", "{'a': (0, 1)}"),
        (pad(fields="bxo"), [{"box": torch.ones(1)}] * 2, "no such part (did you mean box?)", "they have 'box'"),
        (pad(values={"z": 1}), [{"box": [1]}] * 2, "told of 'z'", "they have 'box'"),
        (pad(fields={"a": 2}), [{"a": torch.ones(2)}] * 2, "dimension 2 of 'a' varies", ""),
        (pad(0.5), [[1], [1, 2]], "cannot hold the padding 0.5", ""),
        (pad(300), [(torch.ones(n).to(torch.uint8), 1) for n in (1, 2)], "cannot hold the padding 300", ""),
        (pad(), [[2**70], [1]], "fits no tensor", ""),
        (pad(), [{"a": [1, None]}, {"a": [1, 2]}], "element 1 of 'a' is None in", "same structure"),
        (pad(), [{"a": np.array(["x"])}] * 2, "'a' cannot be stacked", "return tensors"),
        (pad(fields="b"), [{"a": [[1], [1, 2]], "b": [1]}] * 2, "'a' is a list of unequal lists", "fields=('a', 'b')"),
        (ragged(), [[1], []], "of sample 1 of the batch has length 0", "ragged(allow_empty=True)"),
        (ragged(), [{"a": torch.ones(1)}, {"a": torch.ones(2)}], "'a' has shape", "ragged(fields=('a',))"),
        (ragged(), [{"a": [[1], [2]]}] * 2, "'a' varies in more than its first dimension", "pad()"),
    ],
)
def test_what_cannot_be_padded(function: Any, samples: list[Any], text: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        function(samples)
    assert text in caught.value.what
    assert remedy in caught.value.remedy


def test_arguments_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match="at least 1"):
        pad(multiple_of=0)
    with pytest.raises(UserError, match="no multiple") as caught:
        pad(max_length=10, multiple_of=8)
    assert caught.value.remedy == "max_length=16"


# ------------------------------------------------------------------ jagged tensors


@pytest.mark.parametrize("out", [None, Arena()])
def test_ragged(out: Any) -> None:
    tokens = ids(2, 5, 1)
    nested, labels = ragged()([(t, i) for i, t in enumerate(tokens)], out)
    assert nested.is_nested and nested.layout == torch.jagged and nested.shape[0] == 3
    assert all(torch.equal(a, b) for a, b in zip(nested.unbind(), tokens, strict=True))
    assert labels.tolist() == [0, 1, 2]
    embedded = nn.Embedding(9, 4)(nested)
    assert embedded.values().shape == (8, 4)
    boxes = ragged("boxes", allow_empty=True)([{"boxes": torch.ones(n, 4)} for n in (2, 0)])["boxes"]
    assert [part.shape for part in boxes.unbind()] == [(2, 4), (0, 4)]
    assert ragged()([[1, 2], [3]]).values().tolist() == [1, 2, 3]


# ------------------------------------------------------------------ losses over masks, batches in pieces


def test_masked() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = torch.tensor([[1.0, 2.0, torch.nan], [3.0, torch.inf, torch.nan]], requires_grad=True)
    total, count = masked(values, mask)
    total.backward()
    assert (total.item(), count.item()) == (6.0, 3)
    assert values.grad is not None and values.grad.tolist() == mask.float().tolist()
    deep = torch.ones(2, 3, 4)
    assert [part.item() for part in masked(deep, mask)] == [12.0, 12]
    assert [part.item() for part in masked(deep, mask.long())] == [12.0, 12]
    assert [part.item() for part in masked(deep, torch.zeros(2, 3, dtype=torch.bool))] == [0.0, 0]
    assert masked(torch.full((2, 3), 6e4, dtype=torch.float16), mask)[0].item() == pytest.approx(1.8e5, rel=1e-3)
    assert [part.item() for part in masked(mask, mask)] == [3, 3]
    for wrong in (torch.ones(3, 2), torch.tensor(True), torch.ones(2, 3, 1)):
        with pytest.raises(UserError, match="does not fit values of shape"):
            masked(values, wrong)


@settings(max_examples=40)
@given(lengths_, st.integers(1, 7), st.sampled_from(["list", "dict", "jagged", "dataclass"]))
def test_pieces_add_up_to_the_whole(lengths: list[int], microbatch: int, kind: str) -> None:
    draw = torch.Generator().manual_seed(len(lengths))
    tokens = [torch.randint(0, 50, (n,), generator=draw) for n in lengths]
    weight = torch.randn(50, generator=draw, dtype=torch.float64, requires_grad=True)
    samples = {
        "list": [(t, 1) for t in tokens],
        "dict": [{"tokens": t, "name": "x", "y": 1} for t in tokens],
        "jagged": [{"tokens": t, "y": 1} for t in tokens],
        "dataclass": [Text(t, 1) for t in tokens],
    }[kind]
    batch = (ragged() if kind == "jagged" else pad())(samples)

    def loss(part: Any) -> tuple[Any, Any]:
        if kind == "jagged":
            assert part["tokens"].is_nested and part["tokens"].shape[0] == len(part["y"])
            return weight[part["tokens"].values()].sum(), torch.tensor(part["tokens"].values().numel())
        ids_, mask = {
            "list": lambda: part[:2],
            "dict": lambda: (part["tokens"], part["tokens_mask"]),
            "dataclass": lambda: (part.tokens, part.tokens_mask),
        }[kind]()
        return masked(weight[ids_], mask)

    whole, count = loss(batch)
    pieces = split(batch, microbatch)
    assert num_rows(batch) == len(lengths) and sum(num_rows(piece) or 0 for piece in pieces) == len(lengths)
    assert max(num_rows(piece) or 0 for piece in pieces) <= microbatch
    found = [loss(piece) for piece in pieces]
    assert sum(n for _, n in found) == count == sum(lengths)
    torch.testing.assert_close(sum(total for total, _ in found), whole, rtol=1e-12, atol=1e-12)


def test_lists_of_one_entry_per_sample_are_cut() -> None:
    """As torchvision's detection models take them: images and dicts of boxes, each of another size."""
    for rows in (2, 3, 4):  # 3 is also the number of channels
        images = [torch.full((3, 4 + i, 5), float(i)) for i in range(rows)]
        targets = tuple({"boxes": torch.ones(i + 1, 4), "id": torch.tensor(i)} for i in range(rows))
        assert num_rows((images, targets)) == rows
        pieces = split((images, targets), 1)
        assert len(pieces) == rows and all(type(piece) is tuple for piece in pieces)
        for i, (image, target) in enumerate(pieces):
            assert len(image) == len(target) == 1
            assert image[0] is images[i] and target[0] is targets[i]
    samples = [{"x": torch.ones(2 + i), "y": i} for i in range(4)]
    assert [len(piece) for piece in split(samples, 3)] == [3, 1]
    mixed = {"images": [torch.ones(3, i + 1) for i in range(4)], "labels": torch.arange(4)}
    assert [len(piece["images"]) for piece in split(mixed, 2)] == [2, 2] and num_rows(mixed) == 4


def test_columns_in_lists_stay_columns() -> None:
    x, y = torch.arange(4.0).reshape(2, 2), torch.arange(2)
    assert [torch.equal(piece[0], x[i : i + 1]) for i, piece in enumerate(split([x, y], 1))] == [True, True]
    nested = [[x, y], (x, y), y]
    assert [num_rows(piece) for piece in split(nested, 1)] == [1, 1]
    assert all(piece[0][0].shape == (1, 2) and type(piece[1]) is tuple for piece in split(nested, 1))
    named = split([x, ("a", "b"), None], 1)
    assert [piece[1] for piece in named] == [("a",), ("b",)] and named[0][2] is None
    assert [piece.x.shape[0] for piece in split(Point(x, y), 1)] == [1, 1]
    assert num_rows([3, x]) == 2 and num_rows([3, "a"]) is None and num_rows([torch.tensor(1)]) is None
