"""Errors that are the user's to fix: shown as one line, never as a traceback."""

MAX_REASON = 300  # letters; torch lists every tensor that does not fit


class UserError(Exception):
    """Something that was asked for cannot be done; the message says what to change.

    The message names what was wanted, what was got and the remedy (file, key or option). Commands end
    with `exit_status` after printing it.
    """

    exit_status = 1


class UsageError(UserError):
    """The command itself was wrong (unknown option, contradictory settings)."""

    exit_status = 2


def reason(error: BaseException) -> str:
    """Why something failed, in one line that is never empty and can stand in brackets or after a colon.

    A library's message may run over many lines; where an error has none, or only the key that was looked for, its kind
    is named.
    """
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    if isinstance(error, KeyError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
