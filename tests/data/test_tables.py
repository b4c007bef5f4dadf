"""Tables: what is read, what is learnt from the training rows alone, and what every bad file is told."""

import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stoker.data
from stoker.data.kept import fitted_of, restoring, states_of
from stoker.data.table_encoder import TableEncoder
from stoker.data.tables import Table
from stoker.errors import UserError

ADULT = [
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race",
    "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income",
]  # fmt: skip


def written(folder: Path, text: str | bytes, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(call: Any, *said: str) -> UserError:
    """What the user is told; it must hold each of `said`, and a remedy."""
    with pytest.raises(UserError) as caught:
        call()
    for part in said:
        assert part in str(caught.value), str(caught.value)
    assert caught.value.remedy
    return caught.value


def adult(shared_data: Path, part: str = "train", **options: Any) -> Table:
    options = {"convert": {"income": lambda label: label.rstrip(".")}} | options
    return stoker.data.table(shared_data / "adult" / f"adult-{part}.csv", target="income", names=ADULT, **options)


# ------------------------------------------------------------------ reading


def test_header_types_and_samples(tmp_path: Path) -> None:
    path = written(tmp_path, "age,job,pay\n20,cook,low\n30,clerk,high\n40,cook,low\n")
    rows = stoker.data.table(path, target="pay")
    assert rows.kinds == {"age": "number", "job": "category", "pay": "category"}
    assert (len(rows), rows["job"], rows.names) == (3, ["cook", "clerk", "cook"], ["age", "job", "pay"])
    encode = rows.fit()
    encoded = encode(rows)
    numbers, categories, target = encoded[1]
    assert (numbers.dtype, categories.dtype, target.dtype) == (torch.float32, torch.int64, torch.int64)
    assert (numbers.tolist(), categories.tolist(), target.item()) == ([0.0], [0], 0)
    assert [round(float(sample[0]), 4) for sample in encoded] == [-1.2247, 0.0, 1.2247]
    assert (encode.classes, encode.category_sizes, encode.num_numbers, encode.num_classes) == (
        ("high", "low"),
        [2],
        1,
        2,
    )
    assert encoded.classes == ["high", "low"] and encoded.targets.tolist() == [1, 0, 1]
    assert encoded[-1][2] == encoded[2][2] and fitted_of(encoded) is encode
    with pytest.raises(IndexError):
        encoded[3]


def test_what_a_file_may_look_like(tmp_path: Path) -> None:
    """A byte order mark, CRLF, spaces, blank lines, quoted delimiters, quotes and newlines, no newline at the end."""
    text = '\ufeffname , n\r\n\r\n "Straße, 1",1\r\n   \r\n"two\r\nlines", 2\r\n"a ""b""",3\r\n'
    text += ' ?, +4 \r\n\r\n\r\n5" disk,5'
    rows = stoker.data.table(written(tmp_path, text))
    assert rows["name"] == ["Straße, 1", "two\r\nlines", 'a "b"', "?", '5" disk']
    assert rows["n"] == ["1", "2", "3", "+4", "5"]
    assert [rows.file_of(i).rpartition(" ")[2] for i in range(5)] == ["3", "5", "7", "8", "11"]


@pytest.mark.parametrize("name, delimiter", [("a.tsv", None), ("a.TSV", None), ("a.txt", "\t"), ("a.csv", "\t")])
def test_delimiter(tmp_path: Path, name: str, delimiter: str | None) -> None:
    path = written(tmp_path, "a\tb\n1,5\t\n\t2\n", name)
    rows = stoker.data.table(path, delimiter=delimiter)
    assert (rows["a"], rows["b"]) == (["1,5", ""], ["", "2"])


def test_several_files_are_one_table(tmp_path: Path) -> None:
    first = written(tmp_path, "x,y\n1,a\n2,b\n", "1.csv")
    second = written(tmp_path, "x,y\n\n3,b\n4,c\n", "2.csv")
    rows = stoker.data.table([first, str(second)], target="y")
    assert (rows["x"], rows["y"]) == (["1", "2", "3", "4"], ["a", "b", "b", "c"])
    assert rows.file_of(1) == f"{first}, row 3" and rows.file_of(2) == f"{second}, row 3"
    other = written(tmp_path, "x,z\n1,a\n", "3.csv")
    refused(lambda: len(stoker.data.table([first, other])), "3.csv", "1.csv", "'z'")


def test_columns_in_memory() -> None:
    columns = {"x": [1, None, 3], "y": np.array([0.5, math.nan, 2.0]), "z": torch.tensor([True, False, True])}
    rows = stoker.data.table(columns, target="z")
    assert rows.kinds == {"x": "number", "y": "number", "z": "category"}
    numbers, target = rows.fit()(rows).columns() or ()
    assert numbers[:, 2].tolist() == numbers[:, 3].tolist() == [0, 1, 0]  # two indicators of a missing value
    assert target.tolist() == [1, 0, 1] and rows.file_of(2) == "the table, row 2"
    refused(lambda: len(stoker.data.table({"x": [1], "y": [1, 2]})), "'x': 1", "'y': 2")
    refused(lambda: len(stoker.data.table({"x": np.zeros((2, 2))})), "'x'", "2 dimensions")


def test_a_data_frame_is_columns_in_memory() -> None:
    pandas = pytest.importorskip("pandas")
    words = pandas.Series([pandas.NA, "a ", "b"], dtype="object")
    rows = stoker.data.table(pandas.DataFrame({"x": pandas.array([1, None, 3], dtype="Int64"), "w": words}))
    assert rows["w"] == ["", "a", "b"] and rows.kinds == {"x": "number", "w": "category"}
    assert (rows.fit()(rows).columns() or ())[0].tolist() == [[-1, 0], [0, 1], [1, 0]]


def test_parquet_gives_what_the_columns_give(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "big": [2**53 + 1, -1, 0], "gap": [1, None, 3], "float": [0.5, math.nan, None],
        "word": ["a", None, "ü"], "flag": [True, False, None], "y": ["n", "y", "n"],
    }  # fmt: skip
    table = pa.table(columns | {"coded": pa.array(["p", "q", "p"]).dictionary_encode(), "deep": [[1], [2], [3]]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    rows = stoker.data.table(tmp_path / "rows.parquet", target="y", types={"deep": "ignore"})
    assert rows["big"] == [2**53 + 1, -1, 0] and rows["word"] == ["a", "", "ü"] and rows["coded"] == ["p", "q", "p"]
    assert rows.kinds["gap"] == rows.kinds["float"] == "number" and rows.kinds["flag"] == "category"
    assert rows.file_of(2).endswith("rows.parquet, row 3")
    same = stoker.data.table({name: rows[name] for name in rows.names}, target="y")
    for left, right in zip(rows.fit()(rows).columns() or (), same.fit()(same).columns() or (), strict=True):
        assert torch.equal(left, right)
    refused(lambda: len(stoker.data.table(tmp_path / "rows.parquet")), "'deep'", "list", '"ignore"')


def test_parquet_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, b"PAR1 and then nothing PAR1", "rows.parquet")
    pytest.importorskip("pyarrow.parquet")
    refused(lambda: len(stoker.data.table(path)), "rows.parquet", "no Parquet file")
    refused(lambda: len(stoker.data.table(written(tmp_path, b"", "empty.parquet"))), "empty.parquet")
    refused(
        lambda: len(stoker.data.table(written(tmp_path, b"PAR1\x15", "p.csv"), encoding="utf-16")), "row 1", ".parquet"
    )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(lambda: len(stoker.data.table(path)), "pyarrow").remedy == "pip install 'stoker[parquet]'"


values = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@settings(max_examples=60)
@given(st.lists(st.tuples(values, values), min_size=1, max_size=20), st.sampled_from([",", ";", "\t"]))
def test_what_the_csv_module_writes_is_read(
    tmp_path_factory: Any, cells: list[tuple[str, str]], delimiter: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([("a", "b"), *cells])
    rows = stoker.data.table(path, delimiter=delimiter)
    assert list(zip(rows["a"], rows["b"], strict=True)) == [(a.strip(), b.strip()) for a, b in cells]


# ------------------------------------------------------------------ numbers, categories, targets


def number(*texts: str, **options: Any) -> tuple[Any, TableEncoder]:
    rows = stoker.data.table({"x": list(texts)}, **options)
    encode = rows.fit()
    return (encode(rows).columns() or ())[0], encode


def test_spellings_of_numbers() -> None:
    texts = ["1e5", " 12 ", "-0", "+3", ".5", "7.", "16777217", "16777219", "1E-3"]
    found, encode = number(*texts)
    wanted = np.array([float(text) for text in texts])
    assert (encode.numbers[0].mean, encode.numbers[0].std) == (
        pytest.approx(wanted.mean()),
        pytest.approx(wanted.std()),
    )
    assert np.allclose(found[:, 0], (wanted - wanted.mean()) / wanted.std())


def test_integers_beyond_float32_are_told_apart_by_the_mean() -> None:
    found, _ = number("16777217", "16777218", "16777219")
    assert found[:, 0].tolist() == pytest.approx([-1.2247449, 0, 1.2247449])


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1_000", "1e999", "0x10", "12 000", "1,5", "١", "--1", "e5"])
def test_what_is_no_number(text: str) -> None:
    rows = stoker.data.table({"x": ["1", "2", text]}, types={"x": "number"})
    refused(rows.fit, "the table, row 2", "'x'", repr(text), "missing=")


def test_missing_numbers_and_constants() -> None:
    found, encode = number("1", "?", "3", "")
    assert found.tolist() == [[-1, 0], [0, 1], [1, 0], [0, 1]] and encode.num_numbers == 2
    assert number("0.1", "0.1", "0.1")[0].tolist() == [[0], [0], [0]]
    assert number("1", "nan", "3", missing=("nan",))[0].tolist() == [[-1, 0], [0, 1], [1, 0]]
    assert number("-1e300", "1e300")[0].tolist() == [[-1], [1]]
    assert number("0", "1e-300")[0].tolist() == [[-1], [1]]


def test_nothing_infinite_comes_out_and_only_fitted_rows_count() -> None:
    rows = stoker.data.table({"x": ["0", "2", "1e300"]})
    encode = rows.subset([0, 1]).fit()
    assert (encode.numbers[0].mean, encode.numbers[0].std) == (1, 1)
    refused(lambda: len(encode(rows)), "row 2", "'x'", "1e300", "float32")
    target = stoker.data.table({"x": [1, 2], "y": ["1e30", "1e39"]}, target="y")
    refused(target.fit, "row 1", "'y'", "1e39")


def test_a_value_missing_where_training_rows_missed_none() -> None:
    rows = stoker.data.table({"x": ["1", "3", ""]})
    encode = rows.subset([0, 1]).fit()
    refused(lambda: len(encode(rows)), "row 2", "'x'", "no value")
    assert (rows.subset([0, 1]).fit(unknown="code")(rows).columns() or ())[0].tolist() == [[-1], [1], [0]]


def test_missing_is_a_category_of_its_own() -> None:
    rows = stoker.data.table({"x": ["b", "?", "a", "", "b"]})
    encode = rows.fit()
    assert encode.categories[0].values == ("a", "b", None) and encode.category_sizes == [3]
    assert (encode(rows).columns() or ())[0].T.tolist() == [[1, 2, 0, 2, 1]]
    refused(lambda: len(rows.subset([0, 2]).fit()(rows)), "row 1", "'?'")


def test_unknown_categories(tmp_path: Path) -> None:
    rows = stoker.data.table(written(tmp_path, "x,y\nred,1\nblue,2\n"), types={"y": "ignore"})
    new = stoker.data.table(written(tmp_path, "x\nblue\nread\n", "new.csv"))
    refused(lambda: len(rows.fit()(new)), "new.csv, row 3", "'x'", "'read'", "did you mean red?", 'unknown="code"')
    encode = rows.fit(unknown="code")
    assert encode.category_sizes == [3] and (encode(new).columns() or ())[0].T.tolist() == [[1, 0]]
    wide = rows.fit(unknown="code", one_hot=True)
    assert wide.num_features == 2 and (wide(new).columns() or ())[0].tolist() == [[1, 0], [0, 0]]
    refused(lambda: rows.fit(unknown="codes"), "did you mean code?")  # type: ignore[arg-type]


def test_one_hot_features_stand_side_by_side() -> None:
    rows = stoker.data.table({"n": [1, 3, None], "c": ["u", "v", "u"], "y": ["a", "b", "a"]}, target="y")
    encode = rows.fit(one_hot=True)
    features, target = encode(rows)[0]
    assert encode.num_features == len(features) == 4 and features.dtype == torch.float32 and target == 0
    assert (encode(rows).columns() or ())[0].tolist() == [[-1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0]]
    assert refused(lambda: rows.fit().num_features, "one-hot").remedy == "fit(one_hot=True)"


def test_class_labels_that_are_numbers_keep_their_order() -> None:
    labels = ["10", "9", "0", "2", "1"]
    rows = stoker.data.table({"x": range(5), "y": labels}, target="y", types={"y": "category"})
    assert rows.fit().classes == ("0", "1", "2", "9", "10")
    asnumber = stoker.data.table({"x": range(5), "y": labels}, target="y")
    encoded = asnumber.fit()(asnumber)
    assert encoded[0][-1].dtype == torch.float32 and encoded.targets.tolist() == [10, 9, 0, 2, 1]
    refused(lambda: asnumber.fit().num_classes, "'y'", '"category"')
    assert not hasattr(encoded, "classes")


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    rows = stoker.data.table(written(tmp_path, "x,y\n1,a\n2,\n3,b\n4,?\n"), target="y")
    refused(rows.fit, "rows.csv, row 3", "'y'", "1 more", "where(lambda row:")
    there = rows.where(lambda row: row["y"] not in ["", "?"])
    assert there.fit().classes == ("a", "b") and there.file_of(1).endswith("row 4")
    refused(lambda: len(there.fit()(rows)), "row 3", "missing")
    refused(rows.subset([0]).fit, "'a'", "1 row", "nothing to tell apart")
    new = stoker.data.table({"x": [1, 2], "y": ["A", "b"]}, target="y")
    refused(lambda: len(there.fit()(new)), "the table, row 0", "'A'", "str.lower")
    numbers = stoker.data.table({"x": [1, 2], "y": [0.5, math.nan]}, target="y")
    remedy = refused(numbers.fit, "row 1", "'y'").remedy
    assert len(numbers.where(eval(remedy.partition("where(")[2][:-1])).fit()(numbers.subset([0]))) == 1


def test_a_table_without_a_target_has_samples_without_one() -> None:
    rows = stoker.data.table({"x": [1, 2], "y": ["a", "b"]}, target="y")
    new = rows.fit()(stoker.data.table({"x": [3, 4]}))
    assert [len(sample) for sample in new] == [1, 1] and not hasattr(new, "targets")
    refused(lambda: len(rows.fit()(stoker.data.table({"y": ["a"]}, target="y"))), "no column 'x'")
    other = stoker.data.table({"x": [1], "z": ["a"]}, target="z")
    refused(lambda: len(rows.fit()(other)), "'z'", "'y'")


# ------------------------------------------------------------------ kinds


def test_kinds_are_inferred() -> None:
    columns = {
        "text": [f"message number {i} for you" for i in range(10)], "word": [f"id{i}" for i in range(10)],
        "phrase": ["a phrase of five words"] * 10, "number": [str(i) for i in range(9)] + ["?"],
    }  # fmt: skip
    kinds = {"text": "text", "word": "category", "phrase": "category", "number": "number"}
    assert stoker.data.table(columns).kinds == kinds
    assert stoker.data.table(columns, types={"word": "ignore"}).kinds == kinds | {"word": "ignore"}


def test_a_missing_value_of_another_spelling_is_asked_about() -> None:
    rows = stoker.data.table({"x": ["1", "2", "NA", "4"]})
    error = refused(lambda: rows.kinds, "the table, row 2", "'x'", "'NA'")
    assert stoker.data.table({"x": ["1", "NA"]}, missing=("", "?", "NA")).kinds == {"x": "number"}
    assert 'missing=("", "?", "NA",)' in error.remedy


def test_a_wrong_type_far_behind_the_first_thousand_rows(tmp_path: Path) -> None:
    lines = [f"{i},{i % 2}" for i in range(31_005)]
    lines[30_998] = "abc,1"
    path = written(tmp_path, "x,y\n" + "\n".join(lines))
    rows = stoker.data.table(path, target="y")
    refused(rows.fit, "rows.csv, row 31000", "'x'", "'abc'", "not a number", 'missing=(..., "abc")')
    assert stoker.data.table(path, target="y", missing=("", "?", "abc")).fit().num_numbers == 2
    assert stoker.data.table(path, target="y", types={"x": "category"}).fit().category_sizes == [31_005]
    before = rows.subset(np.arange(30_000))  # a row that is not looked at is no error
    assert len(before.fit()(before)) == 30_000


def test_a_column_of_nothing() -> None:
    rows = stoker.data.table({"x": ["", "?"], "y": [1, 2]})
    assert refused(lambda: rows.kinds, "'x'", "no value").remedy == 'types={"x": "ignore"}'
    gap = stoker.data.table({"x": [None, 1.0], "y": [1, 2]})
    refused(gap.subset([0]).fit, "'x'", "no value in any of the 1 rows")
    refused(gap.subset([]).fit, "no rows to fit on")
    nothing = stoker.data.table({"x": [1, 2]}, types={"x": "ignore"})
    refused(lambda: len(nothing.fit()(nothing)), "nothing of the table is left")


# ------------------------------------------------------------------ bad files and arguments


@pytest.mark.parametrize(
    "text, said",
    [
        ("", ["rows.csv is empty"]),
        ("\n\n", ["rows.csv is empty"]),
        ("\ufeff", ["rows.csv is empty"]),
        ("a,b\n", ["header and no rows"]),
        ("a,b\n1,2\n\n3\n", ["rows.csv, row 4", "1 field, expected 2"]),
        ("a,b\n1,2\n3,4,5\n", ["rows.csv, row 3", "3 fields, expected 2", "3,4,5"]),
        ('a,b\n"x\ny",2\n3\n', ["rows.csv, row 4", "1 field"]),
        ("a,b,a\n1,2,3\n", ["rows.csv, row 1", "columns 1 and 3", "'a'"]),
        ('a,b\n1,2\n3,"4\n5,6\n', ["rows.csv, row 3", "quotes", "quote=None"]),
        ('a,b\n1,"2" 3\n', ["rows.csv, row 2", "quotes", "quote=None"]),
        ("a,b\n1,2\nx\0y,3\n", ["rows.csv, row 3", "NUL"]),
        (b"a,b\n1,2\ncaf\xe9,3\n", ["rows.csv, row 3", "0xe9", "position 11", 'encoding="latin-1"']),
        ("a,b\n1,2\n".encode("utf-16"), ["row 1", "UTF-16", 'encoding="utf-16"']),
        (b"\x1f\x8b\x08\x00\xff", ["row 1", "gzip", "gunzip"]),
        (b"PK\x03\x04\x14\0\0", ["row 1", "NUL", "Excel"]),
        ("a,b\n" + "1,2\n" * 9999 + "1,é\n", ["rows.csv, row 10001", "0xc3", "position 40002"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str | bytes, said: Sequence[str]) -> None:
    path = written(tmp_path, text)
    rows = stoker.data.table(path, encoding="ascii" if "0xc3" in said else "utf-8")
    refused(lambda: len(rows), str(path), *said)


def test_the_remedies_work(tmp_path: Path) -> None:
    quotes = written(tmp_path, 'a,b\n1,2\n3,"4\n5,6\n')
    assert stoker.data.table(quotes, quote=None)["b"] == ["2", '"4', "6"]
    latin = written(tmp_path, b"a,b\n1,2\ncaf\xe9,3\n", "latin.csv")
    assert stoker.data.table(latin, encoding="latin-1")["a"] == ["1", "café"]
    wide = written(tmp_path, "a,b\n1,ü\n".encode("utf-16"))
    assert stoker.data.table(wide, encoding="utf-16")["b"] == ["ü"]
    refused(lambda: len(stoker.data.table(wide, encoding="utf-61")), "utf-61")
    refused(lambda: len(stoker.data.table(latin, encoding="utf-16")), "latin.csv", "is not utf-16", "latin-1")


def test_a_field_longer_than_the_csv_module_takes(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert len(stoker.data.table(written(tmp_path, "a,b\n" + "x" * 200_000 + ",1\n"))["a"][0]) == 200_000
    assert csv.field_size_limit() == before


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    written(tmp_path, "a\n1\n", "train.csv")
    missing = stoker.data.table(tmp_path / "trian.csv")  # nothing is read yet
    refused(lambda: len(missing), "trian.csv does not exist", "did you mean train.csv?")
    refused(lambda: len(stoker.data.table(tmp_path)), "is a folder", "glob")


def test_names(tmp_path: Path) -> None:
    path = written(tmp_path, "1,2\n3,4\n")
    assert stoker.data.table(path, names=["a", "b"])["b"] == ["2", "4"]
    refused(lambda: len(stoker.data.table(path, names=["a"])), "1 name", "row 1", "2 fields")
    refused(lambda: stoker.data.table(path, names=["a", "a"]), "columns 1 and 2")
    headed = written(tmp_path, "a,b\n3,4\n", "headed.csv")
    refused(lambda: len(stoker.data.table(headed, names=["a", "b"])), "row 1", "leave names= out")


@pytest.mark.parametrize("names", [None, ["age", "job"]])
@pytest.mark.parametrize(
    "given",
    [{"target": "jbo"}, {"types": {"jbo": "category"}}, {"types": {"jbo": "ignore"}}, {"convert": {"jbo": str}}],
)
def test_unknown_columns(tmp_path: Path, names: list[str] | None, given: dict[str, Any]) -> None:
    path = written(tmp_path, "age,job\n1,a\n" if names is None else "1,a\n")
    refused(lambda: len(stoker.data.table(path, names=names, **given)), "'jbo'", "did you mean job?", next(iter(given)))


def test_a_file_with_another_delimiter(tmp_path: Path) -> None:
    path = written(tmp_path, "age;job\n1;a\n")
    refused(lambda: len(stoker.data.table(path, target="job")), "'job'", "another delimiter", 'delimiter=";"')
    assert len(stoker.data.table(path, target="job", delimiter=";")) == 1


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    refused(lambda: stoker.data.table("a.csv", types={"x": "numbr"}), "did you mean number?")  # type: ignore[dict-item]
    refused(lambda: stoker.data.table("a.csv", target="x", types={"x": "text"}), "target")
    refused(lambda: stoker.data.table("a.csv", delimiter="||"), "one character")
    rows = stoker.data.table({"x": [1, 2]})
    refused(lambda: rows["y"], "no column 'y'")
    refused(lambda: rows[0], "has columns, not samples", "fit()")  # type: ignore[index]
    refused(lambda: len(rows.subset([2])), "row 2", "a table with 2")
    refused(lambda: len(rows.subset([True, False])), "bool")
    refused(lambda: rows.fit(tokenizer="word"), "no column of texts")
    refused(lambda: len(stoker.data.table({"x": ["1", "b"]}, convert={"x": int})), "row 1", "'x'", "ValueError", "'b'")


# ------------------------------------------------------------------ laziness, splits, keeping


def test_nothing_is_read_before_it_is_used(tmp_path: Path) -> None:
    path = written(tmp_path, "x,y\n1,a\n2,b\n3,a\n4,b\n5,a\n6,b\n7,a\n8,b\n")

    def model() -> tuple[TableEncoder, list[Any]]:
        rows = stoker.data.table(path, target="y")
        train, val = stoker.data.split(rows, val=0.25, stratify="y")
        encode = train.fit()
        return encode, [encode(train), encode(val.where(lambda row: row["x"] != "0"))]

    encode, datasets = model()
    assert [len(dataset) for dataset in datasets] == [6, 2]
    path.unlink()
    with restoring(states_of(datasets)):
        again, later = model()
    assert again == encode and again.category_sizes == encode.category_sizes
    refused(lambda: len(later[0]), "does not exist")


def test_subsets_of_subsets(tmp_path: Path) -> None:
    path = written(tmp_path, "x,y\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(20)))
    rows = stoker.data.table(path, target="y")
    some = rows.subset(np.arange(4, 20, 2)).subset(lambda: [3, 0])
    assert some["x"] == ["10", "4"] and some.file_of(0).endswith("row 12")
    encoded = rows.fit()(rows)
    half = encoded.subset(lambda: np.array([19, 7, 3])).subset([2, 0])
    assert half.file_of(0).endswith("row 5") and half.targets.tolist() == [1, 1]
    assert torch.equal(half[1][0], encoded[19][0]) and len(half) == 2
    assert torch.equal((half.columns() or ())[0], (encoded.columns() or ())[0][[3, 19]])


columns = st.lists(
    st.tuples(st.floats(allow_nan=False, allow_infinity=False, width=32), st.sampled_from(["a", "b", "c", ""])),
    min_size=2, max_size=30,
)  # fmt: skip


@settings(max_examples=80)
@given(columns, st.booleans(), st.sampled_from(["error", "code"]))
def test_an_encoder_comes_back_from_json_exactly(cells: list[tuple[float, str]], one_hot: bool, unknown: Any) -> None:
    numbers, words = zip(*cells, strict=True)
    rows = stoker.data.table({"x": list(map(repr, numbers)), "w": [*words[:-1], "a"], "z": numbers})
    encode = rows.fit(one_hot=one_hot, unknown=unknown)
    again = TableEncoder.from_state(json.loads(json.dumps(encode.state(), allow_nan=False)))
    assert again == encode
    for left, right in zip(encode(rows).columns() or (), again(rows).columns() or (), strict=True):
        assert torch.equal(left, right) and bool(torch.isfinite(left).all())


# ------------------------------------------------------------------ the Adult data


def test_adult(shared_data: Path) -> None:
    rows, test = adult(shared_data), adult(shared_data, "test")
    assert (len(rows), len(test)) == (32_561, 16_281)
    complete = rows.where(lambda row: "?" not in row.values())
    assert len(complete) == 30_162  # SOURCE.txt
    with (shared_data / "adult" / "adult-train.csv").open(newline="") as file:
        plain = [row for row in csv.reader(file, skipinitialspace=True) if row]
    for i, name in enumerate(ADULT):
        assert rows[name] == [row[i] for row in plain]
    train, val = stoker.data.split(rows, val=0.1, stratify="income")
    encode = train.fit(unknown="code")
    assert (encode.num_numbers, len(encode.category_sizes), encode.classes) == (6, 8, ("<=50K", ">50K"))
    numbers, categories, target = encode(train).columns() or ()
    assert torch.allclose(numbers.double().mean(0), torch.zeros(6, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(numbers.double().std(0, correction=0), torch.ones(6, dtype=torch.float64), atol=1e-4)
    assert (categories.amax(0) < torch.tensor(encode.category_sizes)).all() and categories.min() == 1
    assert target.float().mean().item() == pytest.approx(encode(val).targets.mean(), abs=1e-3)
    assert len(encode(test)) == 16_281 and encode(test).targets.sum() == 3_846


def test_adults_test_file_spells_its_classes_with_a_dot(shared_data: Path) -> None:
    encode = adult(shared_data).fit()
    raw = encode(adult(shared_data, "test", convert={}))
    error = refused(lambda: len(raw), "adult-test.csv, row 1", "'<=50K.'", "did you mean <=50K?")
    assert 'convert={"income": lambda s: s.rstrip(".")}' in error.remedy
