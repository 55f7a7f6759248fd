"""A document at which a stage fails becomes a bad line; the stage processes the others of its chunk.

    engine.map(work, reader)                  # applies Isolated(work)

Whatever exception `work` raises for a chunk, it is applied again to each document alone. The documents at which it
fails join the bad lines of the chunk, with the exception as the reason, and are handled as --on-bad-line says; --debug
shows the traceback of the first. An exception that no document raises alone, or that an empty chunk raises as well,
is no document's fault and ends the map. Cost: none, unless `work` raises.
"""

from __future__ import annotations

import io
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from llmkit.errors import LlmkitError
from llmkit.io.documents import BadLine, Chunk

Result = TypeVar("Result")

MAX_REASON = 500  # characters


@dataclass(frozen=True, slots=True)
class Isolated(Generic[Result]):
    """`work` on the documents of a chunk that it can process.

    A `work` with side effects has an attribute `trial`, the same without them.
    """

    work: Callable[[Chunk], Result]

    def __call__(self, chunk: Chunk) -> Result:
        try:
            return self.work(chunk)
        except Exception:
            intact = self._without_failures(chunk)
            if intact is None:
                raise
        return self.work(intact)

    def _without_failures(self, chunk: Chunk) -> Chunk | None:
        """The chunk with the documents at which `work` fails as bad lines; None if they are not what it fails at."""
        trial = getattr(self.work, "trial", self.work)
        lines, bad = list(io.BytesIO(chunk.data)), list(chunk.bad)
        for number, line in enumerate(lines, chunk.first_line):
            try:
                trial(Chunk(chunk.file, number, line))
            except Exception as error:
                bad.append(bad_line(error, chunk.file, number, line.rstrip(b"\r\n")))
                lines[number - chunk.first_line] = b"\n"  # blank lines are skipped, and counted
        if len(bad) == len(chunk.bad):
            return None
        try:
            trial(Chunk(chunk.file, chunk.first_line, b""))
        except Exception:
            return None
        return replace(chunk, data=b"".join(lines), bad=bad)


def bad_line(error: Exception, file: str, line: int, raw: bytes) -> BadLine:
    """A document at which a stage raised an exception, as a bad line."""
    if not isinstance(error, LlmkitError):
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    else:
        message = error.message + (f" ({error.hint})" if error.hint else "")
    message = re.sub(rf"^{re.escape(file)}:{line}(?: \(id .*?\))?: ", "", message, flags=re.DOTALL)
    trace = "".join(traceback.format_exception(error, limit=-20))
    return BadLine(file, line, " ".join(message.split())[:MAX_REASON], raw, trace)
