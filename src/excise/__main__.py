"""The program: `excise`, or `python -m excise`."""

from __future__ import annotations

import sys

from excise.interrupts import listen, said


def main() -> None:
    """Run the command line.

    Exit status 0; 1 where a result failed its test, and was not given its name; 2 for a mistake in what was asked; 130
    when interrupted by Ctrl-C, 143 by SIGTERM: the same command then goes on where it stopped.
    """
    listen()
    try:
        # Only now: the imports take long enough to be interrupted.
        from excise.cli import run_app

        run_app()
    except KeyboardInterrupt as told:
        sys.exit(said(told))


if __name__ == "__main__":
    main()
