"""Faults of the metadata API that a client must survive, as the real one has them: which request or event gets which. Pure."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from caesura.runtime.errors import ConfigError
from caesura_metadata_publisher.fidelity import RateLimit
from caesura_rehearse.durations import seconds_in
from caesura_rehearse.vm_prefix import split_vm

FaultKind = Literal["slow", "status", "drop", "stale", "empty", "rate", "gap", "vanish", "neighbour", "moved"]
_OF_EVENTS = ("gap", "vanish", "neighbour", "moved")

STATUS_TEXTS = {
    410: "Gone. Retry after some time, for at most 70 seconds.",
    429: "Too Many Requests. The rate limit is exceeded.",
    500: "Service Error. Retry after some time.",
}
"""Azure's error answers beside the 4xx for bad requests; a client retries these."""

WORDS = (
    "'slow 20s', 410, 429, 500, drop, stale, empty, rate for requests; gap, vanish, neighbour, 'moved 30s', 'moved -30s' for events; "
    "with x3 after it: only the next three; with a VM before it ('app-2: 500'): only requests of its clients"
)
_SYNTAX = re.compile(
    r"(?:(?P<status>410|429|500)|(?P<timed>slow|moved)\s+(?P<time>[+-]?\S+)|(?P<plain>drop|stale|empty|rate|gap|vanish|neighbour))"
    r"(?:\s+x(?P<times>[1-9]\d*))?\Z"
)


class BadFault(ConfigError):
    """Not a fault."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to requests for the document, or to events."""

    kind: FaultKind
    status: int = 0
    """The status code, for ``status``."""
    seconds: float = 0.0
    """How long the answer takes, for ``slow``; how much later NotBefore is, for ``moved``."""
    times: int | None = None
    """How many requests, or events, it hits; None: all."""
    vm: str = ""
    """Whose clients' requests it hits; empty: everybody's."""

    @property
    def of_events(self) -> bool:
        """Whether it happens to events, not to requests."""
        return self.kind in _OF_EVENTS

    def __str__(self) -> str:
        what = str(self.status) if self.kind == "status" else self.kind
        if self.kind in ("slow", "moved"):
            what += f" {self.seconds:g}s"
        if self.times is not None:
            what += f" x{self.times}"
        return f"{self.vm}: {what}" if self.vm else what


def parse_fault(text: str) -> Fault:
    """The fault in ``text``.

    Raises:
        BadFault: it is not one.
    """
    vm, words = split_vm(text)
    found = _SYNTAX.fullmatch(words)
    if found is None:
        raise BadFault(f"{text!r} is not a fault: {WORDS}")
    times = int(found["times"]) if found["times"] else None
    if found["status"]:
        return Fault(kind="status", status=int(found["status"]), times=times, vm=vm)
    kind: FaultKind
    seconds = 0.0
    match found["timed"] or found["plain"]:
        case "slow" | "moved" as kind:
            seconds = _seconds(text, kind, found["time"])
        case "drop" | "stale" | "empty" | "rate" | "gap" | "vanish" | "neighbour" as kind:
            pass
        case _:
            raise BadFault(f"{text!r} is not a fault: {WORDS}")
    fault = Fault(kind=kind, seconds=seconds, times=times, vm=vm)
    if kind == "rate" and times is not None:
        raise BadFault(f"{text!r}: rate is a limit, it does not hit a number of requests")
    if fault.of_events and vm:
        raise BadFault(f"{text!r}: {kind} happens to an event, which all VMs of the set see: name no VM")
    return fault


def _seconds(text: str, kind: str, time: str) -> float:
    try:
        seconds = seconds_in(time.lstrip("+-"))
    except ValueError:
        raise BadFault(f"{text!r} is not a fault: {WORDS}") from None
    if kind == "slow" and time[0] in "+-":
        raise BadFault(f"{text!r} is not a fault: {WORDS}")
    return -seconds if time[0] == "-" else seconds


class FaultQueue:
    """One fault after the other: each hits its number of times, the last one that has no number all that follow."""

    def __init__(self) -> None:
        self._waiting: list[Fault] = []
        self._hits = 0

    def add(self, fault: Fault) -> None:
        """One more, after those that are there."""
        self._waiting.append(fault)

    def clear(self) -> None:
        """No more faults."""
        self._waiting.clear()
        self._hits = 0

    def next(self) -> Fault | None:
        """What happens next; None: nothing."""
        if not self._waiting:
            return None
        fault = self._waiting[0]
        self._hits += 1
        if fault.times is not None and self._hits >= fault.times:
            del self._waiting[0]
            self._hits = 0
        return fault


class RequestFaults:
    """The faults of one VM's API."""

    def __init__(self) -> None:
        self._queue = FaultQueue()
        self._rate: RateLimit | None = None

    def add(self, fault: Fault) -> None:
        """One more, after those that are there; a rate limit holds beside them."""
        if fault.kind == "rate":
            self._rate = RateLimit()
        else:
            self._queue.add(fault)

    def clear(self) -> None:
        """No more faults."""
        self._queue.clear()
        self._rate = None

    def next(self, now_s: float, *, for_document: bool) -> Fault | None:
        """What happens to the next request; None: nothing.

        Args:
            now_s: seconds on a monotonic clock.
            for_document: whether it is for the document; the others meet the rate limit only.
        """
        if self._rate is not None and not self._rate.allows("", now_s):
            return Fault(kind="status", status=429)
        return self._queue.next() if for_document else None


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
