"""Errors that are the user's to fix: shown as one line, never as a traceback."""


class UserError(Exception):
    """Something that was asked for cannot be done; the message says what to change.

    The message names what was wanted, what was got and the remedy (file, key or option). Commands end
    with `exit_status` after printing it.
    """

    exit_status = 1


class UsageError(UserError):
    """The command itself was wrong (unknown option, contradictory settings)."""

    exit_status = 2
