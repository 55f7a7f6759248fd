"""Work on a Ray cluster, with the same results in the same order as in one process.

    cluster = Cluster()                                   # the cluster at RAY_ADDRESS, or one on this machine
    for result in cluster.map(work, reader):              # `work` applied to each chunk of documents
        ...
    for result in cluster.starmap(work, arguments):       # to any arguments that can be pickled

Files are read wherever there is capacity: a chunk goes from the machine that reads it to the one that processes it, and
the driver sees only the results. Input that can only be read on the driver (stdin) is sent from there. A lost worker or
machine is replaced and its work repeated, at most three times; work is pure, so the repetition has no effect on the
output. Errors raised by `work` or by reading are raised on the driver, in order.

Every machine needs the same version of llmkit and the same paths or URLs of inputs. Driver memory: a window of
results, `CALLS_PER_CORE` for each core of the cluster. Values held on the machines are in Ray's object store, which
spills to disk.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import chdir, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, TypeVar

from llmkit.engine.isolation import Isolated
from llmkit.engine.local import Local
from llmkit.errors import LlmkitError
from llmkit.io.documents import BadLine, Chunk, DocumentReader, ReadOptions
from llmkit.io.inputs import STDIN
from llmkit.io.record import Input

Item = TypeVar("Item")
Result = TypeVar("Result")
Ref = Any  # a Ray object reference

CALLS_PER_CORE = 3  # calls in flight
READ_AHEAD = 8  # chunks that the reader of a file may be ahead of their consumer
FILES_PER_MACHINE = 4  # files read at once
USER_MODULES = "llmkit_rules_"  # prefix of modules loaded from the user's files, see corpus/chain_loader.py
CONNECT_TIMEOUT = 10.0  # s
RETRIES = 3  # of a call whose worker or machine is lost


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception as a result: Ray's own wrapping would lose its type and its place in the order."""

    error: Exception


