"""What a stranger may do to a run's folder before handing it on: files altered, forged, replaced, pointed elsewhere.

`mutate` changes a run at random and says what it did. A forger knows how checksums are made: half of what is altered is
sealed again.
"""

import hashlib
import importlib.util
import json
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker.checkpoint.store import _digest, _spelled

RECIPE = '''
from os import system  # a function that is not the recipe's, within its reach

import shapes
import stoker
import torch
from kit import sizes
from torch import nn


def recipe(lr: float = 0.05, width: int = 5, name: str = "plain", sides: tuple[int, ...] = (1, 2), switch: dict = {}):
    """Two classes, divided by a plane."""
    return stoker.Recipe(
        model=lambda: nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2)),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9),
        schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
        train=stoker.Loader(shapes.rows(sizes.COUNT, 0), 8, shuffle=True),
        val=stoker.Loader(shapes.rows(8, 1)),
        metrics={"right": lambda output, target: (output.argmax(1) == target).float()},
        ema=0.5,
    )
'''
SIBLINGS = {
    "shapes.py": """
import torch


def rows(n, seed):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return x, (x.sum(1) > 0).long()
""",
    "kit/__init__.py": "",
    "kit/sizes.py": "COUNT = 24\n",
}
STEPS = (3, 6)  # of the checkpoints of two epochs
EVIL = "import os\nopen({marker!r}, 'w').close()\nCOUNT = 24\nrows = recipe = lambda *a, **k: None\n"


def write_recipe(folder: Path) -> Path:
    """The recipe with the modules beside it."""
    for name, text in {**SIBLINGS, "planes.py": RECIPE}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "planes.py"


@dataclass
class Case:
    """A run to be altered, and what lies around it.

    Attributes:
        run: its folder.
        outside: what must stay as it is.
        marker: file that planted code makes.
        damaged: steps of checkpoints in which bytes were altered without sealing them again.
        forged: whether anything else was altered, so that nothing is known of what the run will do.
        did: what was altered, in words.
    """

    run: Path
    outside: Path
    marker: Path
    damaged: set[int] = field(default_factory=set)
    forged: bool = False
    did: list[str] = field(default_factory=list)

    def steps(self) -> dict[int, Path]:
        """The run's checkpoints as they were made."""
        return {int(p.name.split("-")[1]): p for p in sorted((self.run / "checkpoints").glob("step-0000000[36]-*"))}


def furnish(outside: Path, marker: Path, checkpoint: Path) -> None:
    """Lay out what links lead to: secrets, a valuable folder, programs, a good checkpoint."""
    evil = EVIL.format(marker=str(marker))
    shutil.copytree(checkpoint, outside / "step")
    for name, text in {
        "secret.txt": "secret\n",
        "valuable/a": "a" * 5000,
        "valuable/step-00000003-epoch-1/b": "b",
        "evil.py": evil,
        "kit/__init__.py": evil,
        "trap/planes.py": RECIPE,
        "trap/shapes.py": evil,
        "trap/kit/__init__.py": evil,
        "trap/kit/sizes.py": evil,
        "bare/shapes.py": evil,
        "bare/kit/__init__.py": evil,
        "colon/planes.py": evil,
        "colon/planes.py:x": RECIPE,
        "shapes.py": evil,
    }.items():
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_text(text)
    (outside / "evil.pt").write_bytes(b"\x80\x04cos\nsystem\nX\x05\x00\x00\x00touch\x85R.")


# ------------------------------------------------------------------ values

ESCAPES = "\x1b]0;owned\x07\x1b[31mred\x9b2J[/red][link=file:///etc]\u202e\r\nrun.json  good"


def deep(levels: int) -> Any:
    """Lists within lists."""
    node: Any = 0
    for _ in range(levels):
        node = [node]
    return node


