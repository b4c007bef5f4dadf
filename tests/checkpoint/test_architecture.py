"""What a model is, in words that are the same on every machine; weights that fit another model do so in no silence."""

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import stoker
from stoker import UserError
from stoker.checkpoint.architecture import architecture_differences, describe_architecture
from stoker.weights import describe_load, load, load_weights


def net(width: int = 8, act: Any = nn.ReLU, heads: int = 2, norm: bool = False, layers: int = 2) -> nn.ModuleDict:
    body = [part for _ in range(layers) for part in (nn.Linear(width, width), act())]
    activation = "relu" if act is nn.ReLU else "gelu"
    attention = nn.TransformerEncoderLayer(width, heads, 16, activation=activation, batch_first=True)
    parts = {"body": nn.Sequential(*body), "attention": attention}
    return nn.ModuleDict(parts | ({"norm": nn.BatchNorm1d(width)} if norm else {}))


def differences(then: nn.Module, now: nn.Module) -> list[str]:
    return architecture_differences(describe_architecture(then), describe_architecture(now))


def test_modules_are_described_by_class_settings_and_tensors() -> None:
    found = describe_architecture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4)))
    assert list(found) == ["", "0", "1", "2"]
    assert found["0"].startswith("Linear(in_features=3, out_features=4, bias=True); weight (4, 3) float32; bias (4,)")
    assert found["1"] == "ReLU()"
    assert "buffer num_batches_tracked () int64" in found["2"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("change", ["nothing", "weights", "mode", "type", "frozen", "compiled", "parallel", "forward"])
def test_what_is_no_part_of_an_architecture(change: str) -> None:
    def altered() -> nn.Module:
        torch.manual_seed(1)
        model: Any = net()
        if change == "mode":
            model.eval()
        elif change == "frozen":
            model.requires_grad_(False)
        elif change == "compiled":
            model["body"] = torch.compile(model["body"], backend="eager")
            model = torch.compile(model, backend="eager")
        elif change == "parallel":
            model = nn.DataParallel(model)
        elif change == "forward":
            model["body"](torch.ones(2, 8))
        elif change == "type":
            model = model.double()
        return model

    found = differences(net(), altered())
    if change == "type":
        assert found != []
        assert all("float64 now" in line for line in found)
    else:
        assert found == []


def test_a_description_is_the_same_in_every_process() -> None:
    code = (
        "import json; from tests.checkpoint.test_architecture import net, Odd;"
        "from stoker.checkpoint.architecture import describe_architecture;"
        "print(json.dumps([describe_architecture(m) for m in (net(), Odd())]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": os.pathsep.join(["src", "."])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert json.loads(done.stdout) == [describe_architecture(net()), describe_architecture(Odd())], done.stderr


class Odd(nn.Module):
    """Settings of every kind, some of which are not the same everywhere."""

    def __init__(self, slope: float = 0.1, function: Any = functional.silu) -> None:
        super().__init__()
        self.slope, self.function, self.kind = slope, function, nn.ReLU
        self.sizes = (3, 5)
        self.mode = "same"
        self.path = "/home/someone/cache"
        self.helper = object()
        self.anonymous = lambda x: x
        self.dtype = torch.float16

    def extra_repr(self) -> str:
        return f"helper={self.helper!r}, device={torch.device('cuda', 1)}; other,\nslope={self.slope}"


def test_odd_settings() -> None:
    found = describe_architecture(Odd())[""]
    assert found.startswith("Odd(helper=<object object at 0x...>, other, slope=0.1, ")
    for part in ("function=silu", "kind=ReLU", "mode='same'", "sizes=(3, 5)", "dtype=torch.float16"):
        assert part in found
    assert re.search("cuda|someone|anonymous|training", found) is None
    assert found.count("slope") == 1
    (line,) = differences(Odd(), Odd(slope=0.2))
    assert "slope=0.1" in line and "slope=0.2" in line
    (line,) = differences(Odd(), Odd(function=functional.gelu))
    assert "function=silu" in line and "function=gelu" in line


def test_a_faulty_extra_repr_is_passed_over() -> None:
    class Faulty(nn.Linear):
        def extra_repr(self) -> str:
            raise RuntimeError("no")

    assert "weight (1, 1)" in describe_architecture(Faulty(1, 1))[""]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"act": nn.GELU},
            [
                r"layers body.1, body.3: ReLU\(\) then, GELU\(approximate='none'\) now",
                r"layer attention: .*activation=relu.* then, .*activation=gelu.* now",
            ],
        ),
        ({"heads": 4}, [r"layer attention.self_attn: .*num_heads=2.* then, .*num_heads=4.* now"]),
        ({"norm": True}, [r"layer norm added: BatchNorm1d\(8, .*\)"]),
        ({"layers": 3}, [r"layer body.4 added: Linear\(.*\)", r"layer body.5 added: ReLU\(\)"]),
    ],
)
def test_differences_are_lines(changes: dict[str, Any], lines: list[str]) -> None:
    found = differences(net(), net(**changes))
    assert len(found) == len(lines)
    for line, pattern in zip(found, lines, strict=True):
        assert re.fullmatch(pattern, line), line
    assert len(differences(net(**changes), net())) == len(lines)
    if "added" in lines[0]:
        assert "removed" in differences(net(**changes), net())[0]


