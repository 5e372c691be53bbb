"""The ``cnf`` command: everything expected that goes wrong is one line and an exit code."""

from __future__ import annotations

import sys
import warnings


def main() -> int:
    """Run the command line; the exit code.

    2 stands for a wrong argument, bad data or a missing extra, 130 for an interrupt. What nobody
    expected keeps its traceback.
    """
    try:
        from cnf.cli import EXPECTED, app, explain
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print('cnf: the command needs typer: pip install "cnf[cli]"', file=sys.stderr)
        return 2
    with warnings.catch_warnings():
        warnings.showwarning = _say  # type: ignore[assignment]
        try:
            app()
        except SystemExit as done:
            return done.code if isinstance(done.code, int) else int(done.code is not None)
        except KeyboardInterrupt:
            print("cnf: interrupted", file=sys.stderr)
            return 130
        except EXPECTED as error:
            line = explain(error)
            if line is None:
                raise
            print(f"cnf: {line}", file=sys.stderr)
            return 2
    return 0


def _say(message: Warning | str, *_: object) -> None:
    """A warning as one line, without the place in the source that it came from."""
    print(f"cnf: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