VALUES: list[Callable[[random.Random], Any]] = [
    lambda draw: draw.choice([None, True, False, 0, 1, -1, 3, 6, 0.5, -0.0, 1e308, float("nan"), float("inf")]),
    lambda draw: draw.choice([2**31, 2**63, -(2**63), 2**64, 10**30, 10**4000, -(10**400)]),
    lambda draw: draw.choice(["", "x", "6", "nan", "\0", ESCAPES, "\ud800", "x" * 70_000, "[/bold]", "{0}", "%s", "$"]),
    lambda draw: draw.choice(["../../x", "/etc/passwd", "~/x", ".", "..", "CON", "a/b", "https://e.x/y", "os.system"]),
    lambda draw: draw.choice([[], {}, [[]], [0], ["x"], {"x": 0}, {"": {}}, [1, 2, 3], {"\n": [None]}]),
    lambda draw: draw.choice([{"$tensor": t} for t in ("x", 0, None, [], {}, "progress/step", "../x")]),
    lambda draw: draw.choice([{"$tuple": t} for t in (5, "abc", None, {}, [], [1, [2]], {"$tuple": []})]),
    lambda draw: draw.choice(
        [{"$dict": t} for t in (5, "ab", [[1]], [[[], 1]], [[1, 2]], {"a": "b"}, [["__class__", 1]])]
    ),
    lambda draw: draw.choice([{"$counter": t} for t in ([["a", "b"]], [["a", []]], 3, [[1, 1], [1, 2]])]),
    lambda draw: draw.choice([{"$float": t} for t in ("nan", "-inf", "x", [], None, "1e9999", True, "0x1")]),
    lambda draw: draw.choice([{"$float": "nan", "$tensor": "x"}, {"$exec": "1"}, {"__reduce__": []}, {"$": 0}]),
    lambda draw: deep(draw.choice([3, 90, 400, 2000])),
]


def value(draw: random.Random) -> Any:
    """Something that does not belong there."""
    return draw.choice(VALUES)(draw)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a tree of JSON."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, below in inside for place in places(below, (*path, key)))]


def alter(tree: Any, draw: random.Random, under: tuple[Any, ...] = ()) -> tuple[Any, str]:
    """Replace, remove, rename, move or add something somewhere in a tree; where, in words."""
    found = [place for place in places(tree) if place[: len(under)] == under]
    depth = draw.choice([1, 2, 3, 9]) + len(under)
    place = draw.choice([p for p in found if len(p) <= depth] or found)
    if not place:
        return value(draw), "all of it"
    holder = tree
    for key in place[:-1]:
        holder = holder[key]
    kind, key = draw.choice(["replace"] * 6 + ["remove", "add", "rename", "swap"]), place[-1]
    if kind == "remove":
        del holder[key]
    elif kind == "add" and isinstance(holder, dict):
        holder[draw.choice(["", "x", "$tensor", "$dict", "__class__", "step", ESCAPES, "\0"])] = value(draw)
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw.choice(["", "x", str(key) + " ", "$tensor", "../x", ESCAPES])] = holder.pop(key)
    elif kind == "swap":
        other = tree
        for step in draw.choice(found):
            other = other[step]
        holder[key] = json.loads(json.dumps(other))
    else:
        holder[key] = value(draw)
    return tree, f"{kind} {'/'.join(map(str, place))[:80]}"


# ------------------------------------------------------------------ checkpoint.json


def record_of(checkpoint: Path) -> dict[str, Any]:
    """The record as it stands."""
    return dict(json.loads((checkpoint / "checkpoint.json").read_text()))


def seal(checkpoint: Path, record: Any, *, files: bool = True) -> None:
    """Write a record whose checksums are right."""
    if files and isinstance(record, dict) and isinstance(record.get("files"), dict):
        for name, entry in record["files"].items():
            path = checkpoint / name if "\0" not in name and len(name) < 200 else checkpoint
            if isinstance(entry, dict) and path.is_file():
                data = path.read_bytes()
                entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        if isinstance(record, dict):
            record["sha256"] = _digest(record)
        text = _spelled(record)
    except (ValueError, RecursionError, TypeError):
        try:
            text = json.dumps(record)
        except RecursionError:
            text = "[" * 100_000
    (checkpoint / "checkpoint.json").write_text(text)


