"""The command line: it parses, calls the library, and prints. One module for each command.

:mod:`.app` puts the commands together; :mod:`.reporting` has what they share about messages and exit
statuses.
"""

import atexit
import gc
from collections.abc import Sequence

from lasskvm.cli.app import app

__all__ = ["main"]

#: So many new objects make Python look for garbage; its 700 suit programs that leave cycles behind all the time.
_GARBAGE_THRESHOLD = 50_000


def main(arguments: Sequence[str] | None = None, *, prog_name: str | None = None) -> None:
    """Run the command that *arguments* name, those of the process by default. Ends by ``SystemExit``."""
    # Most of what a command makes is modules and tables, which stay. To search them for garbage while they grow, and
    # once more at the end, takes a third of the time in which a small guest starts and ends.
    gc.set_threshold(_GARBAGE_THRESHOLD)
    atexit.register(gc.freeze)
    app(arguments, prog_name=prog_name)
