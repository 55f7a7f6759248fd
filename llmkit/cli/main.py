"""Entry point of the command line.

`--help` and `--version` use the standard library alone; any other call imports only the module of its command. Every
failure is reported here as one line on stderr, a hint, and an exit code of `ExitCode`; a traceback is shown only with
--debug.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from llmkit import __version__
from llmkit.cli.shared.table import COMMANDS, module_of, overview, split, subcommands


def main(argv: list[str] | None = None) -> NoReturn:
    """Run `llmkit ARGV...` and exit the process."""
    if argv is None:
        _leave_signals_to_the_system()
        _open_closed_streams()
        _use_utf8()
        _ignore_failing_messages()
    arguments = sys.argv[1:] if argv is None else argv
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        _print(overview())
    elif first in ("-V", "--version"):
        _print(f"llmkit {__version__}")
    elif first == "help":
        sys.exit(_help(arguments[1:]))
    else:
        sys.exit(_dispatch(*split(arguments)))
    sys.exit(0)


def _leave_signals_to_the_system() -> None:
    """Before and after a command, a signal ends the process at once, since there is nothing to remove, and a traceback
    would be all that Python adds. Ignored signals stay ignored, as under nohup.
    """
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _open_closed_streams() -> None:
    """Give streams that the caller closed (`>&-`) a descriptor, so that no file that is opened later takes its place.

    What is written to stdout is an error then; messages are lost.
    """
    for descriptor, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)


def _use_utf8() -> None:
    """Read and write arguments, names and streams as UTF-8, whatever the locale.

    Python takes the encoding of arguments and names from the locale before any code of ours runs, so another one means
    a new start. Names that are not UTF-8 pass through as bytes.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    for stream in (sys.stdin, sys.stdout):  # stderr escapes what its encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


class _Unfailing(io.FileIO):
    """A file that swallows what cannot be written."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _ignore_failing_messages() -> None:
    """A full disk or a reader that has gone costs the messages on stderr, not the command."""
    if isinstance(sys.stderr, io.TextIOWrapper):
        raw = io.BufferedWriter(_Unfailing(sys.stderr.fileno(), "wb", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)


def _help(arguments: list[str]) -> int:
    """`llmkit help [COMMAND] [--json]`: the overview, the help of a command, or the schema of commands as JSON."""
    words = [word for word in arguments if not word.startswith("-")]
    if "--json" in arguments:
        import json

        from llmkit.cli.shared.schema import schema

        name = " ".join(words)
        if name and name not in COMMANDS:
            return _dispatch(name, ["--json"])
        _print(json.dumps(schema([name] if name else list(COMMANDS)), ensure_ascii=False))
        return 0
    if words:
        return _dispatch(*split([*words, "--help"]))
    _print(overview())
    return 0


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _exit_on_broken_pipe()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is buffered must not fail once more at the exit
        error.filename = "standard output"
        sys.exit(_fail("llmkit", _os_message(error), _os_hint(error), 1))


def _exit_on_broken_pipe() -> NoReturn:
    """Exit quietly after the reader of stdout has gone; stdout is redirected for the interpreter's final flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(141)


def _dispatch(name: str, arguments: list[str]) -> int:
    from llmkit.errors import ExitCode, suggestion

    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        as_json = "--json" in arguments
        return _fail("llmkit", f"unknown {kind} {name!r}", suggestion(name, COMMANDS), ExitCode.USAGE, as_json)
    if arguments and subcommands(name) and arguments[0].isalpha() and not os.path.exists(arguments[0]):
        hint = suggestion(arguments[0], subcommands(name))
        if hint.startswith("did"):
            message = f"unknown command '{name} {arguments[0]}', and no such file"
            return _fail("llmkit", message, hint, ExitCode.USAGE, "--json" in arguments)
    return run_command(name, arguments)


