"""`stoker lr`."""

import click


@click.command()
@click.argument("file", metavar="FILE[:FUNCTION]")
@click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--from", "low", type=float, default=1e-6, metavar="LR", help="Lowest rate (default 1e-6).")
@click.option("--to", "high", type=float, default=10.0, metavar="LR", help="Highest rate (default 10).")
@click.option("--steps", type=int, default=100, metavar="N", help="How many steps (default 100).")
@click.option("--seed", type=int, default=0, metavar="S", help="Seed (default 0).")
@click.option("--device", help="Where (default: the first accelerator, else the CPU).")
@click.option("--out", default="lr", metavar="NAME", help="Writes NAME.csv and NAME.html (default lr).")
def lr(
    file: str,
    arguments: tuple[str, ...],
    low: float,
    high: float,
    steps: int,
    seed: int,
    device: str | None,
    out: str,
) -> None:
    """Find a learning rate: raise it step by step, watch the loss, and plot one against the other."""
    from stoker.lr_range import lr_range

    lr_range(file, arguments, low=low, high=high, steps=steps, seed=seed, device=device, out=out)
