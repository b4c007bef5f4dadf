"""How a model is wrapped is no part of what is saved: names are free of wrappers, and runs go on under other ones."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import stoker
from stoker.naming import names


class Net(nn.Module):
    """A part that is called `module` by its own right, a shared one, and a buffer that is not saved."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.module = nn.Linear(2, 3)
        self.body = nn.Sequential(wrap(nn.Linear(3, 3)), nn.BatchNorm1d(3))
        self.again = self.body
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self.module(x)) * self.scale


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def bare(module: nn.Module) -> nn.Module:
    return module


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "none": bare,
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "both": lambda m: compiled(nn.DataParallel(m)),
    "thrice": lambda m: nn.DataParallel(compiled(nn.DataParallel(m))),
    "recomputed": checkpoint_wrapper,
}


@pytest.mark.parametrize(("outer", "inner"), list(product(WRAPS, WRAPS)))
def test_names_are_those_of_the_bare_module(outer: str, inner: str) -> None:
    torch.manual_seed(0)
    plain = Net(bare)
    torch.manual_seed(0)
    wrapped = WRAPS[outer](Net(WRAPS[inner]))
    saved = names.state_dict(plain)
    assert list(saved) == list(plain.state_dict())
    assert list(names.state_dict(wrapped)) == list(saved)
    assert all(torch.equal(value, saved[name]) for name, value in names.tensors(wrapped).items())
    assert list(names.named_parameters(wrapped)) == [name for name, _ in plain.named_parameters()]
    assert list(names.named_buffers(wrapped)) == [name for name, _ in plain.named_buffers()]
    assert names.named_modules(wrapped).keys() == dict(plain.named_modules(remove_duplicate=False)).keys()
    assert type(names.submodule(wrapped, "module")) is nn.Linear
    assert names.submodule(wrapped, "body.0").weight is names.named_parameters(wrapped)["body.0.weight"]
    assert type(names.submodule(wrapped, "")) is Net
    assert type(names.unwrapped(wrapped)) is Net
    names.load_state_dict(wrapped, {name: value + 1 for name, value in saved.items()})
    assert all(torch.equal(value, saved[name] + 1) for name, value in names.tensors(wrapped).items())


def test_an_average_keeps_its_count() -> None:
    average = AveragedModel(Net(compiled))
    assert list(names.state_dict(average)) == ["n_averaged", *Net(bare).state_dict()]
    average.update_parameters(Net(compiled))
    other = AveragedModel(Net(bare))
    names.load_state_dict(other, names.state_dict(average))
    assert int(other.n_averaged) == 1


def test_a_level_stays_where_names_would_become_one() -> None:
    twice = AveragedModel(AveragedModel(nn.Linear(2, 1)))
    assert list(names.state_dict(twice)) == ["n_averaged", "module.n_averaged", "module.weight", "module.bias"]
    far = AveragedModel(nn.DataParallel(AveragedModel(nn.Linear(2, 1))))
    assert len(names.state_dict(far)) == len(far.state_dict()) == 4
    names.load_state_dict(far, names.state_dict(far))


def test_a_class_of_the_users_own_is_no_wrapper() -> None:
    class DataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1)
            self._orig_mod = nn.Linear(1, 1)

    expected = ["module.weight", "module.bias", "_orig_mod.weight", "_orig_mod.bias"]
    assert list(names.state_dict(DataParallel())) == expected
    assert list(names.state_dict(nn.DataParallel(DataParallel()))) == expected


def test_a_subclass_with_parts_of_its_own() -> None:
    class Parallel(nn.DataParallel):  # type: ignore[type-arg]
        def __init__(self, inside: nn.Module) -> None:
            super().__init__(inside)
            self.extra = nn.Parameter(torch.zeros(2))

    assert list(names.state_dict(Parallel(nn.Linear(1, 1)))) == ["extra", "weight", "bias"]