UNDER: list[tuple[Any, ...]] = [
    (),
    ("state",),
    ("state", "progress"),
    ("state", "objectives"),
    ("state", "objectives", "main", "optimizer"),
    ("state", "objectives", "main", "optimizer", "groups"),
    ("state", "objectives", "main", "scheduler"),
    ("state", "model_extra"),
    ("state", "transient"),
    ("state", "losses"),
    ("state", "fitted"),
    ("state", "stream"),
    ("state", "carry"),
    ("metrics",),
    ("files",),
]


def forged_record(case: Case, draw: random.Random) -> None:
    """One to three things in a record altered; sealed."""
    step, path = draw.choice(list(case.steps().items()))
    record: Any = record_of(path)
    for _ in range(draw.choice([1, 1, 1, 3])):
        under = draw.choice(UNDER)
        below = record
        for key in under:
            below = below.get(key, {}) if isinstance(below, dict) else {}
        try:
            record, where = alter(record, draw, under if below != {} else ())
        except (LookupError, TypeError, RecursionError):  # what was altered before is in the way
            continue
        case.did.append(f"forged step {step}: {where}")
    case.forged = True
    seal(path, record, files=False)


def damaged_record(case: Case, draw: random.Random) -> None:
    """A record's text altered, not sealed."""
    step, path = draw.choice(list(case.steps().items()))
    text = (path / "checkpoint.json").read_bytes()
    at = draw.randrange(len(text))
    kind = draw.randrange(9)
    changed = {
        0: lambda: text[:at],
        1: lambda: text[:at] + bytes([text[at] ^ (1 << draw.randrange(8))]) + text[at + 1 :],
        2: lambda: text.replace(b'"step": ', b'"step": 3, "step": ', 1),
        3: lambda: text.replace(b'"epoch": ', b'"epoch": NaN, "x": ', 1),
        4: lambda: text.replace(b'"loss": ', b'"x": Infinity, "loss": ', 1),
        5: lambda: text.replace(b'"epoch": ', b'"y": ' + b"9" * 5000 + b', "epoch": ', 1),
        6: lambda: draw.choice([b"[", b'{"a":']) * draw.choice([500, 5000, 100_000]),
        7: lambda: draw.choice([b"", b"\xef\xbb\xbf" + text, b"\xff\xfe", b"null", b"[]", text * 2, text + b" "]),
        8: lambda: text[:at] + draw.randbytes(draw.choice([1, 30])) + text[at:],
    }[kind]()
    (path / "checkpoint.json").write_bytes(changed)
    case.damaged.add(step)
    case.did.append(f"damaged record of step {step}, way {kind}")


NAMES = [
    "../../x",
    "../model.safetensors",
    "/etc/passwd",
    "",
    ".",
    "..",
    "\0",
    "a\0b",
    "x" * 300,
    "x" * 5000,
    "checkpoint.json",
    "./model.safetensors",
    "sub/model.safetensors",
    ESCAPES,
    "\ud800",
]


def forged_names(case: Case, draw: random.Random) -> None:
    """Other names in a record's list of files; sealed."""
    _, path = draw.choice(list(case.steps().items()))
    record = record_of(path)
    name = draw.choice([*NAMES, str(case.outside / "step" / "model.safetensors"), "../../../outside/secret.txt"])
    old = draw.choice(list(record["files"]))
    record["files"][name] = record["files"].pop(old) if draw.random() < 0.5 else record["files"][old]
    case.forged = True
    case.did.append(f"forged name {name[:60]!r} for {old}")
    seal(path, record, files=False)


# ------------------------------------------------------------------ safetensors