def test_the_same_change_in_many_layers_is_one_line() -> None:
    (line,) = differences(*(nn.Sequential(*[nn.Dropout(p) for _ in range(50)]) for p in (0.1, 0.2)))
    assert line == (
        "layers 0, 1, 2, 3, 4, 5 and 44 more: Dropout(p=0.1, inplace=False) then, Dropout(p=0.2, inplace=False) now"
    )
    many = nn.Sequential(*[nn.Linear(1, i + 1) for i in range(60)])
    found = differences(many, nn.Sequential(*[nn.Linear(2, i + 1) for i in range(60)]))
    assert (len(found), found[-1]) == (41, "and 20 more differences")


def test_a_removed_block_is_one_line() -> None:
    (line,) = differences(nn.ModuleDict({"a": nn.Linear(1, 1), "b": net()}), nn.ModuleDict({"a": nn.Linear(1, 1)}))
    assert line.startswith("layer b removed: ModuleDict(), ")
    assert line.endswith(" modules inside")


def test_tied_and_shared_parts() -> None:
    def tied(tie: bool) -> nn.Module:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        if tie:
            model["b"].weight = model["a"].weight
        return model

    (line,) = differences(tied(True), tied(False))
    assert line == "layer b: weight = a.weight then, weight (2, 2) float32 now"
    shared = nn.Linear(2, 2)
    assert describe_architecture(nn.Sequential(shared, shared))["1"] == "= 0"
    assert differences(nn.Sequential(shared, shared), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) != []


def test_a_buffer_that_a_forward_pass_makes_is_no_part() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.ones(3), persistent=False)
    assert differences(nn.Linear(1, 1), model) == []


def test_lazy_and_absent_parameters() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "weight of any shape float32" in describe_architecture(nn.LazyLinear(3))[""]
    assert "bias (" not in describe_architecture(nn.Linear(2, 2, bias=False))[""]


# Loading a run into other models -------------------------------------------------------------------------------------

RECIPE = """
import stoker
import torch
from torch import nn


def recipe(width: int = 6, act: str = "ReLU", head: str = "head", ema: bool = False):
    x = torch.linspace(-1, 1, 32)[:, None]

    def model():
        body = nn.Sequential(nn.Linear(1, width), getattr(nn, act)())
        return nn.ModuleDict({"body": body, head: nn.Linear(width, 2)})

    def step(model, batch):
        *_, last = model.values()
        return nn.functional.cross_entropy(last(model["body"](batch[0])), batch[1])

    return stoker.Recipe(
        model=model,
        step=step,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        train=stoker.Loader((x, (x[:, 0] > 0).long()), 8),
        ema=0.5 if ema else None,
    )
"""


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., stoker.Recipe]:
    from stoker.source import load_source

    file = tmp_path_factory.mktemp("recipes") / "small.py"
    file.write_text(RECIPE)
    source = load_source(str(file))
    return lambda **arguments: source.recipe(arguments)


@pytest.fixture(scope="module")
def run(make: Callable[..., stoker.Recipe], tmp_path_factory: pytest.TempPathFactory) -> stoker.Run:
    """A run that has recorded its architecture."""
    out = tmp_path_factory.mktemp("runs") / "first"
    found = stoker.fit(make(), epochs=2, out=out, quiet=True, device="cpu")
    record(out, describe_architecture(found.model))
    return found


def record(out: Path, architecture: Any) -> None:
    recorded = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**recorded, "architecture": architecture}))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_run_into_its_own_model(run: stoker.Run, make: Callable[..., stoker.Recipe]) -> None:
    blank = make().build_model()
    for into in (None, make(), blank):
        for source in (run, run.dir, str(run.dir), run.dir / "checkpoints" / "latest"):
            model = load(source, into)
            assert same(model, run.model)
            assert not model.training
    assert load(run, blank) is blank
    weights = next((run.dir / "checkpoints" / "latest").resolve().glob("model.safetensors"))
    assert same(load(weights, make()), run.model)
    assert same(load(weights, make().build_model()), run.model)
    assert same(load(run, which="latest"), run.model)


