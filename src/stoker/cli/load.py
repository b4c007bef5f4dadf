"""`stoker load`."""

import click


@click.command()
@click.argument("source", metavar="RUN|WEIGHTS")
@click.argument("file", metavar="[FILE[:FUNCTION]]", required=False)
@click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--checkpoint", default="best", metavar="best|latest|PATH", help="Which of a run's (default best).")
@click.option("--partial", is_flag=True, help="Take what fits in name and shape; list the rest.")
def load(source: str, file: str | None, arguments: tuple[str, ...], checkpoint: str, partial: bool) -> None:
    """Load weights into a recipe's model and say what fits: a run's, or those of a file from elsewhere.

    Without FILE a run's own recipe is called again; a file of weights is listed.
    """
    from stoker.weights import describe_load

    click.echo(describe_load(source, file, arguments, checkpoint, partial))
