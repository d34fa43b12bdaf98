"""Pages of pseudo-random data that the agent holds and rewrites, to find pages that a pause lost, mixed up or made older. Pure.

A page's content follows from a key, its number and its version: its write's number among all writes. Its expected content is
known from the count of writes, which lies elsewhere in memory, twice, the second time inverted: an old copy of a page, a page in
another one's place, a zeroed or damaged page, and a damaged or older count are all found. Only pages and count that are older
together look right from inside: the host knows a count from before the pause. A page is compared before it is rewritten, so
no damage is overwritten unseen.

If a pause loses ``k`` of the guest's ``n`` pages, wherever, ``c`` pages of canary find it with probability ``1 - (1 - c/n) ** k``.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from typing import Protocol

import msgspec

PAGE_BYTES = 4096
MAGIC = b"CAESURAc"
"""How each page begins: a person who looks at a memory image can recognize it."""
_HEAD = struct.Struct("<8sQQ")
_ALL = 2**64 - 1
KEY_BYTES = 16 * PAGE_BYTES


class PageBuffer(Protocol):
    """Where the pages are: ``bytearray`` or ``mmap``."""

    def __getitem__(self, key: slice, /) -> bytes | bytearray: ...

    def __setitem__(self, key: slice, value: bytes, /) -> None: ...


def key_of(seed: bytes) -> bytes:
    """The random bytes that pages are cut from: made once, since a guest without KVM is too slow to make them for each page."""
    return hashlib.shake_128(seed).digest(KEY_BYTES)


def page_of(key: bytes, number: int, version: int) -> bytes:
    """The content of one page: its number and version in the clear, then a piece of the key that depends on both."""
    cut = (number * 40_503 + version * 2_654_435_761) % (KEY_BYTES - PAGE_BYTES)
    return _HEAD.pack(MAGIC, number, version) + key[cut : cut + PAGE_BYTES - _HEAD.size]


class Finding(msgspec.Struct, frozen=True):
    """A page that is not what it was written as."""

    number: int
    why: str


class Canary:
    """The pages, and how many writes there were. Pages are written one after the other, so the count gives each page's version.

    Args:
        memory: at least ``pages`` times PAGE_BYTES bytes.
        seed: random, new for each start of the agent, so that pages of an earlier start are never taken for current ones.
    """

    def __init__(self, memory: PageBuffer, pages: int, seed: bytes) -> None:
        self.pages = pages
        self._memory = memory
        self._key = key_of(seed)
        self._count = array("Q", (0, _ALL))
        """How many pages were written, and the same inverted: elsewhere in memory than the pages."""
        self._found: dict[int, Finding] = {}
        self._told: set[int] = set()
        """Bad pages that were reported already and whose turn to be rewritten has not come."""

    @property
    def writes(self) -> int:
        """How many pages were written so far; only ever rises."""
        return self._count[0]

    @property
    def filled(self) -> bool:
        """Whether every page was written at least once."""
        return self.writes >= self.pages

    def rewrite(self) -> None:
        """Compare the page whose turn it is, then rewrite it. A page that was found bad stays on record."""
        if not self.pages:
            return
        number = self.writes % self.pages
        self.check(number)
        version = self.writes + 1
        self._memory[self._place(number)] = page_of(self._key, number, version)
        self._count[0], self._count[1] = version, _ALL - version
        self._told.discard(number)

    def check(self, number: int) -> None:
        """Compare one page with what it was written as; a difference is kept for ``take``."""
        if number not in self._told and (why := self._wrong(number)):
            self._found.setdefault(number, Finding(number, why))

    def take(self) -> tuple[Finding, ...]:
        """What was found since the last call; each finding is returned once."""
        found, self._found = tuple(self._found.values()), {}
        self._told.update(each.number for each in found if self._wrong(each.number))
        return found

    def _place(self, number: int) -> slice:
        return slice(number * PAGE_BYTES, (number + 1) * PAGE_BYTES)

    def _wrong(self, number: int) -> str:
        writes, inverted = self._count
        if writes != _ALL - inverted:
            return "the count of its writes is damaged"
        version = writes - (writes - 1 - number) % self.pages
        if version <= 0:
            return ""  # not written yet
        page = bytes(self._memory[self._place(number)])
        if page == page_of(self._key, number, version):
            return ""
        return _what_is(page, self._key, number, version)


def _what_is(page: bytes, key: bytes, number: int, version: int) -> str:
    """A description of a wrong page, for people."""
    if not page.strip(b"\0"):
        return "is zeroed"
    magic, is_number, is_version = _HEAD.unpack_from(page)
    if magic == MAGIC and page == page_of(key, is_number, is_version):
        if is_number != number:
            return f"holds page {is_number}"
        return f"holds write {is_version} instead of {version}"
    return "is damaged"
