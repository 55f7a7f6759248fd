"""Exit codes and the errors that become one clear line on stderr.

Every error that a user can cause is an `LlmkitError`: a message that names file, line or field, and a hint on
what to do. The command line prints both and exits with `code`; a traceback appears only with --debug.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

MAX_LISTED = 30  # names in a hint
UNREADABLE = "unreadable"  # the only field, with the reason, of what stands for a record that cannot be read


class ExitCode(IntEnum):
    """Exit codes of every command."""

    OK = 0
    ERROR = 1
    USAGE = 2
    LOST = 69  # EX_UNAVAILABLE
    LOCKED = 75  # EX_TEMPFAIL
    HUNG_UP = 129
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143

    @property
    def meaning(self) -> str:
        """What the code says, for `llmkit help --json`."""
        return EXIT_MEANINGS[self]


EXIT_MEANINGS = {
    ExitCode.OK: "success",
    ExitCode.ERROR: "run-time error: bad data, full disk, missing file",
    ExitCode.USAGE: "the command line itself is wrong",
    ExitCode.LOST: "another process of the group, or the device, died or hangs",
    ExitCode.LOCKED: "try again later: another run holds the output, or the time limit was reached",
    ExitCode.HUNG_UP: "SIGHUP: the terminal was closed",
    ExitCode.INTERRUPTED: "SIGINT",
    ExitCode.BROKEN_PIPE: "the reader of stdout closed it",
    ExitCode.TERMINATED: "SIGTERM",
}


class LlmkitError(Exception):
    """An error with a one-line message, a hint, and the exit code it leads to."""

    code = ExitCode.ERROR

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # for callers from Python

    def __reduce__(self) -> tuple[type[LlmkitError], tuple[str, str]]:
        # For errors that workers of `engine` send to the parent process.
        return type(self), (self.message, self.hint)


class UsageError(LlmkitError):
    """An invalid call: an unknown name, or options that exclude each other."""

    code = ExitCode.USAGE


class LockedError(LlmkitError):
    """Another run holds the lock on the output."""

    code = ExitCode.LOCKED


class LostError(LlmkitError):
    """Another process of the group, or the device, was lost."""

    code = ExitCode.LOST


class UnfinishedError(LlmkitError):
    """The time limit was reached; the same call with --resume continues."""

    code = ExitCode.LOCKED


def suggestion(name: str, known: Iterable[str]) -> str:
    """Hint for an unknown `name`: the nearest known names, or else the first MAX_LISTED of all."""
    from difflib import get_close_matches

    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    shown = ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED:,} more" if names[MAX_LISTED:] else "")
    return f"known: {shown}" if names else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Error for a `name` that is not a known filter, preset, architecture, ..."""
    return UsageError(f"unknown {kind} {name!r}", suggestion(name, known))


class UnreadableRecordError(LlmkitError):
    """The lineage record of `name` is there, but not as a command writes it. `reason`: what is wrong with it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name}: its lineage record is there, but cannot be read: {reason}",
            "the step that made it is unknown; make it again, or use a copy that is intact",
        )
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type[LlmkitError], tuple[str, str]]:
        return type(self), (self.name, self.reason)


class InputWarning(UserWarning):
    """A part of an input that the output lacks, such as a record that cannot be read; a command prints it in a line."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived. Like KeyboardInterrupt, it passes every `except Exception`."""

    def __init__(self, number: int = 15) -> None:
        super().__init__(number)
        self.code = ExitCode(128 + number)
