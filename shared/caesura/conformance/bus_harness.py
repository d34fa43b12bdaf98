"""What the bus conformance suite needs: a broker, buses on it, and the power to do them harm.

``BrokerCapabilities`` names the promises that some brokers break; no service may rely on one of those.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum, auto
from typing import Any

import pytest

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.port import Bus, Will


class BrokerCapabilities(Enum):
    """Promises that not every broker keeps; no service may rely on one that is missing somewhere."""

    QUEUE_WHILE_AWAY = auto()
    KEEP_OVER_A_KILL = auto()
    REDELIVER = auto()
    SAY_REFUSED = auto()
    TAKE_OVER = auto()
    QOS_0 = auto()
    SERVE_AFTER_A_KILL = auto()
    """After all of it was killed at once it serves again as soon as it runs."""
    RETAIN = auto()
    """The newest retained message of a topic reaches every later subscriber, at any node and by any filter."""


_REQUIRED = "__required__"


_Test = Callable[[Any, Any], Awaitable[None]]


def requires(*capabilities: BrokerCapabilities) -> Callable[[_Test], _Test]:
    """Mark a test of the suite that needs these promises: where one is missing it is left out (``leave_out``), or is an expected failure."""

    def mark(test: _Test) -> _Test:
        @functools.wraps(test)
        async def checked(self: Any, harness: BusHarness) -> None:
            for each in capabilities:
                harness.require(each)
            await test(self, harness)

        setattr(checked, _REQUIRED, frozenset(capabilities))
        return checked

    return mark


def leave_out(suite: type, missing: Mapping[BrokerCapabilities, str]) -> None:
    """Take the tests that need a missing promise out of a suite, so that they are not collected."""
    for name in dir(suite):
        if getattr(getattr(suite, name), _REQUIRED, frozenset()) & missing.keys():
            setattr(suite, name, None)


class BusHarness(ABC):
    """A broker, buses on it, and the power to do them harm. Below ``open/`` everybody may publish, below ``denied/`` nobody."""

    missing: Mapping[BrokerCapabilities, str] = {}
    """Promises that the broker does not keep, each with the reason: their tests are expected failures and are not run (``requires``)."""
    window: int = 0
    """How many QoS 1 messages may wait for the handler of a bus that cannot hold its broker back at the backlog limit; 0: it can."""

    def require(self, capability: BrokerCapabilities) -> None:
        """End the test as an expected failure where the broker does not keep this promise."""
        if (reason := self.missing.get(capability)) is not None:
            pytest.xfail(reason)

    @abstractmethod
    async def bus(
        self,
        client_id: str = "",
        *,
        filters: Sequence[str] = (),
        will: Will | None = None,
        clean: bool = True,
        backlog_limit: int = 1_000,
        backlog_bytes: int = 1_000_000,
    ) -> Bus:
        """A bus that can be cut off alone; it reconnects within a second."""

    @abstractmethod
    async def until_stored(self, payload: bytes) -> None:
        """Wait until a broker killed now would come back with this message."""

    @abstractmethod
    async def cut(self, client_id: str) -> None:
        """End one client's connection without a DISCONNECT."""

    @abstractmethod
    async def stall(self) -> None:
        """The broker takes everything and answers nothing."""

    @abstractmethod
    async def kill(self) -> None:
        """The broker dies."""

    @abstractmethod
    async def revive(self) -> None:
        """The broker is there again, at the same address, after ``kill``."""


class MemoryHarness(BusHarness):
    """The memory bus: everything is in this process."""

    window = 100  # it has no socket to stop reading from: its broker's window is the limit

    def __init__(self) -> None:
        self.broker = MemoryBroker(may_publish=lambda _, topic: not topic.startswith("denied/"))

    async def bus(
        self,
        client_id: str = "",
        *,
        filters: Sequence[str] = (),
        will: Will | None = None,
        clean: bool = True,
        backlog_limit: int = 1_000,
        backlog_bytes: int = 1_000_000,
    ) -> Bus:
        return MemoryBus(
            self.broker,
            client_id=client_id,
            filters=filters,
            will=will,
            clean=clean,
            backlog_limit=backlog_limit,
            backlog_bytes=backlog_bytes,
        )

    async def until_stored(self, payload: bytes) -> None:
        """Nothing to wait for: ``down`` keeps everything."""

    async def cut(self, client_id: str) -> None:
        self.broker.kill(client_id)

    async def stall(self) -> None:
        self.broker.stall()

    async def kill(self) -> None:
        self.broker.down()

    async def revive(self) -> None:
        self.broker.up()
