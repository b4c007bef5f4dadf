"""`stoker pack`, `stoker unpack` and `stoker reproduce`."""

import sys

import click


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--out", metavar="FILE", help="The archive (default: RUN.stoker.zip, beside the run).")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def pack(run: str, out: str | None, force: bool) -> None:
    """Put a finished run into one file: source, arguments, events, weights and environment, but no data."""
    from stoker.sharing.archive import pack as pack_

    packed = pack_(run, out, force=force)
    for note in packed.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{packed.files} files, {packed.bytes / 2**20:.1f} MiB in {packed.path}")


@click.command()
@click.argument("archive", metavar="ARCHIVE")
@click.argument("folder", metavar="DIR")
def unpack(archive: str, folder: str) -> None:
    """Take a run out of its archive, verified; nothing in it is run."""
    from stoker.sharing.archive import unpack as unpack_

    click.echo(f"stoker show {unpack_(archive, folder)}")


@click.command()
@click.argument("archive", metavar="ARCHIVE|RUN")
@click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--out", metavar="DIR", help="The new run's folder (default: a new runs/RECIPE/NAME).")
@click.option("--device", help="Where (default: as the run was, where there is such a device).")
@click.option("--workers", metavar="N|auto", help="Processes that read samples.")
@click.option("--microbatch", type=int, metavar="N", help="Samples per forward pass.")
@click.option("--tolerance", type=float, default=1e-3, metavar="T", help="Relative, of logged values (default 0.001).")
@click.option("--quiet", is_flag=True, help="No progress: the verdict alone.")
def reproduce(
    archive: str,
    arguments: tuple[str, ...],
    out: str | None,
    device: str | None,
    workers: str | None,
    microbatch: int | None,
    tolerance: float,
    quiet: bool,
) -> None:
    """Train a packed run again, from its own source, and compare: exit code 0 agrees, 3 differs, 1 could not be told.

    The archive's recipe is a program: reproduce what comes from people you trust.
    """
    from stoker.sharing.reproduce import reproduce as reproduce_

    found = reproduce_(
        archive,
        out,
        overrides=arguments,
        device=device,
        workers=workers,
        microbatch=microbatch,
        tolerance=tolerance,
        quiet=quiet,
    )
    click.echo(str(found))
    if not found.agrees:
        sys.exit(3)
