"""`stoker export`."""

import click

from stoker.cli.evaluate import CHECKPOINT

FORMATS = ("pt", "safetensors", "onnx", "pt2")


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--format", "kind", type=click.Choice(FORMATS), required=True, help="What to write.")
@click.option("--out", metavar="FILE", help="Where (default RUN/export/RECIPE.FORMAT).")
@CHECKPOINT
@click.option("--batch-size", type=int, metavar="N", help="onnx, pt2: samples in the batch a graph is made on.")
def export(run: str, kind: str, out: str | None, checkpoint: str, batch_size: int | None) -> None:
    """Write a run's model for other programs.

    pt and safetensors hold its weights by name; onnx and pt2 hold the whole model as a graph, which is compared
    with the model on samples of the run's own data before it is kept.
    """
    from stoker.export import export as write

    found = write(run, kind, out, which=checkpoint, batch_size=batch_size)
    click.echo(f"{found.path}  {_size(found.size_bytes)}")
    lines = [
        ("weights", found.checkpoint),
        *found.signature,
        ("checked", found.checked),
        *(("note", n) for n in found.notes),
    ]
    for name, text in lines:
        click.echo(f"  {name:8} {text}")


def _size(size_bytes: int) -> str:
    """Bytes with a unit."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
