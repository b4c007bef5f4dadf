"""Surnames of 18 languages and a character GRU for them, shared by recipe.py and plain.py."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import Dataset

import stoker

Sample = tuple[Tensor, int]  # character codes [L] from 1 up (0 is padding and unknown), language


def folder(data: str = "") -> Path:
    root = data or os.environ.get("STOKER_DATA") or os.environ.get("STOKER_TEST_DATA")
    path = Path(root or Path(__file__).parent / "../../../shared/data").resolve() / "names"
    if not any(path.glob("*.txt")):
        raise stoker.UserError(
            f"the surnames are not here: {path} holds no LANGUAGE.txt",
            why="examples download nothing",
            remedy="put data/names of github.com/spro/practical-pytorch into FOLDER/names, "
            "then pass data=FOLDER or set STOKER_DATA=FOLDER",
        )
    return path


class Names(Dataset[Sample]):
    """One split. A spelling is in train or in val, never in both, though several languages may share it.

    Repeated lines are dropped. Russian then has 52 % of the names and Vietnamese 0.4 %, and always answering
    "Russian" is 52 % accurate: hence the recipe reports the mean recall of the languages beside the accuracy.
    """

    def __init__(self, split: str, data: str = "") -> None:
        files = [file for file in sorted(folder(data).glob("*.txt")) if file.stem != "SOURCE"]
        self.languages = [file.stem for file in files]
        lines = [set(file.read_text(encoding="utf-8").split("\n")) - {""} for file in files]
        spellings = sorted(set().union(*lines))
        self.codes = {c: i for i, c in enumerate(sorted(set("".join(spellings))), 1)}
        tenth = set(spellings[::10])  # in alphabetical order: close to a tenth of every language
        chosen = tenth if split == "val" else set(spellings) - tenth
        pairs = [(name, i) for i, names in enumerate(lines) for name in sorted(names & chosen)]
        self.samples = [(torch.tensor([self.codes[c] for c in name]), language) for name, language in pairs]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Pad with 0 to the longest name of the batch: [B, L] and [B]."""
    names, languages = zip(*samples, strict=True)
    return pad_sequence(list(names), batch_first=True), torch.tensor(languages)


class Classifier(nn.Module):
    """Embedding -> bidirectional GRU -> language; padding is packed away, so batch-mates do not matter."""

    def __init__(self, num_codes: int, num_languages: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_codes + 1, width // 2, padding_idx=0)
        self.gru = nn.GRU(width // 2, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, num_languages)

    def forward(self, names: Tensor) -> Tensor:
        lengths = (names != 0).sum(1).cpu()  # pack_padded_sequence wants them on the CPU: a sync on a GPU
        packed = pack_padded_sequence(self.embed(names), lengths, batch_first=True, enforce_sorted=False)
        _, last = self.gru(packed)  # [2, B, width]: the state after the last character, and after the first
        return self.head(torch.cat((last[0], last[1]), dim=1))