DTYPES = [
    "F32",
    "F64",
    "F16",
    "BF16",
    "I64",
    "I32",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "C64",
    "X",
    "",
]
SHAPES: list[Any] = [
    [],
    [0],
    [2**63],
    [2**64],
    [-1],
    [1, -5],
    [0, 2**63],
    [2**32, 2**32],
    [5, 5, 5],
    "x",
    None,
    [1.5],
    [[1]],
]
OFFSETS: list[Any] = [
    [0, 0],
    [0, 4],
    [-4, 0],
    [4, 0],
    [0, 2**63],
    [2**64, 2**64],
    [1],
    [],
    None,
    "x",
    [0, 10**30],
    [3, 7],
]


def forged_tensors(case: Case, draw: random.Random) -> None:
    """The header, or the data, of a file of tensors altered; sealed or not."""
    step, folder = draw.choice(list(case.steps().items()))
    file = folder / draw.choice(["model.safetensors", "state.safetensors", "ema.safetensors"])
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = draw.choice(["length", "header", "header", "header", "header", "text", "body"])
    if kind == "length":
        size = draw.choice([0, 1, 2, length - 1, length + 1, len(data), 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1])
        changed = struct.pack("<Q", size) + header + body
    elif kind == "header":
        text = altered_header(json.loads(header), draw)
        changed = struct.pack("<Q", len(text)) + text + body
    elif kind == "text":
        odd: list[bytes] = [
            b"",
            b"\xff",
            b"[" * 3000,
            b"null",
            b"{}",
            header[:-3],
            b"\0",
            header.replace(b"F32", b"F\xff2"),
        ]
        first = next(name for name in json.loads(header) if name != "__metadata__")
        odd.append(header.rstrip()[:-1] + f',"{first}":{{"dtype":"F32","shape":[],"data_offsets":[0,4]}}}}'.encode())
        text = draw.choice(odd)
        changed = struct.pack("<Q", len(text)) + text + body
    else:
        size = draw.choice([0, 1, len(body) - 1, len(body)])
        changed = data[: 8 + length] + draw.randbytes(size) + draw.choice([b"", b"x", b"\xff\xff\xff\x7f" * 4])
    file.write_bytes(changed)
    sealed = draw.random() < 0.8
    if sealed:
        seal(folder, record_of(folder))
        case.forged = True
    elif changed != data:
        case.damaged.add(step)
    case.did.append(f"{'sealed' if sealed else 'damaged'} {kind} of {file.name} of step {step}")


def altered_header(header: dict[str, Any], draw: random.Random) -> bytes:
    """A header of which one entry is altered."""
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    kind = draw.randrange(9)
    if kind == 0:
        header[name]["dtype"] = draw.choice(DTYPES)
    elif kind == 1:
        header[name]["shape"] = draw.choice(SHAPES)
    elif kind == 2:
        header[name]["data_offsets"] = draw.choice(OFFSETS)
    elif kind == 3:
        header[name]["data_offsets"] = header[draw.choice(names)]["data_offsets"]
    elif kind == 4:
        header[draw.choice(["", "x", "../x", ESCAPES, "num_batches_tracked", "$tensor"])] = header.pop(name)
    elif kind == 5:
        header["extra"] = {
            "dtype": draw.choice(DTYPES),
            "shape": [0],
            "data_offsets": header[name]["data_offsets"][:1] * 2,
        }
    elif kind == 6:
        header["__metadata__"] = value(draw)
    elif kind == 7:  # as many bytes, otherwise laid out
        entry = header[name]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        entry |= draw.choice(
            [{"dtype": "U8", "shape": [size]}, {"dtype": "BOOL", "shape": [size]}, {"shape": [1, *entry["shape"]]}]
        )
    else:
        header[name] = value(draw)
    try:
        text = json.dumps(header).encode()
    except RecursionError:
        return b"[" * 3000
    return text + b" " * (-len(text) % 8)


# ------------------------------------------------------------------ run.json and the source


