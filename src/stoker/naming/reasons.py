"""Why saved names and shapes are not a module's: renamed, widened, added or removed modules, told once each."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

SHOWN = 8  # names of one kind; the others are counted
_CANDIDATES = 256  # saved names that are weighed against one missing name: a bound on the time of a hint
_MOST_PRODUCTS = 100_000  # of places and names, likewise

Shape = tuple[int, ...]
Parts = tuple[str, ...]


def listed(words: Sequence[str], shown: int = SHOWN) -> str:
    """The first words of a list, and how many more there are."""
    more = f" and {len(words) - shown} more" if len(words) > shown else ""
    return ", ".join(words[:shown]) + more


def number(count: int) -> str:
    """So many tensors."""
    return f"{count} tensor{'s' if count != 1 else ''}"


def likely(
    left: dict[str, Shape | None],
    right: dict[str, Shape | None],
    reshaped: Sequence[tuple[str, Shape, Shape]],
    own: Sequence[str],
    saved: Sequence[str],
) -> list[str]:
    """Say what may have happened.

    `left` and `right` are names that are missing there and unknown here, with their shapes, and are emptied of what is
    explained; `reshaped` holds (name, shape there, shape here); `own` and `saved` are all names here and there.
    """
    renames = _renamed_modules(left, right) + _renamed_leaves(left, right)
    more = [f"and {len(renames) - SHOWN} more such renames"] if len(renames) > SHOWN else []
    lines = renames[:SHOWN] + more + _widths(reshaped)
    some = len(left) + len(right) < len(own) + len(saved)
    lines += [f"only here: {listed(_modules_of(left, own))}"] if left and some else []
    lines += [f"only there: {listed(_modules_of(right, saved))}"] if right and some else []
    return lines


class _Rename(NamedTuple):
    before: Parts  # the parts that differ, there
    now: Parts  # and here


class _Pair(NamedTuple):
    saved: str
    own: str
    context: Parts  # what both begin with


def _renamed_modules(missing: dict[str, Shape | None], unexpected: dict[str, Shape | None]) -> list[str]:
    """Modules under another name, each told once; what they explain is taken out of both."""
    votes = _votes(missing, unexpected)
    # The rename that explains most comes first. A vote that an earlier one has used up sends it back into the queue.
    queue = [(-len(pairs), len(rename.before) + len(rename.now), i) for i, (rename, pairs) in enumerate(votes.items())]
    heapq.heapify(queue)
    entries, lines = list(votes.items()), []
    while queue:
        count, length, i = heapq.heappop(queue)
        rename, pairs = entries[i]
        valid = [pair for pair in pairs if pair.saved in unexpected and pair.own in missing]
        if len(valid) < -count:
            entries[i] = rename, valid
            if valid:
                heapq.heappush(queue, (-len(valid), length, i))
            continue
        taken = []
        for pair in valid:
            if pair.saved in unexpected and pair.own in missing:
                del unexpected[pair.saved], missing[pair.own]
                taken.append(pair)
        lines.append(_rename_line(rename, taken) + _others(rename, taken, missing, unexpected))
    return lines


def _others(
    rename: _Rename, taken: Sequence[_Pair], missing: dict[str, Shape | None], unexpected: dict[str, Shape | None]
) -> str:
    """What else a rename explains: tensors of another shape, taken out of both."""
    contexts = {pair.context for pair in taken}
    if len(contexts) * len(unexpected) > _MOST_PRODUCTS:
        return ""
    words = []
    for context in contexts:
        then, now = (".".join([*context, *parts, ""]) for parts in rename)
        for name in [name for name in unexpected if name.startswith(then)]:
            own = now + name.removeprefix(then)
            if own in missing:
                words.append(f"{own} {unexpected[name]} there, {missing[own]} here")
                del unexpected[name], missing[own]
    return f"; of another shape: {listed(words, 4)}" if words else ""


def _votes(missing: Mapping[str, Shape | None], unexpected: Mapping[str, Shape | None]) -> dict[_Rename, list[_Pair]]:
    """Which renames would make a saved tensor of the same shape out of each that is missing."""
    by_suffix = defaultdict(list)
    for name in unexpected:
        parts = tuple(name.split("."))
        for i in range(len(parts)):
            by_suffix[parts[i:]].append(parts)
    votes: dict[_Rename, list[_Pair]] = defaultdict(list)
    for name, shape in missing.items():
        parts = tuple(name.split("."))
        for i in range(len(parts)):
            found = [p for p in by_suffix.get(parts[i:], [])[:_CANDIDATES] if unexpected[".".join(p)] == shape]
            for other in found:
                rename, context = _differing(other, parts)
                votes[rename].append(_Pair(".".join(other), name, context))
            if found:
                break
    return votes


def _differing(before: Parts, now: Parts) -> tuple[_Rename, Parts]:
    """What is left of two paths without the parts that they end and begin with alike; and what they begin with."""
    most = min(len(before), len(now))
    end = 1
    while end < most and before[-end - 1] == now[-end - 1]:
        end += 1
    begin = 0
    while begin < most - end and before[begin] == now[begin]:
        begin += 1
    return _Rename(before[begin : len(before) - end], now[begin : len(now) - end]), before[:begin]


def _rename_line(rename: _Rename, pairs: Sequence[_Pair]) -> str:
    contexts = {pair.context for pair in pairs}
    context = contexts.pop() if len(contexts) == 1 else ("*",)
    then, now = (".".join([*context, *parts, "*"]) for parts in rename)
    return f"{then} there may be {now} here: {number(len(pairs))} of the same shape{'s' if len(pairs) > 1 else ''}"


def _renamed_leaves(missing: dict[str, Shape | None], unexpected: dict[str, Shape | None]) -> list[str]:
    """Tensors under another name in the same module, such as gamma and beta; taken out of both."""
    inside: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, found in enumerate((unexpected, missing)):
        for name in found:
            inside[name.rpartition(".")[0]][side].append(name)
    counts: Counter[tuple[str, str]] = Counter()
    for then, now in inside.values():
        if [unexpected[name] for name in then] == [missing[name] for name in now]:
            for before, here in zip(then, now, strict=True):
                counts[before.rpartition(".")[2], here.rpartition(".")[2]] += 1
                del unexpected[before], missing[here]
    return [
        f"*.{then} there may be *.{now} here: {number(count)} of the same shapes in the same modules"
        for (then, now), count in counts.items()
    ]


def _widths(reshaped: Sequence[tuple[str, Shape, Shape]]) -> list[str]:
    """One line for each width that differs, however many tensors have it."""
    places: dict[tuple[int, int], list[str]] = defaultdict(list)
    lines = []
    for name, saved, own in reshaped:
        differing = [(i, a, b) for i, (a, b) in enumerate(zip(saved, own, strict=False)) if a != b]
        if len(saved) != len(own):
            lines.append(f"{name} has {len(saved)} dimensions there, {len(own)} here")
        elif len(saved) == 2 and saved == own[::-1]:
            lines.append(f"{name} is transposed there")
        else:
            for i, a, b in differing:
                places[a, b].append(f"{name} (dimension {i})")
    widths = [f"width {a} there, {b} here: {listed(where, 4)}" for (a, b), where in places.items()]
    return widths + lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more such"] if len(lines) > SHOWN else [])


def _modules_of(some: Iterable[str], every: Iterable[str]) -> list[str]:
    """Names, those of a whole module as one."""
    chosen = set(some)
    total: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for name in every:
        parts = name.split(".")
        for i in range(1, len(parts)):
            prefix = ".".join(parts[:i])
            total[prefix] += 1
            within[prefix] += name in chosen
    groups: Counter[str] = Counter()
    for name in some:
        parts = name.split(".")
        prefixes = [".".join(parts[:i]) for i in range(1, len(parts))]
        groups[next((f"{p}.*" for p in prefixes if total[p] == within[p] > 1), name)] += 1
    return [f"{name} ({number(count)})" if name.endswith(".*") else name for name, count in groups.items()]


def fit_names(saved: Mapping[str, Any], own: Iterable[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Saved values by the names that a module knows them by: less wrappers' levels, less one common prefix.

    Returns:
        the values, what was dropped from names, and notes.
    """
    known, stripped, notes = set(own), list[str](), list[str]()
    parts = {part for name in known for part in name.split(".")}
    for level in ("_orig_mod", "module"):
        if level in parts:  # the model's own: nobody can tell one from the other, except where all names have it
            shorter = {name.removeprefix(f"{level}."): value for name, value in saved.items()}
            better = len(known & shorter.keys()) > len(known & saved.keys())
        else:
            shorter = {".".join(p for p in name.split(".") if p != level): v for name, v in saved.items()}
            better = shorter.keys() != saved.keys()
        if better and len(shorter) == len(saved):
            saved, stripped = shorter, [*stripped, f"{level}."]
            if level == "module" and "n_averaged" in saved and "n_averaged" not in known:
                saved = {name: value for name, value in saved.items() if name != "n_averaged"}
                notes.append("n_averaged, which counts what an AveragedModel averaged, is left out")
    prefix = _common_prefix(saved, known)
    if prefix:
        saved = {name.removeprefix(prefix) if name.startswith(prefix) else name: v for name, v in saved.items()}
        stripped.append(prefix)
    return dict(saved), stripped, notes


def _common_prefix(saved: Mapping[str, Any], known: set[str]) -> str:
    """The prefix without which most names are known; empty where that is none, or two names would become one."""
    hits: Counter[str] = Counter()
    for name in saved:
        parts = name.split(".")
        for i in range(1, len(parts)):
            hits[".".join(parts[:i]) + "."] += ".".join(parts[i:]) in known
    plain = sum(name in known for name in saved)
    best = max(hits, key=lambda prefix: (hits[prefix], -len(prefix)), default="")
    if not best or hits[best] <= plain:
        return ""
    renamed = [name.removeprefix(best) if name.startswith(best) else name for name in saved]
    return best if len(set(renamed)) == len(renamed) else ""
