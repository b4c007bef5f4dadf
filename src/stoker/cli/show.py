"""`stoker show`."""

import click


@click.command()
@click.argument("target", metavar="RUN|FILE[:FUNCTION]")
@click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--depth", type=int, metavar="N", help="How deep a model's summary goes.")
def show(target: str, arguments: tuple[str, ...], depth: int | None) -> None:
    """Show a run (recipe, arguments, plan, metrics, checkpoints), or a recipe's arguments and its model's summary."""
    from pathlib import Path

    from stoker.watch.describe import describe_recipe, describe_run

    if Path(target).is_dir():
        describe_run(Path(target))
    else:
        describe_recipe(target, arguments, depth)