def run_command(name: str, arguments: list[str]) -> int:
    """Run one subcommand in this process and return its exit code."""
    import errno
    import signal
    import threading
    from importlib import import_module

    from llmkit.errors import ExitCode, LlmkitError, Terminated

    program = f"llmkit {name}"
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "-V" in options or "--version" in options:
        _print(f"llmkit {__version__}")
        return ExitCode.OK
    debug = "--debug" in options

    def fail(message: str, hint: str, code: int) -> int:
        from llmkit.cli.shared.invocation import Run

        return _fail(program, message, hint, code, "--json" in options or Run.reports_json, options)

    received: KeyboardInterrupt | None = None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}  # by nohup

    ended = threading.Event()

    def receive(number: int, frame: object) -> None:
        nonlocal received
        if received is None:
            threading.Thread(target=send_again, daemon=True).start()
        received = KeyboardInterrupt(number) if number == signal.SIGINT else Terminated(number)
        raise received

    def send_again() -> None:
        """Python drops exceptions in finalizers, and some libraries catch all of them. A signal that was lost like this
        is sent again, unless its exception is being handled: cleanup is not interrupted."""
        while not ended.wait(0.25):
            if received and not _is_handled(received):
                signal.pthread_kill(threading.main_thread().ident or 0, received.args[0])

    def report_dropped(unraisable: Any) -> None:
        if not received or unraisable.exc_value is not received:
            sys.__unraisablehook__(unraisable)

    hook, sys.unraisablehook = sys.unraisablehook, report_dropped
    try:
        for number in handlers:
            signal.signal(number, receive)
        from llmkit.cli.shared.invocation import Run
        from llmkit.cli.shared.options import build

        Run.reports_json = False
        build(import_module(module_of(name)).main, name)(arguments)
        sys.stdout.flush()
        if received is None:
            return ExitCode.OK
        error: BaseException = received
    except (Exception, KeyboardInterrupt) as raised:
        error = received or raised  # a library may turn a signal into an error of its own
    finally:
        ended.set()
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if isinstance(error, Terminated):
        return _end_stdout(error.code)
    if isinstance(error, KeyboardInterrupt):
        print(f"{program}: interrupted", file=sys.stderr)
        return _end_stdout(ExitCode.INTERRUPTED)
    if isinstance(error, MemoryError):
        return fail("out of memory", "use fewer jobs (-j) or smaller batches", ExitCode.ERROR)
    if debug:
        raise error
    if isinstance(error, BrokenPipeError):
        _exit_on_broken_pipe()
    if isinstance(error, LlmkitError):
        cause = error.__cause__
        hint = error.hint
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            hint = _os_hint(cause)
        return fail(error.message, hint, error.code)
    if isinstance(error, OSError):
        return fail(_os_message(error), _os_hint(error), ExitCode.ERROR)
    text = str(error).splitlines()[0] if str(error) else "no message"
    hint = "run again with --debug for the traceback"
    return fail(f"internal error: {type(error).__name__}: {text}", hint, ExitCode.ERROR)


def _is_handled(error: BaseException) -> bool:
    """Whether the main thread is handling this exception, or one that was raised because of it."""
    import threading

    current: Any = sys._current_exceptions().get(threading.main_thread().ident or 0)
    rest = [current[1] if isinstance(current, tuple) else current]  # a tuple before Python 3.12
    seen: set[int] = set()
    while rest:
        current = rest.pop()
        if current is error:
            return True
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            rest += [current.__cause__, current.__context__]
    return False


def _os_message(error: OSError) -> str:
    from llmkit.io.atomic import FULL

    # Outputs with a name give it, io/atomic.py.
    where = error.filename or ("standard output, or a temporary file" if error.errno in FULL else "")
    return f"{where}: {error.strerror or error}" if where else str(error.strerror or error)


def _os_hint(error: OSError) -> str:
    import errno

    from llmkit.io.atomic import FULL

    if error.errno in FULL:
        other = "write to another disk with -o" if error.filename else "name an output with -o, or set TMPDIR"
        return f"free some space, or {other}; nothing incomplete was left behind"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "check the permissions"
    if error.errno == errno.ELOOP:
        return "symbolic links are not followed here: remove it"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "allow more open files (ulimit -n), or name fewer inputs"
    return ""


def _fail(program: str, message: str, hint: str, code: int, as_json: bool = False, words: Sequence[str] = ()) -> int:
    """Print the error and the hint on a line each, or as one JSON line; return `code`. Escapes control characters."""
    from llmkit.io.names import one_line

    if as_json:
        lines = [_as_json(program, message, hint, code, words)]
    else:
        lines = [f"{program}: error: {one_line(message)}"] if message else []
        lines += [f"hint: {one_line(hint)}"] if hint else []
    for line in lines:
        print(line, file=sys.stderr, flush=True)
    return _end_stdout(code)


def _end_stdout(code: int) -> int:
    """Write what is buffered; where that fails (a full disk), the final flush must not change the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def _as_json(program: str, message: str, hint: str, code: int, words: Sequence[str]) -> str:
    """The error as a JSON object: command, code, message, hint, and the file and line that the message begins with.

    `words` are the arguments of the call, among which the file is looked for.
    """
    import json
    import re

    from llmkit.io.names import escape_names

    command = program.removeprefix("llmkit").strip()
    record: dict[str, object] = {"command": command, "code": int(code), "message": message, "hint": hint or None}
    file = line = None
    if location := re.match(r"([^:]+):(?:([0-9]+):)? ", message):
        file, line = location[1], int(location[2]) if location[2] else None
        if line is None and not any(word == file or word.endswith(f"={file}") for word in words):
            file = file if os.path.lexists(file) else None  # "seed: ..." does not begin with a file
    return json.dumps({"error": escape_names(record | {"file": file, "line": line})})
