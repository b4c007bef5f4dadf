"""Weights that do not fit are told by their likely reason; what fits is taken on request; nothing changes by halves."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stoker import UserError
from stoker.naming import names
from stoker.naming.match import compare, load_tensors
from stoker.naming.reasons import fit_names
from stoker.weights import load_weights


def mlp(width: int = 8, head: str = "head", **more: nn.Module) -> nn.ModuleDict:
    torch.manual_seed(len(head) + width)
    body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, width))
    return nn.ModuleDict({"body": body, head: nn.Linear(width, 2), **more})


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in names.tensors(module).items()}


def refused(module: nn.Module, saved: Mapping[str, Any], **options: Any) -> str:
    """The message for weights that do not fit; the module is as it was."""
    before = state(module)
    with pytest.raises(UserError) as caught:
        load_weights(module, saved, **options)
    after = names.tensors(module)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return str(caught.value)


def test_all_that_fits_is_taken() -> None:
    saved, model = state(mlp()), mlp()
    for value in model.parameters():
        nn.init.zeros_(value)
    report = load_weights(model, saved)
    assert report.complete
    assert set(report.taken) == set(saved)
    assert (report.missing, report.unexpected, report.reshaped, report.stripped, report.hints) == ((),) * 5
    assert all(torch.equal(value, saved[name]) for name, value in names.tensors(model).items())
    assert str(report).splitlines()[0] == "11 of 11 tensors taken from the dict"


def test_a_renamed_module_is_told_once() -> None:
    text = refused(mlp(head="fc"), state(mlp(head="head")))
    assert text.count("head.* there may be fc.* here: 2 tensors of the same shapes") == 1
    assert "partial=True (--partial) takes the 9 tensors that fit" in text
    assert "body" not in text


def test_a_renamed_module_of_another_width() -> None:
    text = refused(
        nn.ModuleDict({"a": nn.Linear(1, 1), "fc": nn.Linear(5, 2)}),
        state(nn.ModuleDict({"a": nn.Linear(1, 1), "head": nn.Linear(3, 2)})),
    )
    assert "head.* there may be fc.* here: 1 tensor of the same shape; of another shape: fc.weight (2, 3) there" in text
    assert "only" not in text


def test_a_module_renamed_in_every_layer_is_told_once() -> None:
    def layers(name: str) -> nn.Module:
        return nn.ModuleDict(
            {"layers": nn.ModuleList(nn.ModuleDict({name: mlp(), "x": nn.Linear(1, 1)}) for _ in range(30))}
        )

    text = refused(layers("attn"), state(layers("attention")))
    assert "layers.*" not in text
    assert "*.attention.* there may be *.attn.* here: 330 tensors of the same shapes" in text
    assert "and 322 more" in text
    assert len(text.splitlines()) < 30


@pytest.mark.parametrize(
    ("there", "here", "line"),
    [
        ({"model": mlp()}, {"": mlp()}, "model.* there may be * here"),
        ({"encoder": mlp()}, {"backbone": mlp()}, "encoder.* there may be backbone.* here: 11 tensors"),
    ],
)
def test_a_prefix_is_told(there: dict[str, nn.Module], here: dict[str, nn.Module], line: str) -> None:
    def whole(parts: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
        return {f"{p}.{n}".removeprefix("."): v for p, m in parts.items() for n, v in names.tensors(m).items()}

    report = compare(whole(there), whole(here))
    assert any(line in hint for hint in report.hints), report.hints


def test_shifted_layers_are_renames() -> None:
    then = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    now = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 2))
    assert "2.* there may be 3.* here: 2 tensors of the same shapes" in refused(now, state(then))


def test_the_same_network_under_other_names() -> None:
    there = {
        f"_{i}.{part}.{leaf}": torch.ones(i + 1) for i in range(20) for part in ("ab"[i % 2]) for leaf in ("w", "b")
    }
    here = {f"{i}.{'cd'[i % 2]}{i}.{leaf}": torch.ones(i + 1) for i in range(20) for leaf in ("w", "b")}
    hints = compare(there, here).hints
    assert hints[0].startswith("all 40 shapes are the same in the same order; dict(zip(model.state_dict(), ")
    assert hints[1] == "_0.a.* there may be 0.c0.* here: 2 tensors of the same shapes"
    assert (len(hints), hints[-1]) == (10, "and 12 more such renames")


def test_names_of_an_older_framework() -> None:
    def norm(a: str, b: str) -> dict[str, torch.Tensor]:
        return {f"{i}.LayerNorm.{n}": torch.ones(4) for i in range(5) for n in (a, b)}

    hints = compare(norm("gamma", "beta"), norm("weight", "bias")).hints
    assert "*.gamma there may be *.weight here: 5 tensors of the same shapes in the same modules" in hints
    assert "*.beta there may be *.bias here: 5 tensors of the same shapes in the same modules" in hints


def test_another_width_is_told_once_with_its_dimension() -> None:
    text = refused(mlp(16), state(mlp(8)))
    (line,) = [line for line in text.splitlines() if "width" in line]
    assert "width 8 there, 16 here: body.0.weight (dimension 0), body.0.bias (dimension 0)" in line
    assert "body.0.weight: (8, 3) torch.float32 there, (16, 3) torch.float32 here" in text


def test_transposed_weights_and_other_ranks() -> None:
    saved = {"weight": torch.ones(5, 3), "bias": torch.ones(1, 3)}
    text = refused(nn.Linear(5, 3), saved | {"more": torch.ones(1)})
    assert "nothing of the dict fits the model" in text
    assert "weight is transposed there" in text
    assert "bias has 2 dimensions there, 1 here" in text


def test_added_and_removed_layers() -> None:
    more = {"extra": nn.Linear(4, 4), "more": nn.ModuleDict({"a": nn.Linear(5, 5), "b": nn.Linear(6, 5)})}
    assert "only here: extra.* (2 tensors), more.* (4 tensors)" in refused(mlp(**more), state(mlp()))
    text = refused(mlp(), state(mlp(**more)))
    assert "only there: extra.* (2 tensors), more.* (4 tensors)" in text
    assert "unknown here: extra.weight" in text


def test_a_misspelt_name() -> None:
    saved = state(mlp())
    saved["body.0.wieght"] = saved.pop("body.0.weight")
    text = refused(mlp(), saved)
    assert "*.wieght there may be *.weight here" in text
    saved["body.0.wieght"] = torch.ones(1)
    assert "missing there: body.0.weight (did you mean body.0.wieght?)" in refused(mlp(), saved)


def test_counters_that_old_files_lack() -> None:
    saved = {name: value for name, value in state(mlp()).items() if "num_batches" not in name}
    model = mlp()
    report = load_weights(model, saved)
    assert report.complete
    assert report.missing == ("body.1.num_batches_tracked",)
    assert "num_batches_tracked stay as they are" in str(report)


def test_partial_takes_what_fits_and_lists_the_rest() -> None:
    model = mlp(8, head="fc", extra=nn.Linear(4, 4))
    saved, before = state(mlp(8)), state(model)
    saved["body.0.weight"] = torch.ones(9, 3)
    report = load_weights(model, saved, partial=True)
    assert set(report.taken) == {name for name in saved if name.startswith("body.")} - {"body.0.weight"}
    assert report.missing == ("fc.weight", "fc.bias", "extra.weight", "extra.bias")
    assert report.unexpected == ("head.weight", "head.bias")
    assert report.reshaped == (("body.0.weight", (9, 3), (8, 3)),)
    assert not report.complete
    after = names.tensors(model)
    for name, value in after.items():
        assert torch.equal(value, saved[name] if name in report.taken else before[name]), name
    text = str(report)
    for part in (
        "8 of 13 tensors",
        "missing there: fc.weight",
        "unknown here: head.weight",
        "(9, 3) there, (8, 3) here",
    ):
        assert part in text


def test_partial_that_takes_nothing_is_an_error() -> None:
    assert "nothing of the dict fits" in refused(nn.Linear(2, 2), {"a": torch.ones(3)}, partial=True)


@pytest.mark.parametrize(
    ("theirs", "mine", "fits"),
    [
        (torch.float16, torch.float32, True),
        (torch.bfloat16, torch.float16, True),
        (torch.float64, torch.float32, True),
        (torch.int64, torch.float32, False),
        (torch.float32, torch.int64, False),
        (torch.int32, torch.int64, False),
        (torch.complex64, torch.float32, False),
    ],
)
def test_only_floating_types_are_cast_and_it_is_said(theirs: torch.dtype, mine: torch.dtype, fits: bool) -> None:
    model = nn.Module()
    model.register_buffer("x", torch.zeros(2, dtype=mine))
    model.register_buffer("y", torch.zeros(1))
    saved = {"x": torch.ones(2, dtype=theirs), "y": torch.ones(1)}
    spelled = [str(d).removeprefix("torch.") for d in (theirs, mine)]
    if fits:
        report = load_weights(model, saved)
        assert f"cast: 1 tensor from {spelled[0]} to {spelled[1]}" in str(report)
        assert model.x.dtype == mine
        assert model.x.tolist() == [1, 1]
    else:
        assert f"x: (2,) {theirs} there, (2,) {mine} here" in refused(model, saved)
        assert load_weights(model, saved, partial=True).retyped == (("x", *spelled),)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_one_name_of_a_tied_weight_is_enough() -> None:
    model = Tied()
    report = load_weights(model, {"embed.weight": torch.ones(5, 3)})
    assert report.tied == ("head.weight",)
    assert model.head.weight.eq(1).all()
    assert load_weights(model, {"head.weight": torch.zeros(5, 3)}).tied == ("embed.weight",)
    assert model.embed.weight.eq(0).all()


def test_two_weights_for_a_tied_one_are_refused() -> None:
    ones, zeros = torch.ones(5, 3), torch.zeros(5, 3)
    text = refused(Tied(), {"embed.weight": ones, "head.weight": zeros})
    assert "embed.weight and head.weight are one tensor in the model" in text
    assert len(load_weights(Tied(), {"embed.weight": ones, "head.weight": ones.clone()}).taken) == 2


def test_a_hook_that_fails_leaves_the_model_as_it_was() -> None:
    class Picky(nn.Linear):
        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
            raise LookupError("not today")

    model = nn.Sequential(nn.Linear(2, 2), Picky(2, 2))
    text = refused(model, {name: value + 1 for name, value in state(model).items()})
    assert "raised LookupError: not today" in text


def test_a_lazy_layer_takes_its_shape_from_the_file() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules are "a new feature"
        model = nn.LazyLinear(3)
    report = load_weights(model, {"weight": torch.ones(3, 7), "bias": torch.ones(3)})
    assert report.complete
    assert model.weight.shape == (3, 7)


def test_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="meta device"):
        load_weights(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})


# Prefixes ------------------------------------------------------------------------------------------------------------

PREFIXES: list[tuple[Callable[[str], str], tuple[str, ...]]] = [
    (lambda n: f"module.{n}", ("module.",)),
    (lambda n: f"_orig_mod.{n}", ("_orig_mod.",)),
    (lambda n: f"module._orig_mod.{n}", ("_orig_mod.", "module.")),
    (lambda n: n.replace("body.", "body._orig_mod."), ("_orig_mod.",)),
    (lambda n: f"model.{n}", ("model.",)),
    (lambda n: f"model._orig_mod.{n}", ("_orig_mod.", "model.")),
    (lambda n: f"net.inner.{n}", ("net.inner.",)),
]


@pytest.mark.parametrize(("spell", "stripped"), PREFIXES)
def test_prefixes_are_dropped_and_named(spell: Callable[[str], str], stripped: tuple[str, ...]) -> None:
    saved, model = state(mlp()), mlp(8)
    report = load_weights(model, {spell(name): value for name, value in saved.items()})
    assert report.complete
    assert report.stripped == stripped
    assert f"prefix: {stripped[0]!r} is dropped" in str(report)
    assert torch.equal(model["head"].weight, saved["head.weight"])


def test_a_module_of_the_models_own_called_module_stays() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "x": nn.Linear(1, 1)})
    assert load_weights(model, state(model)).stripped == ()
    assert load_weights(model, {f"module.{n}": v for n, v in state(model).items()}).stripped == ("module.",)


def test_a_prefix_that_only_some_names_have() -> None:
    saved = {f"model.{n}": v for n, v in state(mlp()).items()} | {"criterion.weight": torch.ones(2)}
    assert "unknown here: criterion.weight" in refused(mlp(), saved)
    report = load_weights(mlp(), saved, partial=True)
    assert (len(report.taken), report.unexpected, report.stripped) == (11, ("criterion.weight",), ("model.",))


def test_a_prefix_goes_though_the_head_differs() -> None:
    saved = {f"model.{n}": v for n, v in state(mlp(head="fc")).items()}
    text = refused(mlp(), saved)
    assert "fc.* there may be head.* here" in text
    assert "dropped from the saved names: model." in text


def test_names_that_would_become_one_keep_their_prefix() -> None:
    saved = {"a.weight": torch.ones(1), "model.a.weight": torch.zeros(1)}
    fitted, stripped, _ = fit_names(saved, ["a.weight"])
    assert (fitted.keys(), stripped) == (saved.keys(), [])


def test_the_count_of_an_average_is_left_out() -> None:
    average = torch.optim.swa_utils.AveragedModel(mlp())
    report = load_weights(mlp(), dict(average.state_dict()))
    assert report.complete
    assert "n_averaged" in report.notes[0]


def test_a_dict_that_is_no_state_dict() -> None:
    with pytest.raises(UserError, match="no tensors by name"):
        load_weights(nn.Linear(1, 1), {"weight": [1.0]})
    with pytest.raises(UserError, match="2 sets of tensors"):
        load_weights(nn.Linear(1, 1), {"g": state(nn.Linear(1, 1)), "d": state(nn.Linear(1, 1))})


def test_many_names_are_compared_in_linear_time() -> None:
    """40,000 names: anything quadratic would take minutes."""
    there = {f"encoder.layer.{i}.{part}.weight": torch.empty(2) for i in range(5000) for part in "qkvo"}
    here = {f"blocks.{i}.{part}.weight": torch.empty(2) for i in range(5000) for part in "qkvo"}
    report = compare(there, here)
    assert report.hints == ("encoder.layer.* there may be blocks.* here: 20000 tensors of the same shapes",)


def test_a_part_of_a_model(tmp_path: Path) -> None:
    save_file(state(mlp()["body"]), tmp_path / "trunk.safetensors")
    model = mlp(8, head="other")
    assert load_weights(model["body"], tmp_path / "trunk.safetensors").complete
    report = load_tensors(model, state(mlp(8, head="other")), source="x")
    assert report.complete
