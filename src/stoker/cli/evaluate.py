"""`stoker eval` and `stoker predict`."""

import click

SPLITS = click.Choice(["train", "val", "test"])
CHECKPOINT = click.option(
    "--checkpoint", default="best", metavar="best|latest|PATH", help="Which weights (default best)."
)
DEVICE = click.option("--device", help="Where (default: the first accelerator, else the CPU).")
BATCH = click.option("--batch-size", type=int, metavar="N", help="Samples per forward pass.")
WORKERS = click.option("--workers", type=int, default=0, metavar="N", help="Processes that read samples.")


@click.command(name="eval")
@click.argument("run", metavar="RUN")
@click.option("--split", type=SPLITS, default="val", help="Which of the recipe's data (default val).")
@CHECKPOINT
@DEVICE
@BATCH
@WORKERS
def evaluate(run: str, split: str, checkpoint: str, device: str | None, batch_size: int | None, workers: int) -> None:
    """Evaluate a run's weights: losses and metrics, every sample counted once."""
    from stoker.infer import open_run

    values = open_run(run, checkpoint, device).evaluate(split, batch_size, workers)
    for name, value in values.items():
        click.echo(f"{name}  {value:.6g}" if isinstance(value, float) else f"{name}  {value}")


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--split", type=SPLITS, default="val", help="Which of the recipe's data (default val).")
@click.option("--out", metavar="FILE", help="CSV or .safetensors (default RUN/predictions-SPLIT.csv).")
@CHECKPOINT
@DEVICE
@BATCH
@WORKERS
def predict(
    run: str,
    split: str,
    out: str | None,
    checkpoint: str,
    device: str | None,
    batch_size: int | None,
    workers: int,
) -> None:
    """Write the model's output for every sample, in the data's own order."""
    from stoker.infer import open_run

    path, rows = open_run(run, checkpoint, device).predict(split, out, batch_size, workers)
    click.echo(f"{rows} predictions in {path}")