def attacks(case: Case) -> list[tuple[str, dict[str, Any]]]:
    """What a forger would write into `run.json`, by the name of the part that it goes into."""
    out, run = str(case.outside), str(case.run)
    up = os.path.relpath(case.outside, case.run / "source")
    files = [
        f"{out}/{n}" for n in ("evil.py", "trap/planes.py", "bare/planes.py", "colon/planes.py:x", "", "secret.txt")
    ]
    files += [
        f"{run}/recipe.py",
        f"{run}/../outside/evil.py",
        "recipe.py",
        "~/planes.py",
        "/dev/zero",
        "/proc/self/mem",
    ]
    files += ["", "\0", "x" * 5000, ESCAPES, "/proc/kmsg", f"{run}/checkpoints", "-", "evil.py:recipe", "a" * 300]
    functions = ["system", "os.system", "__import__", "eval", "torch", "nn", "shapes", "", "recipe:x", "__builtins__"]
    functions += ["__loader__", "__class__", "\0", ESCAPES, "stoker", "x y"]
    modules: list[Any] = [[f"{up}/{n}"] for n in ("evil.py", "secret.txt", "shapes.py")]
    modules += [
        [f"{out}/evil.py"],
        ["../recipe.py"],
        ["."],
        [""],
        ["\0"],
        ["kit"],
        ["shapes.py", 5],
        ["x" * 5000],
        [[]],
    ]
    modules += [[], ["shapes.py"], {"shapes.py": 1}, "shapes.py", ["shapes.py"] * 1000, ["os.py"], ["/dev/zero"]]
    arguments: list[Any] = [{"command": f"touch {case.marker}"}, {"lr": "x"}, {"lr": ESCAPES}, {"": 0}, {"lr": 10**400}]
    arguments += [
        {"sides": "(" * 5000},
        {"sides": "-" * 100_000},
        {"switch": "{" * 300},
        {"switch": "[" + "()," * 9**5 + "]"},
    ]
    arguments += [{"switch": "-" * 5000 + "1"}, {"width": 10**12}, {"width": -1}, {"width": True}, {"lr": deep(500)}]
    found: list[tuple[str, dict[str, Any]]] = []
    found += [("recipe", {"file": file}) for file in files]
    found += [("recipe", {"function": name, "arguments": {}}) for name in functions]
    found += [("recipe", {"function": "system", "arguments": {"command": f"touch {case.marker}"}})] * 3
    found += [("recipe", {"function": "recipe", "file": f"{out}/colon/planes.py:x"})] * 2
    found += [("recipe", {"arguments": given}) for given in arguments]
    found += [("recipe", {"name": name}) for name in ("[/red]", ESCAPES, "../../x", "\ud800")]
    found += [("", {"modules": names}) for names in modules]
    found += [("", {"modules": [], "source_sha256": "0"}), ("", {"source_sha256": None}), ("", {"git_commit": 5})]
    found += [("", {"versions": v}) for v in (None, {}, 5, {"x": ESCAPES}, {"x": "[/x]"})]
    found += [("", {"seed": v}) for v in (-1, 2**64, 2**200, 1.5, "0", None, True)]
    found += [
        ("", {"architecture": v}) for v in ([], {"": 5}, {"": "x"}, {"": ESCAPES}, {str(i): "x" for i in range(999)})
    ]
    found += [("plan", {"precision": v}) for v in ("fp8", None, 5, "fp16", "bf16", ESCAPES, [])]
    found += [("plan", {"device": "cuda:99"}), ("plan", {"devices": 10**9}), ("plan", {"x": ESCAPES, "[/x]": "[/x]"})]
    found += [("limits", {"epochs": v}) for v in (0, -1, 10**18, 10**30, 1.5, "3", [])]
    found += [("limits", {"steps": v}) for v in (0, -1, 10**30, 7.5, "9")]
    found += [("limits", {"eval_every": v}) for v in (0, -3, 1, "1", 0.5, 10**30)]
    found += [("limits", {"length_matters": "x"}), ("limits", {"evil": 1}), ("limits", {"recipe": "x"})]
    found += [("options", {"workers": v}) for v in (-1, 10**9, "auto", "x", 1.5, [], None, 1)]
    found += [("options", {"keep": v}) for v in (-1, 0, 10**30, "2", None, 1.5)]
    found += [("options", {"keep_best": v}) for v in (-1, 0, 10**30, "2", None)]
    found += [("options", {"checkpoint_every": v}) for v in (0, -1, "x", 1.5, 10**30)]
    found += [("options", {"log_every": v}) for v in (0, -1, "x", None, 10**30)]
    found += [("options", {"microbatch": v}) for v in (0, -1, "x", 1.5, 1)]
    found += [("options", {"out": out}), ("options", {"out": f"{out}/new"}), ("options", {"on_step": ["x"]})]
    found += [("options", {"force": True}), ("options", {"quiet": False}), ("options", {"on_full_disk": "x"})]
    found += [("options", {"grace_s": v}) for v in (0, -1, "x", 1e-9, float("nan"))]
    found += [("options", {"compile": "x"}), ("options", {"device": "meta"}), ("options", {"strategy": "x"})]
    found += [
        ("options", {"seed": 5}),
        ("options", {"epochs": 1}),
        ("options", {"evil": 1}),
        ("options", {"devices": 8}),
    ]
    return found


