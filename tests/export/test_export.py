"""What `stoker export` writes is opened as other programs do, and compared on samples that the export did not see."""

import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

import stoker
from stoker.cli.export import FORMATS as OFFERED
from stoker.cli.export import export as command
from stoker.errors import UserError
from stoker.export import SUFFIXES, export, graph
from stoker.export.compare import Wrong, difference
from stoker.source import load_source
from tests.export import recipes

onnxruntime = pytest.importorskip("onnxruntime", reason="needs stoker[export]")

Trained = Callable[[str], Path]
FORMATS = list(SUFFIXES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of one of the recipes, made once; 3 steps, so that no weight is as it began."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Path:
        if not (root / name).is_dir():
            recipe = load_source(f"{recipes.__file__}:{name}").recipe({}, 0)
            with torch.enable_grad():  # some tests have none
                stoker.fit(recipe, steps=3, out=root / name, quiet=True, device="cpu")
        return root / name

    return run


def unseen(rows: int) -> Tensor:
    return recipes.data(rows, seed=9)[0]


def ids_unseen(rows: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(9))
    mask = torch.arange(length) < torch.arange(1, rows + 1)[:, None]
    return ids * mask, mask


def asked(file: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of an ONNX file by name."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def shapes(file: Path) -> list[list[Any]]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [value.shape for value in (*session.get_inputs(), *session.get_outputs())]


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("name", ["mlp", "conv", "tied"])
@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_weights_load_strictly(trained: Trained, tmp_path: Path, name: str, format: str) -> None:
    done = export(trained(name), format, tmp_path / f"w{SUFFIXES[format]}")
    found = torch.load(done.path, weights_only=True) if format == "pt" else load_file(done.path)
    expected = stoker.load(trained(name))
    assert list(found) if format == "pt" else sorted(found)
    assert found.keys() == expected.state_dict().keys()
    fresh = getattr(recipes, name)().build_model()
    fresh.load_state_dict(found, strict=True)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    assert "same bits" in done.checked and done.size_bytes == done.path.stat().st_size


def test_the_average_is_what_is_written(trained: Trained, tmp_path: Path) -> None:
    checkpoint = trained("mlp") / "checkpoints" / "latest"
    average, last = (load_file(checkpoint / f"{kind}.safetensors") for kind in ("ema", "model"))
    found = load_file(export(trained("mlp"), "safetensors", tmp_path / "w.safetensors", which="latest").path)
    assert all(torch.equal(found[name], average[name]) for name in average)
    assert not torch.equal(found["0.weight"], last["0.weight"])
    x = unseen(5)
    written = asked(export(trained("mlp"), "onnx", tmp_path / "w.onnx", which="latest").path, {"input": x})["output"]
    first = torch.relu(torch.nn.functional.linear(x, average["0.weight"], average["0.bias"]))
    torch.testing.assert_close(written, torch.nn.functional.linear(first, average["2.weight"], average["2.bias"]))


def test_a_checkpoint_by_its_path(trained: Trained, tmp_path: Path) -> None:
    run = trained("mlp")
    (chosen,) = list((run / "checkpoints").glob("step-*"))[:1]
    done = export(run, "pt", tmp_path / "w.pt", which=str(chosen))
    assert done.checkpoint == chosen.name


def test_state_that_is_no_tensor(trained: Trained, tmp_path: Path) -> None:
    found = torch.load(export(trained("keeps"), "pt", tmp_path / "w.pt").path, weights_only=True)
    assert found["_extra_state"] == {"version": 3}
    with pytest.raises(UserError, match=r"safetensors holds tensors only.*_extra_state"):
        export(trained("keeps"), "safetensors", tmp_path / "w.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["w.pt"]


# ------------------------------------------------------------------ graphs


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "conv", "whole"])
def test_onnx_answers_as_the_model(trained: Trained, tmp_path: Path, name: str) -> None:
    done = export(trained(name), "onnx", tmp_path / "m.onnx")
    for rows in (1, 5):
        (found,) = asked(done.path, {"input": unseen(rows)}).values()
        torch.testing.assert_close(found, stoker.load(trained(name))(unseen(rows)), rtol=1e-4, atol=1e-5)
    assert shapes(done.path) == [["batch", recipes.WIDTH], ["batch", 2]]
    assert done.signature == (("input", "input float32 [batch, 8]"), ("output", "output float32 [batch, 2]"))
    assert not done.notes
    assert re.fullmatch(r"onnxruntime, on 8, 4, 1, 8, 8 and 8 rows of (val|train): .*", done.checked)


@torch.no_grad()
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_whole_numbers_and_tied_weights(trained: Trained, tmp_path: Path, format: str) -> None:
    done = export(trained("tied"), format, tmp_path / f"m{SUFFIXES[format]}")
    ids = torch.arange(15).reshape(3, 5)
    found = asked(done.path, {"ids": ids})["output"] if format == "onnx" else torch.export.load(done.path).module()(ids)
    torch.testing.assert_close(found, stoker.load(trained("tied"))(ids))


@torch.no_grad()
def test_the_batch_may_be_any_dimension(trained: Trained, tmp_path: Path) -> None:
    """A step decides what its model is given: here the batch comes second."""
    done = export(trained("step"), "onnx", tmp_path / "m.onnx")
    assert shapes(done.path) == [[4, "batch", 2], ["batch", 2]]
    x = unseen(3).unflatten(1, (4, 2)).transpose(0, 1)
    torch.testing.assert_close(asked(done.path, {"x": x.contiguous()})["output"], stoker.load(trained("step"))(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["several", "record", "pair"])
def test_several_inputs_and_outputs(trained: Trained, tmp_path: Path, name: str) -> None:
    """Inputs by name and in a dict; outputs in a dict, a dataclass, a nested tuple with a None in it."""
    x, model = unseen(5), stoker.load(trained(name))
    extra: Any = x.flip(1) if name == "pair" else {"mean": x.mean(1, keepdim=True)}
    expected = model(x, extra=extra, scale=2.0)
    onnx = export(trained(name), "onnx", tmp_path / "m.onnx")
    found = asked(onnx.path, {"x": x, **({"extra": extra} if name == "pair" else {"extra_mean": extra["mean"]})})
    program = torch.export.load(export(trained(name), "pt2", tmp_path / "m.pt2").path).module()
    again = program(x, extra=extra, scale=2.0)
    if name == "several":
        assert list(found) == ["logits", "best", "x_out"] and list(again) == ["logits", "best", "x"]
        wanted = {"logits": expected["logits"], "best": expected["best"], "x_out": x}
    elif name == "record":
        assert list(again) == ["logits"]
        wanted = {"logits": expected.logits}
        assert onnx.notes == ("not among the outputs: cache (object)",)
    else:
        wanted = {"output_0": expected[0], "output_1_0": expected[1][0]}
        assert again[1][1] is None
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value)
    logits = again[0] if name == "pair" else again["logits"]
    assert torch.equal(logits, next(iter(wanted.values())))


@torch.no_grad()
def test_sizes_that_vary_in_the_data_stay_open(trained: Trained, tmp_path: Path) -> None:
    done = export(trained("lengths"), "onnx", tmp_path / "m.onnx")
    assert shapes(done.path) == [["batch", "size_1"], ["batch", "size_1"], ["batch", 2]]
    for rows, length in ((1, 2), (5, 30)):
        ids, mask = ids_unseen(rows, length)
        found = asked(done.path, {"input_ids": ids, "attention_mask": mask})["output"]
        torch.testing.assert_close(found, stoker.load(trained("lengths"))(ids, mask))


@torch.no_grad()
def test_a_model_of_transformers(trained: Trained, tmp_path: Path) -> None:
    """Its step gives it labels, which the graph does without; its output is a ModelOutput."""
    pytest.importorskip("transformers", reason="needs stoker[text]")
    model = stoker.load(trained("bert"))
    ids, mask = ids_unseen(3, 7)
    expected = model(input_ids=ids, attention_mask=mask).logits
    onnx = export(trained("bert"), "onnx", tmp_path / "m.onnx")
    found = asked(onnx.path, {"input_ids": ids, "attention_mask": mask})
    assert list(found) == ["logits"]
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-5)
    program = torch.export.load(export(trained("bert"), "pt2", tmp_path / "m.pt2").path).module()
    again = program(input_ids=ids, attention_mask=mask)
    assert type(again) is dict  # a program that loads it need not have transformers
    torch.testing.assert_close(again["logits"], expected)


