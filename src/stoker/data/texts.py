"""Texts as token ids: vocabularies learnt from the training texts, pretrained tokenizers, compact storage."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from stoker.data.table_files import Indices
from stoker.errors import UserError, nearest

PADDING, UNKNOWN = 0, 1
_SPECIAL = ("<padding>", "<unknown>")
_WORD = re.compile(r"\w+|[^\w\s]")
_NUM_COMPARED = 16  # texts on which a restored tokenizer is held against the given one


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


_CUT: dict[str, Callable[[str], list[str]]] = {"word": _words, "character": list}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their ids: 0 is padding, 1 whatever is not in it, the rest follow by falling count.

    Args:
        tokens: the token of every id, from id 2 on.
        unit: "word" (lower case; words, and punctuation marks one by one) or "character".
    """

    tokens: tuple[str, ...]
    unit: Literal["word", "character"] = "word"

    def __post_init__(self) -> None:
        if self.unit not in _CUT:
            raise UserError(
                f"a vocabulary has no unit {self.unit!r}{nearest(str(self.unit), list(_CUT))}",
                remedy='unit="word" or unit="character"',
            )

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        unit: Literal["word", "character"] = "word",
        min_count: int = 1,
        max_size: int | None = None,
    ) -> "Vocabulary":
        """Learn the tokens of the training texts.

        Args:
            texts: one string per sample.
            unit: see the class.
            min_count: leave out tokens that occur less often.
            max_size: keep the most frequent; ids are then below `max_size`, padding and unknown included.

        Raises:
            UserError: `unit` is unknown, `texts` is one string, or there is no token in it.
        """
        empty = cls((), unit)
        if isinstance(texts, str):
            raise UserError("Vocabulary.build got one string", remedy="give a list of texts: [text]")
        if max_size is not None and max_size <= len(_SPECIAL):
            raise UserError(f"max_size={max_size} leaves no room beside padding and unknown", remedy="max_size=10_000")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_CUT[empty.unit](text))
        if not counts:
            raise UserError("the texts of the vocabulary hold no token", remedy="check the column they come from")
        ranked = sorted((token for token, n in counts.items() if n >= min_count), key=lambda t: (-counts[t], t))
        return cls(tuple(ranked[: None if max_size is None else max_size - len(_SPECIAL)]), unit)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens, len(_SPECIAL))}

    @property
    def pad_id(self) -> int:
        """Id that pads."""
        return PADDING

    def __len__(self) -> int:
        """Return the number of ids, padding and unknown included: the size of an embedding."""
        return len(self.tokens) + len(_SPECIAL)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids = self._ids
        return [ids.get(token, UNKNOWN) for token in _CUT[self.unit](text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without padding; words are joined by spaces, what was unknown is "<unknown>"."""
        names = (*_SPECIAL, *self.tokens)
        return (" " if self.unit == "word" else "").join(names[int(i)] for i in ids if int(i) != PADDING)

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {"unit": self.unit, "tokens": list(self.tokens)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Vocabulary":
        """Vocabulary of a state."""
        return cls(tuple(state["tokens"]), state["unit"])


@dataclass(frozen=True)
class Pretrained:
    """A tokenizer of the `tokenizers` library, as the JSON that it writes of itself.

    Args:
        json: the whole of it: model, normaliser, special tokens, truncation.
        pad_id: id that pads.
    """

    json: str
    pad_id: int

    @cached_property
    def _tokenizer(self) -> Any:
        return _library().Tokenizer.from_str(self.json)

    def __len__(self) -> int:
        """Return the number of ids: the size of an embedding."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens included."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {"json": self.json, "pad_id": self.pad_id}


Tokenizer = Vocabulary | Pretrained


def tokenizer_of_state(state: dict[str, Any]) -> Tokenizer:
    """Tokenizer that a state was taken from."""
    return Pretrained(state["json"], state["pad_id"]) if "json" in state else Vocabulary.from_state(state)


def tokenizer_for(given: Any, texts: Sequence[str], max_length: int | None) -> Tokenizer:
    """Tokenizer for the training texts.

    Args:
        given: None or "word", "character": a vocabulary is learnt from `texts`; a Vocabulary; a tokenizer of
            transformers or of tokenizers.
        texts: the training texts.
        max_length: tokens, special ones included, that a text is cut to.

    Raises:
        UserError: `given` is none of these, or cannot be kept with a checkpoint.
    """
    if max_length is not None and max_length < 1:
        raise UserError(f"max_length={max_length} leaves nothing of a text", remedy="max_length=128, for example")
    if given is None or given in ("word", "character"):
        return Vocabulary.build(texts, given or "word")
    if isinstance(given, Vocabulary | Pretrained):
        return given
    if hasattr(given, "backend_tokenizer"):
        return _of_transformers(given, texts, max_length)
    if type(given).__module__.partition(".")[0] == "tokenizers" and hasattr(given, "to_str"):
        padding = given.padding or {}
        known = (given.token_to_id(token) for token in ("[PAD]", "<pad>"))
        pad_id = padding.get("pad_id", next((i for i in known if i is not None), PADDING))
        return _kept(given, pad_id, max_length, None)
    hint = nearest(given, ["word", "character"]) if isinstance(given, str) else ""
    shown = repr(given) if isinstance(given, str) else f"a {type(given).__name__}"
    raise UserError(
        f"tokenizer={shown} cannot be used{hint}",
        why="it is kept with the checkpoint as JSON, which slow tokenizers of transformers cannot write",
        remedy='tokenizer="word", "character", a stoker.data.Vocabulary, or AutoTokenizer.from_pretrained(NAME)',
    )


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "the texts need the tokenizers library, and it is not installed", remedy="pip install 'stoker[text]'"
        ) from error
    return tokenizers


def _of_transformers(given: Any, texts: Sequence[str], max_length: int | None) -> Pretrained:
    pad_id = given.pad_token_id if given.pad_token_id is not None else PADDING
    kept = _kept(given.backend_tokenizer, pad_id, max_length, getattr(given, "truncation_side", "right"))
    cut = {"truncation": True, "max_length": max_length} if max_length is not None else {}
    for text in texts[:_NUM_COMPARED]:
        wanted = given(text, verbose=False, **cut)["input_ids"]
        if kept.encode(text) != wanted:
            raise UserError(
                f"{type(given).__name__} does not survive being kept with a checkpoint",
                why=f"for {text[:60]!r} it gives {wanted[:12]}, and its JSON {kept.encode(text)[:12]}",
                remedy="give tokenizer.backend_tokenizer, set up so that it alone gives the ids that you want",
            )
    return kept


def _kept(backend: Any, pad_id: int, max_length: int | None, side: str | None) -> Pretrained:
    """Copy a tokenizer; `side` None leaves its own truncation in place where `max_length` is None."""
    try:
        copy = _library().Tokenizer.from_str(backend.to_str())
    except UserError:
        raise
    except Exception as error:  # parts written in Python cannot be serialised; the library raises a bare Exception
        raise UserError(
            "the tokenizer cannot be kept with the checkpoint",
            why=str(error),
            remedy="use one whose parts are all the library's own",
        ) from error
    copy.no_padding()
    if max_length is not None:
        num_special = copy.num_special_tokens_to_add(is_pair=False)
        if max_length <= num_special:
            raise UserError(
                f"max_length={max_length} leaves no room beside the tokenizer's {num_special} special tokens",
                remedy=f"max_length={num_special + 1} or more",
            )
        copy.enable_truncation(max_length, direction=side or (copy.truncation or {}).get("direction", "right"))
    elif side is not None:
        copy.no_truncation()
    return Pretrained(copy.to_str(), pad_id)


@dataclass(frozen=True)
class Tokens:
    """Token ids of many texts in one array: forked workers share it, since reading it writes no reference count."""

    ids: npt.NDArray[np.int32]  # [tokens of all texts]
    offsets: Indices  # [texts + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> torch.Tensor:
        """Ids of one text, int64 [L]."""
        return torch.from_numpy(self.ids[self.offsets[index] : self.offsets[index + 1]].astype(np.int64))

    @property
    def lengths(self) -> Indices:
        """Number of tokens of every text."""
        return np.diff(self.offsets)

    def take(self, rows: Indices) -> "Tokens":
        """Return the same at some texts."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Tokens(self.ids[np.repeat(self.offsets[rows], lengths) + within], offsets)


def tokenise(texts: Sequence[str], tokenizer: Tokenizer, max_length: int | None) -> Tokens:
    """Token ids of texts, each cut to `max_length` tokens.

    One call a text: a batch call would start the library's threads, which do not survive the fork of data workers.
    """
    parts = [np.asarray(tokenizer.encode(text)[:max_length], dtype=np.int32) for text in texts]
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return Tokens(np.concatenate([np.zeros(0, np.int32), *parts]), offsets)
