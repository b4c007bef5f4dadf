"""`stoker runs`."""

import click


@click.command()
@click.argument("folder", default="runs", metavar="[FOLDER]")
@click.option("--where", multiple=True, metavar="EXPR", help="Only runs for which it holds: 'lr>0.01', recipe=digits.")
@click.option("--sort", metavar="NAME", help="By a column, an argument or a metric (default: path).")
@click.option("--reverse", is_flag=True, help="The last first; runs without a value stay last.")
@click.option("--columns", metavar="A,B,C", help="What is shown: columns, arguments, metrics.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N only.")
@click.option("--json", "as_lines", is_flag=True, help="One JSON object a line.")
def runs(
    folder: str,
    where: tuple[str, ...],
    sort: str | None,
    reverse: bool,
    columns: str | None,
    limit: int | None,
    as_lines: bool,
) -> None:
    """List the runs in FOLDER (default: runs): what they are, how far they came, how good they are.

    Names are columns (path, recipe, seed, status, reason, step, epoch, best, best_name, best_step, written, size),
    arguments and metrics; args.NAME is an argument that is called as a column is.
    """
    from pathlib import Path

    from stoker.catalog.listing import (
        aligned,
        as_json,
        default_columns,
        require_names,
        say,
        select,
        table,
        terminal_width,
    )
    from stoker.catalog.runfiles import printable
    from stoker.catalog.runs import list_runs

    unread: list[str] = []
    found = list_runs(Path(folder), unread)
    for line in unread:
        click.echo(f"note: not looked into: {printable(line)}", err=True)
    names = [name for word in columns.split(",") if (name := word.strip())] if columns is not None else None
    if not found:
        click.echo(f"no runs in {printable(folder)}; stoker train FILE.py --epochs N makes one in runs/", err=True)
        return
    require_names(found, [name for name in names or [] if name != "arguments"])
    chosen = select(found, where, sort, reverse)
    shown = chosen[:limit]
    if as_lines:
        say([as_json(run, names) for run in shown])
        return
    if not shown:
        click.echo(f"none of the {len(found)} runs in {printable(folder)} matches; leave out a --where", err=True)
        return
    say(aligned(*table(shown, names or default_columns(shown)), terminal_width()))
    if len(shown) < len(chosen):
        click.echo(f"{len(chosen) - len(shown)} more are left out by --limit {limit}", err=True)