@torch.no_grad()
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_batch_size_that_must_be_fixed(trained: Trained, tmp_path: Path, format: str) -> None:
    done = export(trained("fixed"), format, tmp_path / f"m{SUFFIXES[format]}", batch_size=4)
    assert ("input", "x float32 [4, 8]") in done.signature
    (note,) = done.notes
    assert note.startswith("the batch size is fixed at 4 rows, since otherwise torch.export cannot follow it")
    x = unseen(4)
    found = asked(done.path, {"x": x})["output"] if format == "onnx" else torch.export.load(done.path).module()(x)
    torch.testing.assert_close(found, stoker.load(trained("fixed"))(x))


def test_a_batch_of_one_row(trained: Trained, tmp_path: Path) -> None:
    done = export(trained("mlp"), "pt2", tmp_path / "m.pt2", batch_size=1)
    assert done.notes == (
        "the batch size is fixed at 1 row, which is what the batch has; --batch-size 2 leaves it open",
    )


def test_a_model_that_draws_is_not_compared_by_value(trained: Trained, tmp_path: Path) -> None:
    done = export(trained("noise"), "onnx", tmp_path / "m.onnx")
    assert done.checked.endswith("the model draws random numbers, so values were not compared")


def test_no_sample_is_in_the_file(trained: Trained, tmp_path: Path) -> None:
    done = [export(trained("mlp"), format, tmp_path / f"m{SUFFIXES[format]}").path for format in ("onnx", "pt2")]
    first_row = recipes.data(32, seed=2)[0][0].numpy().tobytes()
    weight = stoker.load(trained("mlp")).state_dict()["0.weight"].numpy().tobytes()
    for file in done:
        assert weight in file.read_bytes() and first_row not in file.read_bytes()


