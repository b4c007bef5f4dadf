"""`stoker verify`."""

import sys

import click


@click.command()
@click.argument("run", metavar="RUN|CHECKPOINT")
def verify(run: str) -> None:
    """Check every byte of a run's checkpoints, its records and events; exit with 1 where something is damaged."""
    from pathlib import Path

    from stoker.verify import shown, verify_run

    findings = verify_run(Path(run))
    for line in shown(findings):
        click.echo(line)
    if not all(finding.good for finding in findings):
        sys.exit(1)
