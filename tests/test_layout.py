"""The shape of the source: sizes, which part may import which, the public surface, what an import costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stoker

SOURCE = Path(stoker.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_PUBLIC_NAMES = 25

# What a part (a file or folder right under src/stoker) must not import, not even inside a function. The
# direction is cli -> tune -> (train, plan) -> rooms -> recipe, state, run. Rooms still to come are named too.
UP = {"cli", "tune"}
ROOM = UP | {"train"}
BASE = ROOM | {"plan", "watch", "checkpoint", "devices", "probes", "transfer"}
FORBIDDEN = {
    "errors": {"*"},
    "interrupts": {"*"},
    "recipe": BASE,
    "state": BASE,
    "run": ROOM | {"watch", "probes", "transfer"},
    "losses": BASE,
    "source": BASE,
    "evaluate": BASE - {"devices"},
    "data": BASE,
    "checkpoint": ROOM | {"plan", "watch", "data", "probes"},
    "devices": ROOM | {"plan", "watch", "checkpoint"},
    "transfer": ROOM | {"plan", "watch", "checkpoint"},
    "probes": ROOM | {"plan", "watch", "checkpoint"},
    "watch": ROOM | {"plan", "devices"},
    "plan": UP | {"watch"},
    "train": UP | {"plan", "watch", "checkpoint"},
    "checks": UP | {"watch"},
    "rehearse": UP | {"watch", "checkpoint"},
    "doctor": UP | {"watch", "checkpoint"},
    "files": {"*"},
    "naming": BASE | {"run", "state", "recipe", "source", "start", "data"},
    "catalog": BASE | {"run", "state", "recipe", "source", "start", "data"},  # a list of runs needs no torch
    "sharing": UP | {"watch", "catalog", "export"},
    "export": UP | {"watch", "train"},
    "tune": {"cli"},
    "cli": set[str](),
    "__init__": set[str](),
    "__main__": set[str](),
}


def part_of(file: Path) -> str:
    """The part of the package that a file belongs to."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def name_of(file: Path) -> str:
    """A test id."""
    return str(file.relative_to(SOURCE))


def package_of(file: Path) -> list[str]:
    """The package that relative imports in a file start from."""
    return ["stoker", *file.relative_to(SOURCE).parts[:-1]]


def without_type_checking(tree: ast.Module) -> Iterator[ast.AST]:
    """Walk what runs: names imported for the type checker alone make no dependency."""
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            queue += node.orelse
        else:
            queue += ast.iter_child_nodes(node)


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """Every (dotted name, line) that a file imports, `from a import b` as a.b."""
    for node in without_type_checking(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(file)
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def parts_imported(file: Path) -> dict[str, int]:
    """The other parts of stoker that a file imports, with a line each."""
    found = {}
    for name, line in imported(file):
        pieces = name.split(".")
        if pieces[0] == "stoker" and len(pieces) > 1 and pieces[1] != part_of(file):
            found[pieces[1]] = line
    return found


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_size(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MAX_FILE_LINES
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(file) if f.end_lineno is not None}
    assert {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_dependencies_point_one_way(file: Path) -> None:
    forbidden = FORBIDDEN.get(part_of(file), UP | {"__main__"})
    wrong = [
        f"{name_of(file)}:{line} imports stoker.{part}"
        for part, line in parts_imported(file).items()
        if part in forbidden or "*" in forbidden
    ]
    assert wrong == []


def test_train_is_a_part_that_the_table_reads() -> None:
    assert {"recipe", "state", "data"} <= set(parts_imported(SOURCE / "train.py"))


def test_the_loop_draws_in_nothing_above_it() -> None:
    """The table reads one file at a time; this is what really gets loaded."""
    code = "import sys, stoker.train; print(*(name for name in sys.modules if name.startswith('stoker.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    loaded = {name.split(".")[1] for name in done.stdout.split()}
    assert "train" in loaded, done.stderr
    assert loaded & (FORBIDDEN["train"] | {"run"}) == set()


def test_train_names_no_strategy() -> None:
    """The single device is a strategy as any other: the loop knows their Protocol only."""
    names = {name for name, _ in imported(SOURCE / "train.py") if name.startswith("stoker.devices")}
    assert names <= {"stoker.devices.strategy.Strategy"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_public_definitions_have_docstrings(file: Path) -> None:
    definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    bare = [
        f"{node.name}:{node.lineno}"
        for node in ast.parse(file.read_text()).body
        if isinstance(node, definition) and not node.name.startswith("_") and not ast.get_docstring(node)
        if not any(ast.unparse(mark).endswith("overload") for mark in node.decorator_list)
    ]
    assert bare == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_file_is_a_program(file: Path) -> None:
    """Law 5: nothing that stoker reads is executed."""
    # Between this process and the workers it forked, and inside one process's memory: never in a file.
    in_memory = {"data/packing.py", "data/pool.py", "data/regions.py"}
    unpicklers = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    if name_of(file) in in_memory:
        unpicklers -= {"pickle"}
    assert [name for name, _ in imported(file) if name.split(".")[0] in unpicklers] == []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only", "True") == "True", f"line {node.lineno}"
            assert given.get("allow_pickle", "False") == "False", f"line {node.lineno}"
            assert ast.unparse(node.func) != "torch.load" or "weights_only" in given, f"line {node.lineno}"


def test_the_public_names() -> None:
    assert len(stoker.__all__) == len(set(stoker.__all__)) <= MAX_PUBLIC_NAMES
    for name in stoker.__all__:
        assert getattr(stoker, name) is not None
    assert set(stoker.__all__) <= set(dir(stoker))
    own = {name for name, value in vars(stoker).items() if getattr(value, "__module__", "").startswith("stoker")}
    assert {name for name in own if not name.startswith("_")} <= set(stoker.__all__)
    with pytest.raises(AttributeError):
        stoker.no_such_name  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(stoker.__file__).read_text())
    typed = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in typed for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname or alias.name for node in imports for alias in node.names} == set(stoker.__all__)


def test_public_names_are_documented() -> None:
    own = [getattr(stoker, name) for name in stoker.__all__]
    described = [value for value in own if callable(value)]
    assert len(described) > 5
    assert [value for value in described if not value.__doc__] == []


HEAVY = "sorted({'torch', 'numpy', 'rich', 'torchmetrics', 'safetensors'} & set(sys.modules))"


@pytest.mark.parametrize(
    "program",
    [
        "import stoker",
        "import stoker.cli",
        "from stoker.cli import main; sys.argv = ['stoker', '--help']; main()",
        "from stoker.cli import main; sys.argv = ['stoker', 'train', '--help']; main()",
    ],
)
def test_import_and_help_are_light(program: str) -> None:
    run = f"try:\n    {program}\nexcept SystemExit as exit:\n    assert not exit.code"
    code = f"import sys\n{run}\nprint({HEAVY})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
