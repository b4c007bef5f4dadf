"""The command line: one thin file a command; nothing heavy is imported before it is needed."""

import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING

import click

from stoker import __version__
from stoker.cli.compare import compare
from stoker.cli.doctor import doctor
from stoker.cli.evaluate import evaluate, predict
from stoker.cli.export import export
from stoker.cli.load import load
from stoker.cli.lr import lr
from stoker.cli.pack import pack, reproduce, unpack
from stoker.cli.runs import runs
from stoker.cli.show import show
from stoker.cli.train import resume, train
from stoker.cli.verify import verify
from stoker.errors import UserError, recipes_fault

if TYPE_CHECKING:
    from stoker.start import Started


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`stoker train FILE.py --help` lists that recipe's own arguments.",
)
@click.version_option(__version__, prog_name="stoker")
def cli() -> None:
    """Train PyTorch models: a run is a pure function of its recipe, its arguments and its seed."""


for command in (
    train,
    resume,
    show,
    evaluate,
    predict,
    lr,
    load,
    doctor,
    verify,
    runs,
    compare,
    pack,
    unpack,
    reproduce,
    export,
):
    cli.add_command(command)


class Told:
    """Context that turns errors into messages and exit codes; internal errors keep their traceback."""

    def __enter__(self) -> "Told":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UserError):
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        if isinstance(error, click.ClickException):
            error.show()
            sys.exit(error.exit_code)
        if isinstance(error, click.exceptions.Exit):
            sys.exit(error.exit_code)
        if isinstance(error, KeyboardInterrupt | click.Abort):
            click.echo("interrupted; what was saved before is untouched", err=True)
            sys.exit(130)
        if (
            os.environ.get("STOKER_TRACEBACK") is None
            and isinstance(error, Exception)
            and (fault := recipes_fault(error))
        ):
            click.echo(f"error: {fault}", err=True)
            sys.exit(1)
        if isinstance(error, BrokenPipeError):
            sys.stderr.close()
            sys.exit(141)


def parse(words: list[str]) -> "Started | None":
    """Run a command; one that trains returns its session instead of entering the loop."""
    outcome: Started | int | None = cli.main(words, prog_name="stoker", standalone_mode=False)
    return None if isinstance(outcome, int) else outcome  # an exit code comes from --help


def main() -> None:
    """Entry point. The loop runs from here, so that a model's forward is three stoker frames deep."""
    with Told():
        started = parse(sys.argv[1:])
        if started is not None:
            from stoker.train import train

            with started:
                if started.session is not None:
                    train(started.session)
            sys.exit(started.exit_code)
