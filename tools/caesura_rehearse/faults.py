"""Faults of the metadata API that a client must survive, as the real one has them: which request gets which. Pure."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from caesura.runtime.errors import ConfigError

FaultKind = Literal["slow", "status", "drop", "stale", "empty"]

STATUS_TEXTS = {
    410: "Gone. Retry after some time, for at most 70 seconds.",
    429: "Too Many Requests. The rate limit is exceeded.",
    500: "Service Error. Retry after some time.",
}
"""Azure's error answers beside the 4xx for bad requests; a client retries these."""

WORDS = "'slow 20s', 410, 429, 500, drop, stale, empty; each with x3 after it: only the next three requests"
_SYNTAX = re.compile(
    r"(?:(?P<status>410|429|500)|(?P<slow>slow\s+(?P<seconds>\d+(?:\.\d+)?)s)|(?P<other>drop|stale|empty))(?:\s+x(?P<times>[1-9]\d*))?\Z"
)


class BadFault(ConfigError):
    """Not a fault."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to requests for the document."""

    kind: FaultKind
    status: int = 0
    """The status code, for ``status``."""
    seconds: float = 0.0
    """How long the answer takes, for ``slow``."""
    times: int | None = None
    """How many requests it hits; None: all."""

    def __str__(self) -> str:
        what = (
            f"slow {self.seconds:g}s"
            if self.kind == "slow"
            else str(self.status)
            if self.kind == "status"
            else self.kind
        )
        return what if self.times is None else f"{what} x{self.times}"


def parse_fault(text: str) -> Fault:
    """The fault in ``text``.

    Raises:
        BadFault: it is not one.
    """
    found = _SYNTAX.fullmatch(text.strip())
    if found is None:
        raise BadFault(f"{text!r} is not a fault: {WORDS}")
    times = int(found["times"]) if found["times"] else None
    if found["status"]:
        return Fault(kind="status", status=int(found["status"]), times=times)
    if found["slow"]:
        return Fault(kind="slow", seconds=float(found["seconds"]), times=times)
    match found["other"]:
        case "drop" | "stale" | "empty" as kind:
            return Fault(kind=kind, times=times)
    raise BadFault(f"{text!r} is not a fault: {WORDS}")


class Faults:
    """The faults of one VM's API, one after the other: each hits its number of requests, the last one that has no number all that follow."""

    def __init__(self, faults: tuple[Fault, ...] = ()) -> None:
        self._waiting = list(faults)
        self._hits = 0

    def add(self, fault: Fault) -> None:
        """One more, after those that are there."""
        self._waiting.append(fault)

    def clear(self) -> None:
        """No more faults."""
        self._waiting.clear()
        self._hits = 0

    def next(self) -> Fault | None:
        """What happens to the next request; None: nothing."""
        if not self._waiting:
            return None
        fault = self._waiting[0]
        self._hits += 1
        if fault.times is not None and self._hits >= fault.times:
            del self._waiting[0]
            self._hits = 0
        return fault


class DocumentHistory:
    """The documents that were served, for ``stale`` and ``empty``."""

    def __init__(self) -> None:
        self._current = b""
        self._before = b""

    def served(self, body: bytes) -> None:
        """The publisher answered with this document."""
        if body != self._current:
            self._before, self._current = self._current, body

    def stale(self, body: bytes) -> bytes:
        """The document before this one; this one if there is none."""
        return (self._before if body == self._current else self._current) or body

    @staticmethod
    def empty(body: bytes) -> bytes:
        """The same document without its events."""
        return msgspec.json.encode({**msgspec.json.decode(body, type=dict[str, object]), "Events": []})
