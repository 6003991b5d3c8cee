"""The command line: it parses, calls the library, and prints. One module for each command.

:mod:`.app` puts the commands together; :mod:`.reporting` has what they share about messages and exit
statuses.
"""

from lasskvm.cli.app import app as main

__all__ = ["main"]