class Cluster:
    """A connection to a Ray cluster, made at first use.

    First use raises LlmkitError if Ray is not installed or no cluster can be reached.
    """

    @cached_property
    def _ray(self) -> Any:
        return _connect()

    @cached_property
    def _remote(self) -> dict[Callable[..., Any], Any]:
        """The functions of this module that run on workers, as Ray remote functions."""
        return {work: self._ray.remote(max_retries=RETRIES)(work) for work in (_call, _step, _yield)}

    @property
    def cores(self) -> int:
        """Number of cores of all machines."""
        cores = int(self._ray.cluster_resources().get("CPU", 0))
        if not cores:
            raise LlmkitError("the Ray cluster has no cores", "add a machine: ray start --address=...")
        return cores

    def __reduce__(self) -> tuple[type[Local], tuple[()]]:
        return Local, ()  # on a worker, an engine is the worker itself

    # One call at a time.
    def _share(self, work: Callable[..., Any]) -> Ref:
        """Put a function used by many calls into the object store once, with the modules of the user's own files."""
        for name, module in list(sys.modules.items()):
            if name.startswith(USER_MODULES):
                self._ray.cloudpickle.register_pickle_by_value(module)
        return self._ray.put(partial(_in_directory, os.getcwd(), work))

    def call(self, work: Any, *arguments: Any, returns: int = 1) -> Any:
        """Call `work` on some machine: a ref, or a list of `returns` refs if it returns a tuple.

        Refs passed as `work` or arguments stand for their values.
        """
        return self._remote[_call].options(num_returns=returns).remote(returns, work, *arguments)

    def get(self, ref: Ref) -> Any:
        """Wait for the value of a ref. An exception raised by its call is raised here."""
        import ray.exceptions as ray_errors

        try:
            value = self._ray.get(ref)
        except ray_errors.RayError as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise LlmkitError(f"Ray: {reason[-1]}", "see Ray's logs; the usual cause is too little memory") from error
        if isinstance(value, Raised):
            raise value.error
        return value

    # Many calls, in order.
    def starmap(self, work: Callable[..., Result], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        """`work` applied to each tuple of arguments, in order."""
        shared = self._share(work)
        for ref in _prefetch(lambda values: self.call(shared, *values), arguments, CALLS_PER_CORE * self.cores):
            yield self.get(ref)

    def map(self, work: Callable[[Chunk], Result], reader: DocumentReader) -> Iterator[Result]:
        """`work` applied to each chunk of a reader, in order. The reader's `inputs` are complete at the end."""
        for result, _ in self.scatter(work, reader, 1):
            yield result

    def scatter(
        self, work: Callable[[Chunk], Any], reader: DocumentReader, parts: int
    ) -> Iterator[tuple[Any, list[Ref]]]:
        """As `map`, for `work` that returns a tuple of `parts` values.

        Yields the first value, and refs to the others, which stay in the cluster.
        """
        shared, step = self._share(Isolated(work)), self._remote[_step].options(num_returns=parts)
        start = lambda item: step.remote(parts, shared, item)  # noqa: E731
        for refs in _prefetch(start, self._chunks(reader), CALLS_PER_CORE * self.cores):
            first, *others = refs if parts > 1 else [refs]
            value = self.get(first)
            if isinstance(value, _FileInputs):
                reader.inputs += value.inputs
                for bad in value.bad:
                    reader.accept_file(bad)
            else:
                yield value, others

    def flat_map(self, work: Callable[[Any], Iterator[Result]], items: Iterable[Any]) -> Iterator[Result]:
        """The values that `work` yields for each item, in order. One item is one task."""
        shared = self._share(work)
        for stream in _prefetch(lambda item: self._stream(1, shared, item), items, self.cores):
            for ref in stream:
                yield self.get(ref)

    def _chunks(self, reader: DocumentReader) -> Iterator[Any]:
        """The chunks of a reader's files, those of each file followed by its lineage."""
        read, machines = partial(_read, reader.options), sum(node["Alive"] for node in self._ray.nodes())
        shared = self._share(read)
        start = lambda path: read(path) if path == STDIN else self._stream(0, shared, path)  # noqa: E731
        return chain.from_iterable(_prefetch(start, reader.paths, FILES_PER_MACHINE * machines))

    def _stream(self, cores: int, *arguments: Any) -> Any:
        """Refs to the values yielded by a generator.

        A generator that holds no core is at most `READ_AHEAD` values ahead of its consumer, and is placed where few
        others run. One that holds a core must never wait, because what it waits for may need its core.
        """
        options: dict[str, Any] = {"num_returns": "streaming", "num_cpus": cores}
        if not cores:
            options |= {"_generator_backpressure_num_objects": READ_AHEAD, "scheduling_strategy": "SPREAD"}
        return self._remote[_yield].options(**options).remote(*arguments)


def _prefetch(start: Callable[[Item], Result], items: Iterable[Item], window: int) -> Iterator[Result]:
    """`start` applied to each item, at most `window` items ahead of the consumer."""
    started: deque[Result] = deque()
    for item in items:
        started.append(start(item))
        if len(started) > window:
            yield started.popleft()
    yield from started


def _connect() -> Any:
    """Connect to the cluster and return the module `ray`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of calls in flight after one that failed
    try:
        import ray
        import ray._private.worker as ray_worker
    except ImportError:
        raise LlmkitError("Ray is not installed", "pip install 'llmkit[ray]'") from None
    if not ray.is_initialized():
        # Ray would report lost machines on stdout, in the middle of the data.
        ray_worker.print_to_stdstream = lambda *_, **__: None
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        address = os.environ.get("RAY_ADDRESS", "")
        try:
            if re.fullmatch(r"[\w.-]+:\d+", address):  # Ray itself retries for minutes if nothing answers
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), CONNECT_TIMEOUT).close()
            # Workers would take modules from the directory in which Ray starts, as `python -m` does (__main__.py).
            with chdir("/") if os.environ.get("PYTHONSAFEPATH") else nullcontext():
                ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:  # of many kinds
            message = str(error).splitlines() or [type(error).__name__]
            raise LlmkitError(
                f"no Ray cluster at {address or 'this machine'}: {message[0]}", "see RAY_ADDRESS"
            ) from error
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray replaces the handlers that the command line has set
    return ray


@dataclass(frozen=True, slots=True)
class _FileInputs:
    """The lineage of a file that has been read to its end, and whether it was bad."""

    inputs: list[Input]
    bad: list[BadLine]


# Functions that run on the workers.
def _in_directory(directory: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work` in the driver's working directory, where relative paths are right, if it exists on this machine."""
    with suppress(OSError):
        os.chdir(directory)
    return work(*arguments)


def _call(returns: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work`. An error becomes the first of the results; an error among the arguments is passed on."""
    failed = next((value for value in arguments if isinstance(value, Raised)), None)
    try:
        return _first(failed, returns) if failed else work(*arguments)
    except Exception as error:
        return _first(Raised(error), returns)


def _step(returns: int, work: Callable[[Chunk], Any], item: Any) -> Any:
    """`_call` for a chunk; the lineage of a file is passed through."""
    return _call(returns, work, item) if isinstance(item, Chunk) else _first(item, returns)


def _first(value: Any, returns: int) -> Any:
    return value if returns == 1 else (value, *[None] * (returns - 1))


def _yield(work: Callable[[Any], Iterator[Any]], item: Any) -> Iterator[Any]:
    try:
        yield from work(item)
    except Exception as error:
        yield Raised(error)


def _read(options: ReadOptions, path: str) -> Iterator[Any]:
    """The chunks of a file, then its lineage."""
    on_bad_file = "stop" if options.on_bad_file == "stop" else "skip"  # the driver writes the quarantine
    reader = DocumentReader([path], replace(options, on_bad_file=on_bad_file, on_bad_line="skip"))
    yield from reader.chunks()
    yield _FileInputs(reader.inputs, reader.bad_files)
