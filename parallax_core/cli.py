"""The console script ``parallax-core``: it runs a command and turns what goes wrong into one line."""

from __future__ import annotations

import sys
import traceback


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status: 0, 2 for bad input, 1 for a computation that failed.

    arguments: without the program's name; those of the process if None. ``--debug``, anywhere among them,
    shows the traceback of an error. Raises SystemExit.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        from parallax_core import commands
    except ModuleNotFoundError as error:
        _exit(2, f"{error.name} is not installed: pip install 'parallax-core[cli]'", debug)
    try:
        status = commands.app(args=arguments, prog_name="parallax-core", standalone_mode=False)
    except commands.UsageError as error:
        _exit(2, error.format_message(), debug)
    except commands.InputError as error:
        _exit(2, str(error), debug)
    except (KeyboardInterrupt, commands.Abort):
        _exit(130, "interrupted", debug)
    except ModuleNotFoundError as error:
        _exit(2, f"{error.name} is not installed: pip install 'parallax-core[cli]'", debug)
    except Exception as error:
        _exit(1, f"{error} (--debug shows the traceback)", debug)
    sys.exit(status or 0)


def _exit(status: int, message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    if message:  # none after the help that stands in for a missing command
        print(f"parallax-core: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
