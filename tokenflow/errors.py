"""What a user can mend: every other exception is a bug."""

import os


class InputError(ValueError):
    """Bad input. The message states what was expected, what came, and what to do.

    The command line prints it without a traceback; nothing half-written remains.
    """


def explained(error: BaseException) -> str:
    """An error's message for the user; of one that is a bug, its type as well."""
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


class DivergedError(InputError, FloatingPointError):
    """A latent became NaN or infinite; the message names the stage and the step."""


class PluginError(InputError):
    """An editor or kernel broke its contract or raised an exception; the message names it."""


class Interrupted(SystemExit):
    """Ctrl-C, where KeyboardInterrupt would not do: Lightning turns that into exit code 1."""


class Preempted(SystemExit):
    """A run stopped on request where it can be resumed; the exit code is 75, "try again"."""

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)
