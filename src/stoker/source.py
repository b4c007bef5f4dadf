"""From `FILE.py:FUNCTION key=value ...` to a Recipe."""

import ast
import enum
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.data.seeding import isolated, seed_all_plainly
from stoker.errors import UserError, nearest, told
from stoker.recipe import Origin, Recipe, check_arguments, local_modules, parameters_of


@dataclass(frozen=True)
class Source:
    """A recipe function and the file that holds it."""

    file: Path
    function_name: str
    function: Callable[..., Any]
    text: str

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.file.name}:{self.function_name}"

    def arguments(self, assignments: Sequence[str]) -> dict[str, Any]:
        """Parse `key=value` words by the function's annotations.

        Raises:
            UserError: a word without "=", an unknown name, a value of another type.
        """
        words: dict[str, str] = {}
        for word in assignments:
            name, equals, text = word.partition("=")
            if not equals:
                raise UserError(
                    f"{word!r} is not an argument of a recipe",
                    remedy="write key=value; options begin with --",
                )
            words[name] = text
        check_arguments(self.function, list(words), self.label)
        parameters = parameters_of(self.function)
        values = {}
        for name, text in words.items():
            parameter = parameters.get(name)
            annotation: Any = Any
            if parameter is not None:
                default = parameter.default
                annotation = parameter.annotation
                if annotation is parameter.empty:
                    annotation = Any if default in (parameter.empty, None) else type(default)
            try:
                values[name] = convert(text, annotation)
            except (ValueError, OverflowError) as error:
                raise UserError(
                    f"{self.label}: {name}={text!r} is not {type_name(annotation)}",
                    why=str(error),
                    remedy=f"{parameter}" if parameter is not None else "",
                ) from None
        return values

    def recall(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments as `run.json` keeps them, back in the types that the function's annotations name."""
        values: dict[str, Any] = {}
        for name, parameter in parameters_of(self.function).items():
            if parameter.kind is parameter.VAR_KEYWORD:  # recorded under its own name
                values |= {k: revive(v, parameter.annotation) for k, v in dict(recorded.get(name, {})).items()}
            elif name in recorded and recorded[name] != f"<{type(parameter.default).__qualname__}>":  # JSON kept none
                values[name] = revive(recorded[name], parameter.annotation)
        return values

    def recipe(self, arguments: Mapping[str, Any], seed: int = 0) -> Recipe:
        """Call the function, seeded: what it draws itself, a random split say, is a function of the seed too.

        Raises:
            UserError: it raises, naming the line; or it returns something else than a Recipe.
        """
        check_arguments(self.function, list(arguments), self.label)
        try:
            with isolated():
                seed_all_plainly(seed)
                recipe = self.function(**arguments)
        except UserError:
            raise
        except Exception as error:
            raise told(error, f"{self.function_name}()") from error
        if not isinstance(recipe, Recipe):
            raise UserError(
                f"{self.label} returned a {type(recipe).__name__}, not a stoker.Recipe",
                remedy="end it with `return stoker.Recipe(...)`",
            )
        modules = local_modules(self.file, self.text)
        bound = inspect.signature(self.function).bind(**arguments)
        bound.apply_defaults()
        recipe.origin = Origin(self.file, self.function_name, bound.arguments, self.text, modules)
        return recipe


def load_source(spec: str) -> Source:
    """Import `FILE.py[:FUNCTION]` (default function: recipe); the file's own folder is importable from it.

    Raises:
        UserError: no such file or function, or the file raises while it is imported.
    """
    path, colon, function_name = ("", "", "") if spec.endswith(".py") else spec.rpartition(":")
    return load_file(Path(path if colon else spec).expanduser(), function_name if colon else "")


def load_file(
    file: Path, function_name: str, *, original: Path | None = None, modules: Mapping[str, str] | None = None
) -> Source:
    """Import a function (default: recipe) of a file.

    Args:
        file: a Python file.
        function_name: of a function that is defined in it.
        original: where the file is a copy that a run keeps, the path that it takes itself to be at, to find data
            beside it.
        modules: text of the modules that a run keeps, by path, which are all that a copy imports; the function has to
            be one of theirs or of the file's, not any that they import.

    Raises:
        UserError: no such file or function, or the file raises while it is imported.
    """
    path, function_name = str(file), function_name or "recipe"
    if not file.is_file():
        siblings = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise UserError(
            f"no recipe file {path}{nearest(file.name, siblings)}",
            remedy="give the path of a Python file with a function recipe(...) -> stoker.Recipe",
        )
    file = file.resolve()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}", why=str(error)) from None
    if original is None:
        module = _import(file, text, file.parent)
    else:
        _Kept(file.parent / "source", modules or {}).install()
        module = _run(file, text, original)
    function = getattr(module, function_name, None)
    homes = None if modules is None else {module.__name__, *map(_dotted, modules)}
    if not callable(function) or (homes is not None and _foreign(function, homes)):
        functions = [
            n for n, v in vars(module).items() if isinstance(v, types.FunctionType) and v.__module__ == module.__name__
        ]
        raise UserError(
            f"{file.name} has no function {function_name}(){nearest(function_name, functions)}",
            remedy=f"its functions are: {', '.join(functions) or 'none'}; name one as {path}:FUNCTION",
        )
    return Source(file, function_name, function, text)


