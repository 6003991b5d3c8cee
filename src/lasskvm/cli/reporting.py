"""How commands speak and end: messages on standard error, and exit statuses that a script can rely on."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from lasskvm.errors import LassKvmError

__all__ = [
    "STATUS_ERROR",
    "STATUS_FAILED",
    "STATUS_INTERRUPTED",
    "ignore",
    "nearest",
    "reports_errors",
    "say",
]

_Parameters = ParamSpec("_Parameters")

#: The command did its work, and the result is a bad one.
STATUS_FAILED = 1
#: An error of the person's: a wrong option, a bad image. What typer itself exits with, too.
STATUS_ERROR = 2
#: 128 + SIGINT and 128 + SIGPIPE, as shells report them.
STATUS_INTERRUPTED = 130
STATUS_BROKEN_PIPE = 141


def say(message: str) -> None:
    """Print one line on standard error: everything that is not the command's result."""
    typer.echo(f"lasskvm: {message}", err=True)


def ignore(message: str) -> None:
    """Do without *message*: what takes the place of :func:`say` when a command is to be quiet."""
    del message


def reports_errors(command: Callable[_Parameters, None]) -> Callable[_Parameters, None]:
    """Turn what ends *command* early into a sentence and an exit status, never into a traceback."""

    @functools.wraps(command)
    def reporting(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except LassKvmError as error:
            say(str(error))
            raise typer.Exit(STATUS_ERROR) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(STATUS_INTERRUPTED) from error
        except BrokenPipeError as error:
            # Python would fail once more when it flushes standard output at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(STATUS_BROKEN_PIPE) from error

    return reporting


def nearest(name: str, known: tuple[str, ...]) -> str:
    """Advice for a *name* that is none of *known*: the one that was probably meant, or all."""
    import difflib

    matches = difflib.get_close_matches(name, known, n=1)
    return f'did you mean "{matches[0]}"?' if matches else f"choose from: {', '.join(known)}"
