"""Work on a Ray cluster: the same results, in the same order, as in one process.

    cluster = Cluster()                                   # the cluster of RAY_ADDRESS, or this machine's
    for result in cluster.map(work, reader):              # `work` of each chunk of documents
        ...
    for result in cluster.each(work, arguments):          # of anything that can be pickled

Files are read where there is room: a chunk goes from the machine that reads it to the one that works on it, and the driver sees results alone. What
can only be read here (stdin) is sent from here. A worker or machine that is lost is replaced and its work done again, three times at most;
work is pure, so nobody sees it. Errors that `work` or reading raises are raised here, in their turn.

Every machine needs the same llmkit, and the same paths or URLs of inputs. Memory of the driver: a window of results, `WINDOW` for each core of the
cluster; what waits on the machines is in Ray's object store, which spills to disk.
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
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any, TypeVar

from llmkit.engine.local import Local
from llmkit.errors import LlmkitError
from llmkit.io.documents import Chunk, DocumentReader, ReadOptions
from llmkit.io.inputs import STDIN
from llmkit.io.record import Input

Item = TypeVar("Item")
Result = TypeVar("Result")
Ref = Any  # a value that lies somewhere in the cluster

WINDOW = 3  # calls on their way for each core
AHEAD = 8  # chunks that a file's reader may be ahead
READERS = 4  # files that are read at once, for each machine
OWN_RULES = "llmkit_rules_"  # how modules of the user's own files begin, see corpus/rules.py
REACHABLE = 10.0  # seconds for a cluster to answer
RETRIES = 3  # of a call whose worker or machine is lost


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception as a result: Ray's own wrapping would lose its type, and its place in the order."""

    error: Exception