def _foreign(function: Any, homes: Collection[str]) -> bool:
    """Whether it is another module's: after `from os import system`, a forged run.json could call that."""
    kinds = types.FunctionType | types.BuiltinFunctionType | type
    function = inspect.unwrap(function)
    return isinstance(function, kinds) and function.__module__ not in homes


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class _Kept(importlib.abc.ExecutionLoader, importlib.abc.MetaPathFinder):
    """Modules that a run keeps, from their texts alone: no byte code, library or other file beside them is run."""

    def __init__(self, folder: Path, texts: Mapping[str, str]) -> None:
        self._folder, self._texts = folder, texts

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Specify a module, or a package, that the run keeps."""
        place = name.replace(".", "/")
        if self._relative(name) is not None:
            package = [str(self._folder / place)] if self.is_package(name) else None
            return importlib.util.spec_from_file_location(
                name, self.get_filename(name), loader=self, submodule_search_locations=package
            )
        if any(text.startswith(f"{place}/") for text in self._texts):  # a folder without __init__.py
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(self._folder / place)]
            return spec
        return None

    def _relative(self, name: str) -> str | None:
        place = name.replace(".", "/")
        return next((path for path in (f"{place}/__init__.py", f"{place}.py") if path in self._texts), None)

    def is_package(self, fullname: str) -> bool:
        """Whether a name is that of a package's `__init__.py`."""
        return (self._relative(fullname) or "").endswith("/__init__.py")

    def get_filename(self, fullname: str) -> str:
        """Path of a module, for tracebacks."""
        return str(self._folder / (self._relative(fullname) or ""))

    def get_source(self, fullname: str) -> str:
        """Text of a module."""
        return self._texts[self._relative(fullname) or ""]

    def install(self) -> None:
        """Answer imports from now on, instead of another run; modules of that name are loaded anew."""
        sys.meta_path[:] = [self, *(finder for finder in sys.meta_path if not isinstance(finder, _Kept))]
        for path in self._texts:
            sys.modules.pop(_dotted(path), None)


def _import(file: Path, text: str, folder: Path) -> types.ModuleType:
    main = sys.modules.get("__main__")
    script = getattr(main, "__file__", None)
    if main is not None and script and Path(str(script)).resolve() == file and folder == file.parent:
        return main  # a script that trains: importing it again would train again
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Kept)]
    places = list(dict.fromkeys([str(folder), str(file.parent)]))
    sys.path[:] = [*places, *(entry for entry in sys.path if entry not in places)]
    for path in local_modules(folder / file.name, text):  # another recipe's `data.py` is not this one's
        imported = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        stranger = getattr(sys.modules.get(imported), "__file__", None)
        if stranger is not None and Path(stranger) != folder / path:
            del sys.modules[imported]
    return _run(file, text, file)


