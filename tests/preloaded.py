"""`llmkit` as a process of its own that starts at once: forked from one that has imported torch, numba and the rest, which takes longer than most calls.

    python tests/preloaded.py serve SOCKET           # says "ready"; ends when its stdin does
    python tests/preloaded.py SOCKET filter -h       # as `python -m llmkit filter -h`

A call has the caller's arguments, directory, environment, stdin, stdout and stderr; its exit code is the caller's, and it is killed when the caller is.
What is read at import is the server's, though: hash seed, numba's and other libraries' settings. Tests of such things, of the start itself, of
signals and limits use `python -m llmkit`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys


def call(place: str, arguments: list[str]) -> int:
    """The exit code of one call."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        socket.send_fds(server, [b"."], [0, 1, 2])
        server.sendall(json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode())
        server.shutdown(socket.SHUT_WR)
        return int(server.recv(3))


def preload() -> None:
    """Import what commands import."""
    import pkgutil
    from importlib import import_module

    import llmkit
    from llmkit.cli.shared.options import build
    from llmkit.cli.shared.table import COMMANDS, module_of

    for name in ("accelerate", "lm_eval.evaluator", "tokenizers", "torch._dynamo"):  # which functions import
        import_module(name)
    for module in pkgutil.walk_packages(llmkit.__path__, "llmkit."):
        if module.name != "llmkit.__main__":
            import_module(module.name)
    for name in COMMANDS:
        build(import_module(module_of(name)).main, name)


def serve(place: str) -> list[str]:
    """Take calls until stdin ends. Returns in the process of each call, with its arguments."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(place)
    server.listen(64)
    print("ready", flush=True)
    while 0 not in select.select([0, server], [], [])[0]:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            return attend(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    os._exit(0)


def attend(connection: socket.socket) -> list[str]:
    """Fork the process of one call, in which this returns, and see to its end."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as sent:
        arguments, directory, environment = json.load(sent)
    process = os.fork()
    if process == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return list(arguments)
    for number in (0, 1, 2, *files):
        os.close(number)
    watched = os.pidfd_open(process)
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    poll.register(connection, select.POLLHUP)
    if watched not in dict(poll.poll()):
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        connection.sendall(str(code if code >= 0 else 128 - code).encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        preload()
        from llmkit.cli.main import main

        gc.freeze()  # so that the collector of a call does not touch, and so copy, what all share
        arguments = sys.argv[1:] = serve(sys.argv[2])
        try:
            main(arguments)
        except SystemExit as exit:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(exit.code)  # without taking apart what was imported, which takes long
    sys.exit(call(sys.argv[1], sys.argv[2:]))
