import os

from torch import nn, optim

import stoker


def recipe(width: int = 128, lr: float = 2e-3, batch_size: int = 128, data: str = "") -> stoker.Recipe:
    """Tell who earns over $50,000 a year. Needs UCI's files as FOLDER/adult/adult-{train,test}.csv: data=FOLDER."""
    folder = data or os.environ.get("STOKER_DATA") or os.environ.get("STOKER_TEST_DATA") or "../shared/data"
    names = "age work fnlwgt education years marital job relation race sex gain loss hours country income".split()  # noqa: SIM905
    how = {"target": "income", "names": names, "convert": {"income": lambda label: label.rstrip(".")}}
    known, test = (stoker.data.table(f"{folder}/adult/adult-{part}.csv", **how) for part in ("train", "test"))
    train, val = stoker.data.split(known, val=0.1, stratify="income")
    encode = train.fit(one_hot=True, unknown="code")
    return stoker.Recipe(
        model=lambda: nn.Sequential(nn.Linear(encode.num_features, width), nn.ReLU(), nn.Linear(width, 2)),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: optim.AdamW(params, lr=lr, weight_decay=0.3),
        schedule=stoker.cosine(warmup_steps=100),
        train=stoker.Loader(encode(train), batch_size, shuffle=True),
        val=stoker.Loader(encode(val)),
        test=stoker.Loader(encode(test)),
        metrics={"error": lambda output, target: (output.argmax(1) != target).float()},
    )
