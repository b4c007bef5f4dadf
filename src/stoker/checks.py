"""What is looked at before a run begins, so that nothing is found out after hours."""

from contextlib import suppress
from typing import Any

from torch import nn

from stoker.checkpoint.architecture import architecture_differences, describe_architecture
from stoker.data.loader import Loader, check_source
from stoker.data.seeding import isolated, seed_all_plainly
from stoker.data.shared_rows import shared_note
from stoker.errors import UserError
from stoker.naming import names
from stoker.plan import Plan
from stoker.recipe import Recipe
from stoker.run import Identity, RunDir
from stoker.train import Limits


def check_limits(recipe: Recipe, limits: Limits) -> None:
    """Refuse a run that would not end, and data that cannot be used.

    Raises:
        UserError: with the recipe's field or the option that is wrong.
    """
    if limits.epochs is None and limits.steps is None:
        raise UserError("for how long?", remedy="--epochs N or --steps N")
    for name in ("epochs", "steps", "eval_every", "checkpoint_every", "log_every"):
        value = getattr(limits, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    check_source(recipe.train, "train", batch_size=global_batch_size(recipe))
    for name in ("val", "test"):
        if getattr(recipe, name) is not None:
            check_source(getattr(recipe, name), name)


def refuse_split_carry(recipe: Recipe, plan: Plan) -> None:
    """Refuse microbatches where a step carries state: which rows of it belong to which part is the step's secret.

    Raises:
        UserError: naming the objective.
    """
    size = global_batch_size(recipe)
    carrying = [name for name, objective in (recipe.objectives or {}).items() if objective.takes_carry]
    if carrying and plan.microbatch is not None and (size is None or plan.microbatch < size):
        raise UserError(
            f"--microbatch {plan.microbatch} cannot split the batches of objective {carrying[0]!r}",
            why="its step carries state from batch to batch, whose rows stoker cannot tell apart",
            remedy="leave out --microbatch, or lower the batch size",
        )


def refuse_changes(
    folder: RunDir, now: Identity, then: Identity, force: bool, recipe: Recipe | None = None
) -> tuple[str, ...]:
    """Compare a run with what it began with; return the differences that `force` allows.

    Raises:
        UserError: they differ in what changes the result, and `force` is not given.
    """
    differences = now.differences(then)
    if not differences or force:
        return tuple(differences)
    if recipe is not None:
        with isolated(), suppress(Exception):  # the new recipe may fail; that its model differs is told besides
            seed_all_plainly(now.seed)
            built = describe_architecture(recipe.build_model())
            differences += [f"model: {line}" for line in architecture_differences(folder.read_architecture(), built)]
    other = now.recipe != then.recipe or now.function != then.function
    raise UserError(
        f"{folder.path} holds a run of {'another recipe' if other else 'this recipe that began differently'}",
        why="\n          ".join(differences),
        remedy=(
            "choose another --out, or"
            if other
            else f"`stoker resume {folder.path}` with the source put back goes on as it began;"
        )
        + " --force goes on with what is given now (weights and optimizer state are kept)",
    )


def changes_taken(folder: RunDir, differences: tuple[str, ...], model: nn.Module) -> tuple[str, ...]:
    """What to say of a run that goes on although its recipe, or what it builds, is not what it was."""
    recorded = folder.read_architecture()
    built = architecture_differences(recorded, describe_architecture(model)) if recorded else []
    notes = []
    if differences:
        notes.append("\n      ".join(["goes on with what is given now, as --force allows:", *differences]))
    if built:
        notes.append("\n      ".join(["the model is not built as when the run began:", *built]))
    return tuple(notes)


def global_batch_size(recipe: Recipe) -> int | None:
    """Batch size of the training data; None where there are no batches, or a batch sampler decides."""
    return recipe.train.batch_size if isinstance(recipe.train, Loader) else None


def refuse_other_classes(recipe: Recipe) -> None:
    """Refuse splits whose labels mean different classes: a folder without images of one class counts the rest anew.

    Raises:
        UserError: naming the first class that differs.
    """
    sources = {"train": recipe.train, "val": recipe.val, "test": recipe.test}
    known = {name: list(c) for name, source in sources.items() if (c := classes_of(source)) is not None}
    for name, classes in known.items():
        ours = known.get("train", classes)
        if classes != ours:
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, classes, strict=False)) if a != b),
                min(map(len, (ours, classes))),
            )
            meant = [c[place] if place < len(c) else "nothing" for c in (ours, classes)]
            raise UserError(
                f"label {place} is {meant[0]!r} in the train data and {meant[1]!r} in the {name} data",
                why=f"they have {len(ours)} and {len(classes)} classes",
                remedy="let both have the same list of classes: stoker.data.images(folder, classes=train.classes)",
            )


def classes_of(source: Any) -> Any:
    """Names of a data set's classes, where it tells them."""
    found = getattr(getattr(source, "dataset", None), "classes", None)
    return found if isinstance(found, list | tuple) and all(isinstance(name, str) for name in found) else None


def split_notes(recipe: Recipe) -> tuple[str, ...]:
    """Warnings about rows that are in more than one of the recipe's splits."""
    sources = {"train": recipe.train, "val": recipe.val, "test": recipe.test}
    return shared_note({name: s.dataset for name, s in sources.items() if isinstance(s, Loader) and not s.iterable})


def mode_notes(model: nn.Module) -> tuple[str, ...]:
    """A word on parts that are trained in eval mode, as `from_pretrained` returns them: they drop nothing out."""
    found: list[str] = []
    for name, module in names.named_modules(model).items():
        inside = any(name == top or name.startswith(f"{top}.") for top in found)
        if module.training or inside or not any(p.requires_grad for p in module.parameters()):
            continue
        kinds = {type(part).__name__ for part in module.modules() if not part.training}
        if any("Dropout" in kind or "BatchNorm" in kind for kind in kinds):
            found.append(name)
    return tuple(
        f"{name} is trained in eval mode, without dropout, batch norms fixed: {name}.train() in model= changes that"
        for name in found
    )
