"""`python -m stoker`: stoker.cli.main, spelled out here to keep its frame off the stack."""

import sys

from stoker.cli import Told, parse

if __name__ == "__main__":
    with Told():
        started = parse(sys.argv[1:])
        if started is not None:
            from stoker.train import train

            with started:
                if started.session is not None:
                    train(started.session)
            sys.exit(started.exit_code)
