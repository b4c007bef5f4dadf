"""Tiny Shakespeare as windows of characters and a small GPT, shared by recipe.py and plain.py."""

import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stoker

Windows = tuple[Tensor, Tensor]  # characters [N, block] and, for each, the next one [N, block]


def load(block: int, data: str = "") -> tuple[Windows, Windows, int]:
    """Windows of the first 90 % and of the rest of the text, and the number of distinct characters.

    Training windows begin at every character; validation windows follow one another and cover their part of the
    text but for its last few characters. All are views of the text: overlapping costs no memory.
    """
    root = data or os.environ.get("STOKER_DATA") or os.environ.get("STOKER_TEST_DATA")
    file = Path(root or Path(__file__).parent / "../../../shared/data").resolve() / "tinyshakespeare/input.txt"
    if not file.is_file():
        raise stoker.UserError(
            f"Tiny Shakespeare is not here: {file} does not exist",
            why="examples download nothing",
            remedy="put data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn into FOLDER/tinyshakespeare, "
            "then pass data=FOLDER or set STOKER_DATA=FOLDER",
        )
    text = file.read_text(encoding="utf-8")
    codes = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([codes[c] for c in text])
    cut = int(0.9 * len(ids))

    def windows(part: Tensor, stride: int) -> Windows:
        return part[:-1].unfold(0, block, stride), part[1:].unfold(0, block, stride)

    return windows(ids[:cut], 1), windows(ids[cut:], block), len(codes)


class Block(nn.Module):
    """Attention, then a perceptron, each normalised before and added to what went in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))  # [B, T, H, D] -> [B, T, C]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """nanoGPT without dropout: pre-norm, learnt positions, no biases, the output layer tied to the embedding."""

    def __init__(self, num_codes: int, block: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(num_codes, width), nn.Embedding(block, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, num_codes, bias=False)
        self.head.weight = self.embed.weight
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)
        std = 0.02 * math.sqrt(768 / width)  # nanoGPT's 0.02 is GPT-2's, of width 768
        for name, weight in self.blocks.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(weight, std=std / math.sqrt(2 * layers) if residual else std)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position.weight[: ids.shape[1]]  # [B, T, C]
        return self.head(self.norm(self.blocks(x)))  # [B, T, num_codes]


def loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices and embeddings, not the gains of LayerNorm."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
