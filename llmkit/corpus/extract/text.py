"""The decompressed text of an archive up to the next gap, with the place of every byte of it in the stored file.

Memory: what is between `start` and the end of `buffer`, as much as its user asks for, and STEP bytes before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

from llmkit.corpus.extract.members import MAX_MAGIC, MEMBER, PLAIN, Gap, Piece, member_content, pieces
from llmkit.corpus.extract.record_heads import BLANK, MAX_HEAD, find_head, starts_record
from llmkit.corpus.extract.stored import Stored, is_compressed

AFTER = 64  # bytes after a record that usually show whether another one follows
STEP = 1 << 20  # bytes per step of a search
GIVEN = 1024  # records of a member that are remembered until its end
HASHED, HASHED_SHARE = 64 << 20, 4  # bytes hashed to confirm doubtful records: a constant, and a share of all


class Place(NamedTuple):
    """A place in an archive, in bytes."""

    position: int  # in the decompressed text
    offset: int  # in the stored file: exact for plain text, otherwise near
    member: int  # offset of the member that holds it
    inner: int  # position in this member
    is_plain: bool = False

    def size(self, end: Place) -> int:
        """Stored bytes up to `end`; decompressed ones if both places are in the same member.

        A damaged member may seem to extend beyond what follows it: then it counts from its beginning.
        """
        if self.member == end.member and not self.is_plain:
            return end.position - self.position
        return end.offset - (self.offset if self.offset <= end.offset else min(self.member, end.offset))


class Text:
    """The decompressed bytes up to the next gap; `start` is the index of the first unread one in `buffer`."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._pieces = pieces(stored)
        self._buffer_position = 0
        self._marks: deque[Place] = deque()  # the beginning of each piece
        self._hashed = 0
        self._given: deque[Hashable] = deque(maxlen=GIVEN)  # records of the current member
        self._member, self._covered = 0, 0  # its offset, and where the damage was that the last gap is for
        self.buffer = bytearray()
        self.start = 0
        self.ended = False  # at a gap, or at the end of the archive
        self.gap: Gap | None = None
        self.has_members = False  # whether anything was compressed

    def fill(self, size: int) -> bool:
        """Whether there are `size` unread bytes, after reading on as needed."""
        while len(self.buffer) - self.start < size and not self.ended:
            piece = next(self._pieces, None)
            if not isinstance(piece, Piece):
                self.gap, self.ended = piece, True
                break
            position = self._buffer_position + len(self.buffer)
            self.has_members = self.has_members or not piece.is_plain
            if piece.starts or not self._marks:
                self._marks.append(Place(position, piece.offset, piece.offset, 0, piece.is_plain))
            else:
                last = self._marks[-1]
                inner = last.inner + position - last.position
                self._marks.append(Place(position, piece.offset, last.member, inner))
            self.buffer += piece.data
        return len(self.buffer) - self.start >= size

    def advance(self, size: int) -> None:
        """Move on by bytes that are there."""
        self.start += size
        if self.start > STEP or self.start == len(self.buffer):
            del self.buffer[: self.start]
            self._buffer_position, self.start = self._buffer_position + self.start, 0

    @property
    def position(self) -> int:
        """The current position in the decompressed text."""
        return self._buffer_position + self.start

    def may_hash(self, size: int) -> bool:
        """Whether `size` more bytes may be hashed to confirm a record; they are counted."""
        if self._hashed + size > HASHED + HASHED_SHARE * self.position:
            return False
        self._hashed += size
        return True

    def skip_blank(self) -> bool:
        """Move to the next byte that can begin a head. Returns False if the text ends before."""
        while self.fill(1):
            ahead = bytes(self.buffer[self.start : self.start + AFTER])
            rest = ahead.lstrip(BLANK)
            self.advance(len(ahead) - len(rest))
            if rest:
                return True
        return False

    def place(self) -> Place:
        """The current place."""
        position = self.position
        if not self.fill(1):
            member, offset = (self.gap.member, self.gap.offset) if self.gap else (self._stored.offset,) * 2
            return Place(position, offset, member, 0)
        while len(self._marks) > 1 and self._marks[1].position <= position:
            self._marks.popleft()
        mark = self._marks[0]
        ahead = position - mark.position
        if mark.is_plain:
            return Place(position, mark.offset + ahead, mark.offset + ahead, 0, True)
        return Place(position, mark.offset, mark.member, mark.inner + ahead)

    def search(self, size: int | None = None, members: bool = True) -> bool:
        """Move to the next plausible head, with `members` also in compressed members behind plain text.

        Without one, move on by `size` bytes (None: to the end of the text).
        """
        while size is None or size > 0:
            self.fill(STEP + MAX_HEAD)
            available = len(self.buffer) - self.start
            step = available if self.ended else STEP
            step = step if size is None else min(step, size)
            found = find_head(self.buffer, self.start, self.start + step)
            member = self.next_member(self.start, found if found >= 0 else self.start + step) if members else -1
            if member >= 0:
                step = member - self.start
                self.advance(step)
                if self.reopen():
                    return True
                self.advance(1)
                step += 1
            elif found >= 0:
                self.advance(found - self.start)
                return True
            else:
                self.advance(step)
            size = None if size is None else size - step
            if self.ended and not self.fill(1):
                break
        return False

    def next_member(self, begin: int, stop: int) -> int:
        """Index of the first compressed member with records in the plain text of `buffer[begin:stop]`, or -1."""
        if not self._marks or not self._marks[-1].is_plain:
            return -1
        plain = next(mark.position for mark in self._marks if mark.is_plain) - self._buffer_position
        for match in MEMBER.finditer(self.buffer, max(begin, plain), stop + MAX_MAGIC - 1):
            content = member_content(self.buffer, match.start()) if match.start() < stop else None
            if content is not None and (not content or starts_record(content)):
                return match.start()
        return -1

    def reopen(self) -> bool:
        """Whether plain text is followed by a compressed member here, which is then read as such."""
        here = self.place()
        if not here.is_plain or not is_compressed(bytes(self.buffer[self.start : self.start + 8])):
            return False
        if not self._stored.rewind(here.offset, free=2 * PLAIN):
            return False
        self._buffer_position, self.start, self.ended = here.position, 0, False
        self.buffer.clear()
        self._marks.clear()
        self._pieces = pieces(self._stored)
        return True

    def resume(self) -> bool:
        """Continue after the gap; False at the end of the archive."""
        gap, self.gap, self.ended = self.gap, None, False
        self._covered = max(self._covered, gap.offset if gap else 0)
        return gap is not None

    def is_repeated(self, place: Place, key: Hashable) -> bool:
        """Whether the record with this key was given before, in a damaged member that seemed to extend beyond its end.

        It is at `place`. Otherwise the key is remembered.
        """
        if place.member != self._member and place.offset >= self._covered:
            self._given.clear()
        self._member = place.member
        if place.offset < self._covered and key in self._given:
            return True
        self._given.append(key)
        return False