def forged_run(case: Case, draw: random.Random) -> None:
    """`run.json` altered: somewhere, or as a forger would."""
    path = case.run / "run.json"
    recorded: Any = json.loads(path.read_text())
    case.forged = True
    if draw.random() < 0.75:
        part, change = draw.choice(attacks(case))
        (recorded[part] if part else recorded).update(change)
        case.did.append(f"run.json {part} {ascii(change)[:90]}")
        if "file" in change and "trap" in str(change["file"]) and draw.random() < 0.7:
            recorded["modules"] = []
    else:
        recorded, where = alter(recorded, draw)
        case.did.append(f"run.json {where}")
    try:
        text = json.dumps(recorded, indent=1)
    except RecursionError:
        text = "[" * 100_000
    path.write_text(text)


def damaged_text(case: Case, draw: random.Random) -> None:
    """Rubbish in run.json, recipe.py, a module or the events."""
    name = draw.choice(
        ["run.json", "recipe.py", "source/shapes.py", "source/kit/sizes.py", "events.jsonl", "events.jsonl"]
    )
    path = case.run / name
    data = path.read_bytes()
    at = draw.randrange(len(data) + 1)
    odd = [
        b"",
        b"\0" * 50,
        b"\xff\xfe\xfd",
        data[:at],
        data[:at] + draw.randbytes(9) + data[at:],
        data + b"# more\n",
        data * 2,
    ]
    odd += [b"[" * 100_000 + b"\n", b"null\n", b"{}\n", b'{"step": 1}\n', b'{"step":1,"epoch":1,"name":5,"value":[]}\n']
    odd += [data + b'{"step": "x", "epoch": [], "name": {}, "value": "\\u001b[31m"}\n', data.replace(b"\n", b"\r")]
    odd += [data.replace(b"val/loss", ESCAPES.encode()), data + b"9" * 5000 + b"\n", b"\n" * 1000, EVIL.encode()]
    path.write_bytes(draw.choice(odd))
    case.forged = True
    case.did.append(f"rubbish in {name}")