def test_large_weights_are_a_second_file(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "ONE_FILE_BYTES", 0)
    done = export(trained("mlp"), "onnx", tmp_path / "m.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert done.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    x = unseen(2)
    torch.testing.assert_close(asked(done.path, {"input": x})["output"], stoker.load(trained("mlp"))(x).detach())


# ------------------------------------------------------------------ what is left alone


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_else_changes(trained: Trained, format: str, capfd: pytest.CaptureFixture[str]) -> None:
    run = trained("conv")

    def content() -> dict[str, bytes]:
        files = [file for file in run.rglob("*") if file.is_file() and file.parent.name != "export"]
        return {str(file.relative_to(run)): file.read_bytes() for file in files}

    before, torch_state = content(), torch.get_rng_state()
    done = export(run, format)
    assert done.path == run / "export" / f"recipes-conv{SUFFIXES[format]}" and done.path.is_file()
    assert content() == before and torch.equal(torch.get_rng_state(), torch_state)
    assert capfd.readouterr() == ("", "")


def test_the_models_own_warnings_are_shown(trained: Trained, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the model's own"):
        run = trained("warn")
    with pytest.warns(UserWarning, match="the model's own") as said:
        export(run, "onnx", tmp_path / "m.onnx")
    assert {str(warning.message) for warning in said} == {"the model's own"}


@pytest.fixture
def former(tmp_path: Path) -> Iterator[Path]:
    """A file that an export which fails must leave as it is, alone in its folder."""
    file = tmp_path / "former"
    file.write_text("former")
    yield file
    assert file.read_text() == "former"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("branch", r"Odd cannot be exported as \w+: torch.export cannot follow it\n  why:    .*data-dependent(.|\n)*"
                   r"recipes.py:\d+: if self.habit == \"branch\"(.|\n)*--format pt and safetensors"),
        ("false", r"Odd cannot be exported as \w+: .* computes something else\n  why:    on 8 rows: output 0 differs"),
        ("parts", r"the recipe's step does not call the model itself(.|\n)*--format pt and safetensors"),
        ("broken", r"the recipe's step raised ValueError: no evaluation here"),
    ],
)  # fmt: skip
def test_models_that_are_refused(trained: Trained, former: Path, name: str, message: str, format: str) -> None:
    with pytest.raises(UserError, match=message):
        export(trained(name), format, former)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk(trained: Trained, former: Path, format: str) -> None:
    run = trained("mlp")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(UserError, match="cannot write"):
            export(run, format, former)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------ bad input


def test_bad_words(trained: Trained, tmp_path: Path) -> None:
    run = trained("mlp")
    with pytest.raises(UserError, match=r"no format 'onx' \(did you mean onnx\?\)(.|\n)*pt, safetensors, onnx, pt2"):
        export(run, "onx")
    with pytest.raises(UserError, match=r"there is no folder .*nowhere(.|\n)*mkdir -p .*nowhere"):
        export(run, "pt", tmp_path / "nowhere" / "m.pt")
    with pytest.raises(UserError, match="is a folder"):
        export(run, "pt", tmp_path)
    with pytest.raises(UserError, match=r"m.pt2 is named as if it were pt2, and the format is onnx"):
        export(run, "onnx", tmp_path / "m.pt2")
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        export(run, "onnx", tmp_path / "m.onnx", batch_size=0)
    with pytest.raises(UserError, match=r"cannot write /proc/m.pt"):
        export(run, "pt", "/proc/m.pt")
    assert list(tmp_path.iterdir()) == []


