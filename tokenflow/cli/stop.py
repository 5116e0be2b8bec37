"""How a command ends on an error that the user can mend, and which words ask for help."""

from __future__ import annotations

import sys
from typing import NoReturn

from tokenflow.text import printable_lines

HELP = ("-h", "--help")


def stop(message: str) -> NoReturn:
    """Prints an error and exits with code 2."""
    print(printable_lines(f"tokenflow: error: {message}"), file=sys.stderr)
    raise SystemExit(2)
