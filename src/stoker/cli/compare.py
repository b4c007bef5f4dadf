"""`stoker compare`."""

import click


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--all", "everything", is_flag=True, help="Also what is the same; nothing is cut short.")
@click.option("--json", "as_line", is_flag=True, help="One JSON object.")
def compare(a: str, b: str, everything: bool, as_line: bool) -> None:
    """Compare two runs: arguments, source, versions, curves, and the first step at which their bits differ.

    The exit code is 0 whether they differ or not, and 1 where one of them is no run.
    """
    import sys
    from pathlib import Path

    from stoker.catalog.compare import compare as compared
    from stoker.catalog.listing import say, terminal_width
    from stoker.catalog.report import as_json, lines_of

    found = compared(Path(a), Path(b))
    blocks = (sys.stdout.encoding or "").lower().startswith("utf")
    say([as_json(found)] if as_line else lines_of(found, everything, terminal_width(), blocks))