def test_buffers_that_are_not_saved_have_an_owner() -> None:
    model = WRAPS["both"](Net(compiled))
    owner, leaf = names.owner_of_buffer(model, "scale")
    assert (type(owner), leaf) == (Net, "scale")
    owner, leaf = names.owner_of_buffer(model, "body.0.mask")  # one that is yet to be made
    assert (type(owner), leaf) == (nn.Linear, "mask")
    with pytest.raises(AttributeError, match="'nowhere'"):
        names.submodule(model, "nowhere")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError):
        names.load_state_dict(nn.Linear(1, 1), {"weigth": torch.zeros(1, 1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        names.load_state_dict(nn.Linear(1, 1), {"weight": torch.zeros(1, 1)})


def test_naming_imports_no_compiler() -> None:
    code = (
        "import sys, torch; from stoker.naming import names; from torch import nn;"
        "before = set(sys.modules); names.state_dict(nn.Sequential(nn.Linear(1, 1)));"
        "print(sorted(set(sys.modules) - before), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[] False", done.stderr


# Runs ----------------------------------------------------------------------------------------------------------------


def in_place(module: nn.Module) -> nn.Module:
    """What --compile does, by a compiler that is quick."""
    module.compile(backend="eager")
    return module


def part(module: nn.Module) -> nn.Module:
    """One layer compiled, deep in the model."""
    assert isinstance(module, nn.Sequential)
    module[0][0] = compiled(module[0][0])
    return module


MODES: dict[str, tuple[Callable[[nn.Module], Any], dict[str, Any], dict[str, Any]]] = {
    "plain": (bare, {}, {}),
    "compiled in place": (in_place, {}, {}),
    "compiled": (compiled, {}, {}),
    "part compiled": (part, {}, {}),
    "parallel": (nn.DataParallel, {}, {}),
    "averaged": (bare, {"ema": 0.9}, {}),
    "microbatched": (bare, {}, {"microbatch": 4}),
}


def recipe(mode: str) -> stoker.Recipe:
    wrap, changes, _ = MODES[mode]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=generator)
    inner = [nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU()]
    return stoker.Recipe(
        model=lambda: wrap(nn.Sequential(nn.Sequential(nn.Linear(4, 6), *inner[1:]), nn.Dropout(0.2), nn.Linear(6, 2))),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        schedule=stoker.cosine(),
        train=stoker.Loader((x, (x.sum(1) > 0).long()), 8, shuffle=True),
        **changes,
    )


def fit(mode: str, out: Path, epochs: int) -> stoker.Run:
    return stoker.fit(recipe(mode), epochs=epochs, out=out, quiet=True, force=True, device="cpu", **MODES[mode][2])


def saved(out: Path, file: str = "model") -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / "latest" / f"{file}.safetensors")


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of a run in every mode, and a whole one."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("halves")
    for mode in MODES:
        fit(mode, folder / mode, 1)
    shutil.copytree(folder / "plain", folder / "whole", symlinks=True)
    fit("plain", folder / "whole", 2)
    return folder


def test_all_modes_save_the_same_names(halves: Path) -> None:
    plain = saved(halves / "plain")
    assert list(plain)[:2] == ["0.0.bias", "0.0.weight"]
    for mode in MODES:
        found = saved(halves / mode)
        assert found.keys() == plain.keys(), mode
        assert saved(halves / mode, "state").keys() >= saved(halves / "plain", "state").keys(), mode
        for name, tensor in found.items():
            if mode == "microbatched":  # dropout draws once per microbatch
                continue
            assert torch.equal(tensor, plain[name]), (mode, name)


@pytest.mark.parametrize(("then", "now"), list(product(MODES, MODES)))
def test_a_run_goes_on_in_another_mode(halves: Path, tmp_path: Path, then: str, now: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(halves / then, out, symlinks=True)
    run = fit(now, out, 2)
    assert (run.step, run.reason) == (8, "epochs")
    whole, found = saved(halves / "whole"), saved(out)
    assert found.keys() == whole.keys()
    assert saved(out, "state").keys() == saved(halves / "whole", "state").keys()
    if "microbatched" not in (then, now):
        assert [name for name, tensor in whole.items() if not torch.equal(found[name], tensor)] == []
    average = out / "checkpoints" / "latest" / "ema.safetensors"
    assert average.exists() == (now == "averaged")
    if now == "averaged":
        assert load_file(average).keys() == whole.keys()


@pytest.mark.filterwarnings("ignore:the weights of")  # the source of the recipe is not the same, and is said not to be
@pytest.mark.parametrize("then", MODES)
@pytest.mark.parametrize("now", ["plain", "compiled", "parallel"])
def test_a_run_is_loaded_in_another_mode(halves: Path, then: str, now: str) -> None:
    x = torch.ones(3, 4)
    plain = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU()), nn.Dropout(0.2), nn.Linear(6, 2))
    plain.load_state_dict(saved(halves / then, "ema" if then == "averaged" else "model"))
    model = stoker.load(halves / then, recipe(now))
    assert not model.training
    assert torch.equal(model(x), plain.eval()(x))


def test_an_average_begins_with_the_weights_and_is_dropped() -> None:
    from stoker.devices.strategy import Single
    from stoker.start import Limits, build_state

    strategy, limits = Single(torch.device("cpu")), Limits(1, None)
    plain = build_state(recipe("plain"), strategy, limits, 0)
    averaged = build_state(recipe("averaged"), strategy, limits, 1)
    assert averaged.ema is not None
    notes = averaged.load(names.tensors(plain.model), None, plain.tree())
    assert len(notes) == 1 and "ema=0.9" in notes[0] and "begins with" in notes[0]
    assert all(torch.equal(a, b) for a, b in zip(averaged.ema.parameters(), plain.model.parameters(), strict=True))
    notes = plain.load(names.tensors(averaged.model), names.tensors(averaged.ema), averaged.tree())
    assert len(notes) == 1 and "is dropped" in notes[0]
    assert plain.load(names.tensors(plain.model), None, plain.tree()) == []