def planted_code(case: Case, draw: random.Random) -> None:
    """Programs laid where an import, or a reader, could find them."""
    source, evil = case.run / "source", EVIL.format(marker=str(case.marker))
    kind = draw.randrange(8)
    if kind < 2:  # byte code that does not ask whether it is that of its source
        module = source / draw.choice(["shapes.py", "kit/sizes.py"])
        cached = Path(importlib.util.cache_from_source(str(module)))
        cached.parent.mkdir(exist_ok=True)
        code = compile(evil, str(module), "exec")
        cached.write_bytes(importlib._bootstrap_external._code_to_hash_pyc(code, b"x" * 8, False))  # type: ignore[attr-defined]
    elif kind == 2:
        (source / "shapes").mkdir()
        (source / "shapes" / "__init__.py").write_text(evil)
    elif kind == 3:
        (source / "shapes.abi3.so").write_bytes(draw.choice([b"", b"\x7fELF" + bytes(60)]))
    elif kind == 4:
        name = draw.choice(["torch.py", "json.py", "stoker.py", "sitecustomize.py", "rich.py", "typing_extensions.py"])
        (source / name).write_text(evil)
        (case.run / name).write_text(evil)
    elif kind == 5:
        shutil.copy(case.outside / "evil.pt", case.run / "checkpoints" / "latest" / "model.pt")
        shutil.copy(case.outside / "evil.pt", case.run / "pytorch_model.bin")
    elif kind == 6:
        for name in ("planes.py", "evil.py", "setup.py", "conftest.py"):
            (case.run / name).write_text(evil)
            (case.run / "checkpoints" / name).write_text(evil)
    else:
        (case.run / "recipe.py:x").write_text(RECIPE)
        (source / "kit.py").write_text(evil)
        (source / "planes.py").write_text(evil)
    case.forged = True
    case.did.append(f"planted code, way {kind}")


# ------------------------------------------------------------------ what things are

THERE = [
    "checkpoints",
    "STEP",
    "STEP/model.safetensors",
    "STEP/state.safetensors",
    "STEP/ema.safetensors",
    "STEP/checkpoint.json",
    "events.jsonl",
    "run.json",
    "recipe.py",
    "source",
    "source/shapes.py",
    "source/kit",
    "source/kit/sizes.py",
    ".lock",
    "checkpoints/latest",
    "checkpoints/best",
]
STRAYS = [
    ".run.json.tmp",
    ".recipe.py.tmp",
    ".events.jsonl.tmp",
    "source/.shapes.py.tmp",
    "source/kit/.sizes.py.tmp",
    "source/.kit.tmp",
    "checkpoints/.latest.tmp",
    "checkpoints/.best.tmp",
    "checkpoints/.partial-00000009",
    "checkpoints/.partial-room",
    "checkpoints/.partial-x",
    "checkpoints/.dropped-step-00000003-epoch-1",
    "checkpoints/.dropped-x",
    "checkpoints/.replaced-step-00000007-epoch-2",
    "checkpoints/.replaced-step-00000006-epoch-2",
    "checkpoints/.replaced-../../outside/x",
    "checkpoints/step-00000009-epoch-3",
    "checkpoints/step-00000007-epoch-2-loss-0.1",
    "predictions-val.csv",
    "lr.svg",
]
HOW = [
    "link",
    "link",
    "link to same",
    "link",
    "fifo",
    "folder",
    "socket",
    "sparse",
    "dangling",
    "loop",
    "empty",
    "missing",
    "closed",
]


def strange_kind(case: Case, draw: random.Random) -> None:
    """Something of the run's is a link, a pipe, a folder, a socket, a file of absurd size, or is not there."""
    step, folder = draw.choice(list(case.steps().items()))
    there = draw.random() < 0.65
    name = draw.choice(THERE if there else STRAYS).replace("STEP", str(folder.relative_to(case.run)))
    how, path = draw.choice(HOW), case.run / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    twin = case.outside / "step" / path.name
    was = path.read_bytes() if path.is_file() else None
    clear(path)
    if how == "link":
        targets = [twin, *(case.outside / n for n in ("secret.txt", "valuable", "step", "valuable/a", "kit", ""))]
        target = draw.choice([t for t in targets if t.exists()])
        path.symlink_to(draw.choice([str(target), os.path.relpath(target, path.parent)]))
    elif how == "link to same" and was is not None:
        copy = case.outside / "same"
        copy.write_bytes(was)
        path.symlink_to(copy)
    else:
        become(path, how)
    if folder == path.parent:
        case.damaged.add(step)
    else:
        case.forged = True
    case.did.append(f"{name} is {how}")


