"""`llmkit` in its own process without start-up time: forked from a server that has already imported torch, numba, etc.

    python tests/preloaded.py serve SOCKET           # prints "ready"; ends when its stdin closes
    python tests/preloaded.py serve SOCKET text      # is ready in a third of the time: imports nothing that needs torch
    python tests/preloaded.py SOCKET filter -h       # like `python -m llmkit filter -h`

A call has the caller's arguments, directory, environment, stdin, stdout and stderr; its exit code becomes the caller's,
and it is killed with the caller. Settings read at import are those of the server, though: the hash seed, the settings of
numba and other libraries. Tests of these, of the start itself, and of signals and limits use `python -m llmkit`.
"""

from __future__ import annotations

import os
import sys

TEXT = "cli", "io", "lineage", "engine", "shards", "corpus", "tokens", "mixing", "kernels"  # folders without torch


def call(socket_path: str, arguments: list[str]) -> int:
    """Send one call to the server; returns its exit code. Nothing is imported that takes time."""
    import _socket

    server = _socket.socket(_socket.AF_UNIX)
    server.connect(socket_path)
    numbers = [0, 1, 2, *(int(word[8:]) for word in arguments if word.startswith("/dev/fd/"))]  # <(command)
    files = b"".join(number.to_bytes(4, sys.byteorder) for number in numbers)
    server.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, files)])
    server.sendall(ascii((arguments, numbers, os.getcwd(), dict(os.environ))).encode())
    server.shutdown(_socket.SHUT_WR)
    return int(server.recv(3))


def preload(text_only: bool) -> None:
    """Import everything that commands import, and load what compiled kernels need."""
    import pkgutil
    from importlib import import_module

    import llmkit
    from llmkit.cli.shared.options import build
    from llmkit.cli.shared.table import COMMANDS, module_of

    lazy = ("numba", "tokenizers", "typer._adapters")
    for name in lazy if text_only else (*lazy, "accelerate", "lm_eval.evaluator", "torch._dynamo"):
        import_module(name)
    for module in pkgutil.walk_packages(llmkit.__path__, "llmkit."):
        if module.name != "llmkit.__main__" and (not text_only or module.name.split(".")[1] in TEXT):
            import_module(module.name)
    for name in COMMANDS:
        build(import_module(module_of(name)).main, name)
    warm_up()


def warm_up() -> None:
    """Run the commonest commands, which load their compiled kernels and build tables."""
    import shlex
    import signal
    import tempfile

    from llmkit.cli.main import run_command

    before = signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryDirectory() as directory:
        documents = f"{directory}/docs.jsonl"
        with open(documents, "w") as file:
            file.writelines(
                f'{{"text": "{number} birds over a river, and under the hill {number} stones"}}\n'
                for number in range(40)
            )
        for line in (
            f"vocab {documents} --size 300 -o {directory}/tok",
            f"tokenize {documents} -t {directory}/tok -o {directory}/shards",
            f"filter {documents} --preset gopher -o {directory}/clean.jsonl.zst",
            f"dedup {documents} -o {directory}/unique.jsonl.zst",
        ):
            name, *arguments = shlex.split(line)
            if run_command(name, [*arguments, "-q"]):
                sys.exit(f"could not run: llmkit {line}")
    signal.signal(signal.SIGTERM, before)


def serve(socket_path: str) -> list[str]:
    """Accept calls until stdin closes. Returns in the forked process of each call, with its arguments."""
    import contextlib
    import select
    import socket

    server = socket.socket(socket.AF_UNIX)
    server.bind(socket_path)
    server.listen(64)
    print("ready", flush=True)
    while 0 not in select.select([0, server], [], [])[0]:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            return handle(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    os._exit(0)


def handle(connection: Any) -> list[str]:
    """Fork the process of one call, in which this returns; the parent reports its exit code and exits."""
    import ast
    import select
    import signal
    import socket

    _, files, _, _ = socket.recv_fds(connection, 1, 16)
    with connection.makefile("rb") as message:
        arguments, numbers, directory, environment = ast.literal_eval(message.read().decode())
    process = os.fork()
    if process == 0:
        connection.close()
        for number, file in zip(numbers, files, strict=True):
            os.dup2(file, number)
            os.close(file)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return list(arguments)
    for number in (0, 1, 2, *files):
        os.close(number)
    process_fd = os.pidfd_open(process)
    poll = select.poll()
    poll.register(process_fd, select.POLLIN)
    poll.register(connection, select.POLLHUP)
    if process_fd not in dict(poll.poll()):
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        connection.sendall(str(code if code >= 0 else 128 - code).encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        import atexit
        import gc
        from typing import Any

        preload(sys.argv[3:] == ["text"])
        from llmkit.cli.main import main

        gc.freeze()  # so that garbage collection in a call does not touch, and thus copy, shared pages
        arguments = sys.argv[1:] = serve(sys.argv[2])
        try:
            main(arguments)
        except SystemExit as exit:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(exit.code)  # skips the slow teardown of imported modules
    sys.exit(call(sys.argv[1], sys.argv[2:]))
