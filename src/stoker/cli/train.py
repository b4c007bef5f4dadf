"""`stoker train` and `stoker resume`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from stoker.start import Started

Decorated = Callable[..., Any]


def run_options(function: Decorated) -> Decorated:
    """Add the options of the plan and of the run, in the order in which help lists them."""
    options = [
        click.option("--epochs", type=int, metavar="N", help="How many passes over the training data."),
        click.option(
            "--steps", type=int, metavar="N", help="How many optimizer steps, instead of or besides --epochs."
        ),
        click.option("--seed", type=int, metavar="S", help="Seed of everything random (default 0)."),
        click.option(
            "--checkpoint-every",
            type=int,
            metavar="N",
            help="Steps between checkpoints (default: epochs' ends).",
        ),
        click.option("--eval-every", type=int, metavar="N", help="Steps between evaluations (default: epochs' ends)."),
        click.option("--log-every", type=int, metavar="N", help="Steps that a train/loss event averages (default 50)."),
        click.option("--keep", type=int, metavar="N", help="How many of the newest checkpoints to keep (default 2)."),
        click.option("--keep-best", type=int, metavar="N", help="How many of the best to keep besides (default 1)."),
        click.option("--device", help="cpu, cuda, cuda:1, mps ... (default: the first accelerator, else the CPU)."),
        click.option("--devices", type=int, metavar="N", help="How many devices."),
        click.option("--strategy", help="How the devices share the work."),
        click.option("--precision", help="fp32, bf16 or fp16."),
        click.option(
            "--microbatch",
            type=int,
            metavar="N",
            help="Samples per forward pass; gradients accumulate exactly.",
        ),
        click.option("--workers", metavar="N|auto", help="Processes that read samples; auto measures."),
        click.option("--compile", is_flag=True, default=None, help="Compile the model."),
        click.option(
            "--on-full-disk",
            type=click.Choice(["continue", "wait", "stop"]),
            help="What to do when a checkpoint does not fit (default continue).",
        ),
        click.option(
            "--grace", "grace_s", type=float, metavar="S", help="Seconds after a signal in which the process ends."
        ),
        click.option(
            "--requeue-exit",
            type=click.IntRange(0, 255),
            metavar="CODE",
            help="Exit code after SIGTERM or SIGUSR1 (default 0; 75 in a Slurm job).",
        ),
        click.option("--quiet", is_flag=True, default=None, help="No progress, no summary."),
        click.option(
            "--force",
            is_flag=True,
            default=None,
            help="Go on although source, arguments or seed have changed.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _show_help(context: click.Context, spec: str | None) -> None:
    click.echo(context.get_help())
    if spec is not None:
        from stoker.source import describe, load_source

        click.echo("\n" + describe(load_source(spec)))


@click.command(add_help_option=False)
@click.argument("file", metavar="FILE[:FUNCTION]", required=False)
@click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--out", metavar="DIR", help="The run's folder (default: a new runs/RECIPE/NAME).")
@run_options
@click.option("-h", "--help", "wants_help", is_flag=True, help="Show this, and FILE's own arguments.")
def train(file: str | None, arguments: tuple[str, ...], wants_help: bool, **options: Any) -> "Started | None":
    """Train a recipe. With the --out of an unfinished run, go on with that run."""
    context = click.get_current_context()
    if wants_help:
        _show_help(context, file)
        return None
    if file is None:
        raise click.UsageError("which recipe? stoker train FILE.py [KEY=VALUE]... --epochs N", context)
    from stoker.source import load_source

    source = load_source(file)
    return begin(source.recipe(source.arguments(arguments), options["seed"] or 0), options)


@click.command()
@click.argument("run", metavar="RUN")
@run_options
def resume(run: str, **options: Any) -> "Started":
    """Go on with an unfinished run, with its own recipe, arguments, seed and limits."""
    from pathlib import Path

    from stoker.recall import rebuild, recorded_options, require_identity
    from stoker.run import RunDir

    folder = RunDir(Path(run))
    identity = require_identity(folder)
    given = {name: value for name, value in options.items() if value is not None}
    return begin(
        rebuild(folder, identity, force=bool(given.get("force"))), {**recorded_options(identity), **given, "out": run}
    )


def begin(recipe: Any, options: dict[str, Any]) -> "Started":
    """Start a session with the options that were given; the others take the API's defaults."""
    from stoker.start import prepare

    requeue_exit = options.pop("requeue_exit", None)
    started = prepare(recipe, **{name: value for name, value in options.items() if value is not None})
    if requeue_exit is not None:
        started.interrupts.exit_code = requeue_exit
    return started
