"""What a reliable publisher keeps for a pending message, and for one that the broker refuses."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable

from caesura.delivery.message import OutboxMessage
from caesura.delivery.policy import DeliveryPolicy


class PendingMessage:
    """A pending message."""

    __slots__ = (
        "accepted",
        "deadline",
        "message",
        "number",
        "over",
        "policy",
        "refused_as",
        "taken",
        "waiter",
    )

    def __init__(
        self,
        number: int,
        message: OutboxMessage,
        policy: DeliveryPolicy,
        deadline: float,
        accepted: Callable[[], None] | None,
    ) -> None:
        self.number = number
        self.message = message
        self.policy = policy
        self.deadline = deadline
        self.accepted = accepted
        self.waiter: asyncio.Future[None] | None = None
        self.taken = False
        """The broker has accepted it once."""
        self.refused_as = message.topic
        """Its key in the publisher's record of refusals: its topic, or its own id where only this message is too large."""
        self.over = False
        """No further work is needed; it may still be in a queue."""

    def __lt__(self, other: PendingMessage) -> bool:
        return self.number < other.number


class RefusedTopic:
    """A topic that the broker refuses, and the messages that wait for it."""

    def __init__(self, retry_s: float) -> None:
        self.entries: deque[PendingMessage] = deque()
        self.why = ""
        self.delay_s = retry_s
        self.due = math.inf
        """Loop time of the next try; infinite while one is under way."""
        self.trial: PendingMessage | None = None
        """The first of its messages, while it is being retried."""

    def __len__(self) -> int:
        return sum(not each.over for each in self.entries) + (self.trial is not None)
