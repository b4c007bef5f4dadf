"""`stoker doctor`."""

import click


@click.command()
@click.argument("file", metavar="FILE[:FUNCTION]")
@click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--seed", type=int, default=0, metavar="S", help="Seed (default 0).")
@click.option("--device", help="Where (default: the first accelerator, else the CPU).")
def doctor(file: str, arguments: tuple[str, ...], seed: int, device: str | None) -> None:
    """Measure a recipe's data loading: rates of each stage, what bounds it, and memory that workers copy."""
    from stoker.doctor import diagnose
    from stoker.source import load_source

    source = load_source(file)
    for line in diagnose(source.recipe(source.arguments(arguments), seed), seed, device).lines():
        click.echo(line)