def test_another_activation_is_no_secret(run: stoker.Run, make: Callable[..., stoker.Recipe]) -> None:
    with pytest.warns(UserWarning) as caught:
        assert same(load(run, make(act="GELU")), run.model)
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert "layer body.1: ReLU() then, GELU(approximate='none') now" in text
    assert "argument act: ReLU then, GELU now" in text
    with pytest.warns(UserWarning, match=r"body.1: ReLU\(\) then"):
        load(run, make(act="GELU").build_model())
    with pytest.warns(UserWarning, match=r"body.1: ReLU\(\) then"):
        report = load_weights(make(act="GELU").build_model(), run)
    assert "layer body.1: ReLU() then, GELU(approximate='none') now" in str(report)


def test_another_width_says_what_changed(run: stoker.Run, make: Callable[..., stoker.Recipe]) -> None:
    with pytest.raises(UserError) as caught:
        load(run, make(width=9))
    text = str(caught.value)
    for part in (
        "width 6 there, 9 here",
        "argument width: 6 then, 9 now",
        "layer body.0: Linear(in_features=1, out_features=6, bias=True) then, Linear(in_features=1, out_features=9",
        "partial=True takes what fits",
    ):
        assert part in text


def test_what_fits_is_taken_and_printed(
    run: stoker.Run, make: Callable[..., stoker.Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = load(run, make(head="fc", act="GELU"), partial=True)
    trained: Any = run.model
    assert torch.equal(model["body"][0].weight, trained["body"][0].weight)
    text = capsys.readouterr().err
    for part in ("2 of 4 tensors", "head.* there may be fc.* here", "layer body.1: ReLU() then, GELU"):
        assert part in text
    with pytest.raises(UserError, match="nothing of"):
        load(run, nn.Conv2d(1, 1, 1), partial=True)


def test_an_early_run_says_that_it_cannot_tell(make: Callable[..., stoker.Recipe], tmp_path: Path) -> None:
    run = stoker.fit(make(ema=True), epochs=1, out=tmp_path / "run", quiet=True, device="cpu")
    record(run.dir, None)
    assert same(load(run), run.model)
    assert same(load(run, make(ema=True)), run.model)
    with pytest.warns(UserWarning, match="did not record its model's architecture"):
        load(run, make(ema=True, act="GELU"))
    record(run.dir, {"a": 3})
    assert same(load(run), run.model)
    assert "the average of its weights" in load_weights(make().build_model(), run).source


@pytest.mark.parametrize(
    ("source", "into", "parts"),
    [
        ("w.safetensors", None, ["which model", "stoker.load("]),
        ("w.safetensors", 3, ["not a int"]),
        ("w.safetensors", load, ["call it"]),
        ("nothing", None, ["is not a run", "no such folder"]),
        ("empty", None, ["is not a run", "no run.json"]),
        ("nothing.pt", nn.Linear(1, 1), ["cannot read", "nothing.pt"]),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, source: str, into: Any, parts: list[str]) -> None:
    save_file({"weight": torch.ones(1, 1)}, tmp_path / "w.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        load(tmp_path / source, into)
    for part in parts:
        assert part in str(caught.value)


# The command ---------------------------------------------------------------------------------------------------------


def command(*words: str) -> str:
    from click.testing import CliRunner

    from stoker.cli.load import load as load_command

    result = CliRunner().invoke(load_command, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command(run: stoker.Run, make: Callable[..., stoker.Recipe], tmp_path: Path) -> None:
    out = str(run.dir)
    text = command(out)
    assert "ModuleDict with 26 parameters" in text
    assert "4 of 4 tensors taken from step-00000008" in text
    assert f"in Python: model = stoker.load({out!r})" in text
    file = str(make().origin.file)
    text = command(out, file, "act=GELU", "--checkpoint", "latest")
    assert "layer body.1: ReLU() then, GELU" in text
    assert f"stoker.load({out!r}, recipe(act='GELU'), which='latest')" in text
    foreign = tmp_path / "w.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in run.model.state_dict().items()}}, foreign)
    text = command(str(foreign))
    assert "a checkpoint's 'state_dict'" in text
    assert "4 tensors, 26 values" in text
    assert re.search(r"module.body.0.weight\s+\(6, 1\)\s+float32", text)
    text = command(str(foreign), file, "head=fc", "--partial")
    assert "2 of 4 tensors" in text
    assert "'module.' is dropped" in text
    assert "partial=True)" in text
    with pytest.raises(UserError, match=r"missing there: fc\.weight"):
        command(str(foreign), file, "head=fc")
    with pytest.raises(UserError, match="no parameter 'hed'"):
        command(str(foreign), file, "hed=fc")


def test_a_long_listing_is_cut(tmp_path: Path) -> None:
    save_file({f"{i:03}": torch.ones(1) for i in range(100)}, tmp_path / "w.safetensors")
    text = describe_load(str(tmp_path / "w.safetensors"), None, [], "best", False)
    assert len(text.splitlines()) == 43
    assert "and 60 more" in text
