"""Adult census income: a table of mixed columns. `stoker train examples/adult/recipe.py --epochs 6`.

`stoker eval RUN --split test` then scores the weights that were best on val on the test file.
"""

import torch
from adult_task import Classifier, load
from torch import Tensor, nn

import stoker


def error(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) != target).float()


def recipe(width: int = 128, lr: float = 2e-3, batch_size: int = 128, data: str = "") -> stoker.Recipe:
    """Tell who earns more than 50,000 dollars a year; answering "nobody" is wrong for 24 % of the test file."""
    train, val, test, num_codes = load(data)
    return stoker.Recipe(
        model=lambda: Classifier(num_codes, width),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.3),
        schedule=stoker.cosine(warmup_steps=100),
        train=stoker.Loader(train, batch_size, shuffle=True),
        val=stoker.Loader(val, 1024),
        test=stoker.Loader(test, 1024),
        metrics={"error": error},
    )