class Cluster:
    """A connection to a Ray cluster, made at the first use. LlmkitError then where Ray is not installed or no cluster can be reached."""

    @cached_property
    def _ray(self) -> Any:
        return _connected()

    @cached_property
    def _remote(self) -> dict[Callable[..., Any], Any]:
        """Our own functions for workers, as Ray's."""
        return {work: self._ray.remote(max_retries=RETRIES)(work) for work in (_call, _step, _yield)}

    @property
    def cores(self) -> int:
        """Of all machines."""
        cores = int(self._ray.cluster_resources().get("CPU", 0))
        if not cores:
            raise LlmkitError("the Ray cluster has no cores", "add a machine: ray start --address=...")
        return cores

    def __reduce__(self) -> tuple[type[Local], tuple[()]]:
        return Local, ()  # a worker has itself alone

    # One call at a time.
    def _shared(self, work: Callable[..., Any]) -> Ref:
        """What many calls do, sent once, with the functions of the user's own files."""
        for name, module in list(sys.modules.items()):
            if name.startswith(OWN_RULES):
                self._ray.cloudpickle.register_pickle_by_value(module)
        return self._ray.put(partial(_inside, os.getcwd(), work))

    def call(self, work: Any, *arguments: Any, returns: int = 1) -> Any:
        """`work` of the arguments somewhere in the cluster: a ref, or for a tuple `returns` of them. Refs among `work` and arguments stand for their values."""
        return self._remote[_call].options(num_returns=returns).remote(returns, work, *arguments)

    def get(self, ref: Ref) -> Any:
        """The value of a ref, waited for; what its call raised is raised here."""
        import ray.exceptions as lost

        try:
            value = self._ray.get(ref)
        except lost.RayError as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise LlmkitError(f"Ray: {reason[-1]}", "its logs tell more; memory is what is short most often") from error
        if isinstance(value, Raised):
            raise value.error
        return value

    # Many, in order.
    def each(self, work: Callable[..., Result], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        """`work` of each tuple of arguments, in order."""
        shared = self._shared(work)
        for ref in _ahead(lambda given: self.call(shared, *given), arguments, WINDOW * self.cores):
            yield self.get(ref)

    def map(self, work: Callable[[Chunk], Result], reader: DocumentReader) -> Iterator[Result]:
        """`work` of each chunk of a reader, in order; its `inputs` are complete at the end."""
        for result, _ in self.scatter(work, reader, 1):
            yield result

    def scatter(
        self, work: Callable[[Chunk], Any], reader: DocumentReader, parts: int
    ) -> Iterator[tuple[Any, list[Ref]]]:
        """The same where `work` gives a tuple of so many parts: the first one, and refs of the others, which stay in the cluster."""
        shared, step = self._shared(work), self._remote[_step].options(num_returns=parts)
        for found in _ahead(lambda item: step.remote(parts, shared, item), self._chunks(reader), WINDOW * self.cores):
            first, *others = found if parts > 1 else [found]
            value = self.get(first)
            if isinstance(value, _Inputs):
                reader.inputs += value.inputs
            else:
                yield value, others

    def streams(self, work: Callable[[Any], Iterator[Result]], items: Iterable[Any]) -> Iterator[Result]:
        """What `work` yields for each item, in order; an item is one task."""
        shared = self._shared(work)
        for stream in _ahead(lambda item: self._stream(1, shared, item), items, self.cores):
            for ref in stream:
                yield self.get(ref)

    def _chunks(self, reader: DocumentReader) -> Iterator[Any]:
        """The chunks of a reader's files, and behind those of each file its lineage."""
        read, machines = partial(_read, reader.options), sum(node["Alive"] for node in self._ray.nodes())
        shared = self._shared(read)
        start = lambda path: read(path) if path == STDIN else self._stream(0, shared, path)  # noqa: E731
        return chain.from_iterable(_ahead(start, reader.paths, READERS * machines))

    def _stream(self, cores: int, *arguments: Any) -> Any:
        """Refs of what a generator yields. One that holds no core is at most `AHEAD` ahead of what is taken, and goes where few others are; one that
        does must never wait, since what it waits for may need its core."""
        options: dict[str, Any] = {"num_returns": "streaming", "num_cpus": cores}
        if not cores:
            options |= {"_generator_backpressure_num_objects": AHEAD, "scheduling_strategy": "SPREAD"}
        return self._remote[_yield].options(**options).remote(*arguments)


def _ahead(start: Callable[[Item], Result], items: Iterable[Item], window: int) -> Iterator[Result]:
    """Start each item, at most a window of them ahead of what is taken."""
    started: deque[Result] = deque()
    for item in items:
        started.append(start(item))
        if len(started) > window:
            yield started.popleft()
    yield from started


def _connected() -> Any:
    """The module `ray`, connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of the calls behind one that failed
    try:
        import ray
        import ray._private.worker as messages
    except ImportError:
        raise LlmkitError("Ray is not installed", "pip install 'llmkit[ray]'") from None
    if not ray.is_initialized():
        messages.print_to_stdstream = lambda *_, **__: None  # Ray would tell of lost machines on stdout, among the data
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        address = os.environ.get("RAY_ADDRESS", "")
        try:
            if re.fullmatch(r"[\w.-]+:\d+", address):  # Ray itself goes on for minutes where nobody answers
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), REACHABLE).close()
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:  # of many kinds
            said = str(error).splitlines() or [type(error).__name__]
            raise LlmkitError(f"no Ray cluster at {address or 'this machine'}: {said[0]}", "see RAY_ADDRESS") from error
        for number, handler in handlers.items():
            signal.signal(number, handler)  # how a call ends, the command line has settled already
    return ray


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The lineage of a file that has been read."""

    inputs: list[Input]


# What runs on the workers.
def _inside(directory: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """`work` where the paths of the call are right, if there is such a place here."""
    with suppress(OSError):
        os.chdir(directory)
    return work(*arguments)


def _call(returns: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """`work` of the arguments; an error as the first of the results, one among the arguments passed on."""
    failed = next((value for value in arguments if isinstance(value, Raised)), None)
    try:
        return _first(failed, returns) if failed else work(*arguments)
    except Exception as error:
        return _first(Raised(error), returns)


def _step(returns: int, work: Callable[[Chunk], Any], item: Any) -> Any:
    """The same of a chunk; the lineage of a file stays what it is."""
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
    reader = DocumentReader([path], options)
    yield from reader.chunks()
    yield _Inputs(reader.inputs)