def test_no_run_and_no_checkpoint(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        export(tmp_path / "none", "pt")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_bytes((trained("mlp") / "run.json").read_bytes())
    (begun / "recipe.py").write_bytes((trained("mlp") / "recipe.py").read_bytes())
    with pytest.raises(UserError, match=r"has no checkpoint yet(.|\n)*stoker resume"):
        export(begun, "onnx")
    assert not (begun / "export").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra(trained: Trained, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained("mlp")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package},(.|\n)*pip install 'stoker\[export\]'"):
        export(run, "onnx")


# ------------------------------------------------------------------ the tolerance


@pytest.mark.parametrize(
    ("found", "expected", "fine"),
    [
        ([1.0], [1.0 + 1e-5], True),
        ([1.0], [1.01], False),
        ([0.0, 1000.0], [0.01, 1000.0], True),  # rounding beside a large value
        ([0.0, 1.0], [0.01, 1.0], False),
        ([float("-inf"), 1.0], [float("-inf"), 1.0], True),
        ([float("-inf"), 1.0], [float("inf"), 1.0], False),
        ([0.0, 1.0], [float("nan"), 1.0], False),
        ([float("nan"), 1.0], [0.0, 1.0], False),
        ([float("nan")], [float("nan")], True),
        ([], [], True),
        ([1, 2], [1, 2], True),
        ([1, 2], [1, 3], False),
        ([1] * 2000, [2] + [1] * 1999, True),  # a tie, within rounding
        ([True, False], [True, True], False),
        ([1.0, 1.0], [1.0], False),
        ([1], [1.0], False),
    ],
)
def test_tolerance(found: list[Any], expected: list[Any], fine: bool) -> None:
    tensors = torch.tensor(found), torch.tensor(expected)
    if fine:
        assert difference([tensors[0]], [tensors[1]]) <= 0.01
    else:
        with pytest.raises(Wrong):
            difference([tensors[0]], [tensors[1]])


def test_a_missing_output_is_wrong() -> None:
    with pytest.raises(Wrong, match="1 outputs instead of 2"):
        difference([torch.zeros(1)], [torch.zeros(1)] * 2)


WRAPPED = """
import torch
from torch import nn

import stoker


def recipe():
    data = torch.randn(16, 4), torch.arange(16) % 2
    return stoker.Recipe(
        model=lambda: torch.compile(nn.Sequential(nn.Linear(4, 2)), backend="eager"),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        train=stoker.Loader(data, 8),
    )
"""


@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_names_are_free_of_wrappers(tmp_path: Path, format: str) -> None:
    (tmp_path / "wrapped.py").write_text(WRAPPED)
    made = load_source(str(tmp_path / "wrapped.py")).recipe({})
    stoker.fit(made, steps=2, out=tmp_path / "run", quiet=True)
    path = export(tmp_path / "run", format).path
    state = torch.load(path, weights_only=True) if format == "pt" else load_file(path)
    assert set(state) == {"0.weight", "0.bias"}
    nn.Sequential(nn.Linear(4, 2)).load_state_dict(state)


# ------------------------------------------------------------------ the command


def test_the_command(trained: Trained, tmp_path: Path) -> None:
    assert list(OFFERED) == FORMATS
    out = tmp_path / "m.onnx"
    said = CliRunner().invoke(command, [str(trained("mlp")), "--format", "onnx", "--out", str(out)])
    assert said.exit_code == 0, said.output
    lines = said.output.splitlines()
    assert re.fullmatch(rf"{out}  \d\.\d+ kB", lines[0])
    assert [line.split()[0] for line in lines[1:]] == ["weights", "input", "output", "checked"]
    assert "step-0000000" in lines[1] and "[batch, 8]" in lines[2]
    said = CliRunner().invoke(command, [str(trained("mlp")), "--format", "tflite"])
    assert said.exit_code == 2 and "'tflite' is not one of 'pt', 'safetensors', 'onnx', 'pt2'" in said.output