def _run(file: Path, text: str, place: Path) -> types.ModuleType:
    """Make a module of a file's text, which takes itself to be at `place`; nothing is read there."""
    name = place.stem if place.stem.isidentifier() and place.stem not in sys.modules else f"_recipe_{abs(hash(file)):x}"
    module = types.ModuleType(name)
    module.__file__ = str(place)
    sys.modules[name] = module
    try:
        # From the text that the run keeps, never from cached byte code, which can be that of a second ago.
        exec(compile(text, str(file), "exec"), module.__dict__)
    except UserError:
        raise
    except Exception as error:
        del sys.modules[name]
        raise told(error, file.name) from error
    return module


def describe(source: Source) -> str:
    """Docstring and parameters of a recipe function, as help shows them."""
    lines = [f"Arguments of {source.label}:"]
    if source.function.__doc__:
        lines.insert(0, inspect.cleandoc(source.function.__doc__) + "\n")
    parameters = parameters_of(source.function)
    width = max((len(name) for name in parameters), default=0)
    for name, parameter in parameters.items():
        kind = "" if parameter.annotation is parameter.empty else type_name(parameter.annotation)
        default = "required" if parameter.default is parameter.empty else f"default {parameter.default!r}"
        lines.append(f"  {name:{width}}  {kind:8}  {default}")
    return "\n".join(lines if parameters else [*lines[:-1], f"{source.label} takes no arguments"])


def type_name(annotation: Any) -> str:
    """Spell a type as the user would."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


_TRUTH = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


def convert(text: str, annotation: Any) -> Any:
    """Parse `text` as a value of the annotated type.

    Raises:
        ValueError: it is none; the message says what is accepted.
    """
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _first(text, options)
    if origin is typing.Literal:
        for option in options:
            if str(option) == text:
                return option
        raise ValueError(f"one of {', '.join(map(str, options))} is accepted")
    if origin in (list, tuple) or annotation in (list, tuple):
        words = [word.strip() for word in text.strip("[]()").split(",") if word.strip()]
        kinds = [k for k in options if k is not ...] or [Any]
        if origin is tuple and ... not in options and options and len(words) != len(options):
            raise ValueError(f"{len(options)} comma-separated values are accepted")
        values = [convert(word, kinds[min(i, len(kinds) - 1)]) for i, word in enumerate(words)]
        return tuple(values) if origin is tuple or annotation is tuple else values
    if annotation is Any:
        return _literal(text)
    if isinstance(annotation, type) or origin is dict:
        return _scalar(text, origin or annotation)
    return _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def revive(value: Any, annotation: Any) -> Any:
    """Value of an annotated type from what JSON made of it."""
    if isinstance(value, list) and (typing.get_origin(annotation) or annotation) is tuple:
        return tuple(value)
    if isinstance(value, str) and annotation not in (inspect.Parameter.empty, Any):
        try:
            return convert(value, annotation)
        except ValueError:
            return value
    return value


def _first(text: str, options: Sequence[Any]) -> Any:
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    for option in sorted((o for o in options if o is not type(None)), key=lambda o: o is str):
        try:
            return convert(text, option)
        except ValueError:
            continue
    raise ValueError(f"one of {', '.join(map(type_name, options))} is accepted")


def _scalar(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in _TRUTH:
            raise ValueError("true or false is accepted")
        return _TRUTH[text.lower()]
    if kind is int:
        return _whole(text)
    if issubclass(kind, enum.Enum):
        if text not in kind.__members__:
            raise ValueError(f"one of {', '.join(kind.__members__)} is accepted")
        return kind[text]
    if kind is type(None):
        return None
    if kind is dict:
        value = _literal(text)
        if not isinstance(value, dict):
            raise ValueError("a dict as Python writes it is accepted")
        return value
    try:
        return kind(text)
    except (TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from None


def _whole(text: str) -> int:
    if text.strip().lstrip("+-").replace("_", "").isdigit():
        return int(text)
    number = float(text.replace("_", ""))  # 1e3
    if not number.is_integer():
        raise ValueError("a whole number is accepted")
    return int(number)