def clear(path: Path) -> None:
    """Remove whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def become(path: Path, how: str) -> None:
    """Make something that is no plain file of a sane size."""
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        (path / "x").mkdir(parents=True)
    elif how == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # names of sockets must be short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name[:90])
        finally:
            os.chdir(here)
    elif how == "sparse":
        with path.open("wb") as file:
            file.truncate(100 << 30)
    elif how == "dangling":
        path.symlink_to("nowhere/at/all")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "empty":
        path.touch()
    elif how == "closed":
        path.mkdir()
        path.chmod(0)


ODD_NAMES = [
    "step-00000009-epoch-2-loss-" + ESCAPES.replace("/", ":"),
    "step-00000009-epoch-2-loss-\n\rrun.json   good     with recipe.py",
    "step-00000009-epoch-2-loss-" + os.fsdecode(b"\xff\xfe"),
    "step-00000009-epoch-2-loss-[:red][bold]",
    "step-00000009-epoch-2-loss-" + "x" * 200,
    "step-00000009-epoch-" + "9" * 200,
    "step-000000000000000009-epoch-2",
    "step-999999999999999999-epoch-2",
    "step-٠٠٠٠٠٠٠٩-epoch-2",
    "step-00000006-epoch-9",
    "step-00000009-epoch-2-loss-.",
    "step-9-epoch-2",
    ".replaced-step-00000009-epoch-2-loss-\x1b[2J",
    ".partial-\x1b[2J",
    ".dropped-" + os.fsdecode(b"\xff"),
]


def odd_name(case: Case, draw: random.Random) -> None:
    """One more checkpoint, of a name that stoker does not give; sealed or empty."""
    name, folder = draw.choice(ODD_NAMES), draw.choice(list(case.steps().values()))
    path = case.run / "checkpoints" / name
    shutil.copytree(folder, path)
    if draw.random() < 0.7:
        record = record_of(path)
        step = int(name.split("-")[1]) if name.startswith("step-") else 9
        record["step"] = record["state"]["progress"]["step"] = step
        seal(path, record)
    if draw.random() < 0.3:
        (path / "model.safetensors").write_bytes(b"")
    case.forged = True
    case.did.append(f"a checkpoint named {ascii(name)[:70]}")


def odd_link(case: Case, draw: random.Random) -> None:
    """`latest` or `best` leads elsewhere."""
    link = case.run / "checkpoints" / draw.choice(["latest", "best", "best"])
    targets = ["../..", "..", ".", "/", "/etc", str(case.outside / "step"), "latest", "best", "nowhere", "../run.json"]
    targets += [f"{case.steps()[3].name}/../{case.steps()[3].name}", str(case.steps()[3]), case.steps()[3].name + "/."]
    targets += [
        "../../outside/step",
        ESCAPES,
        os.fsdecode(b"\xff"),
        "x" * 250,
        "../../outside/valuable/step-00000003-epoch-1",
    ]
    clear(link)
    link.symlink_to(draw.choice(targets))
    case.did.append(f"{link.name} -> {ascii(os.readlink(link))[:60]}")


WAYS: list[tuple[int, Callable[[Case, random.Random], None]]] = [
    (26, forged_record),
    (8, damaged_record),
    (5, forged_names),
    (18, forged_tensors),
    (20, forged_run),
    (6, damaged_text),
    (5, planted_code),
    (18, strange_kind),
    (4, odd_name),
    (4, odd_link),
]


def mutate(case: Case, draw: random.Random) -> None:
    """Alter a run in one way, or in two."""
    ways = draw.choices([way for _, way in WAYS], [weight for weight, _ in WAYS], k=draw.choice([1, 1, 1, 2]))
    for way in sorted(set(ways), key=lambda way: way is strange_kind):  # nothing reads a pipe after it was made
        try:
            way(case, draw)
        except (OSError, LookupError, ValueError, TypeError, RecursionError) as error:  # what came before is in the way
            case.forged = True
            case.did.append(f"{way.__name__} could not: {error!r}"[:150])
    if case.forged:  # what was damaged may have been sealed again
        case.damaged.clear()
