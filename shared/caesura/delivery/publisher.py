"""The one way to publish messages that must arrive: in order, several at once, retried until the broker has them.

What differs between messages is their ``DeliveryPolicy``; what is stored, and when, is up to their owner: a coordinator calls ``put``
after the transaction that stored its decision, a host calls it even if its disk refuses the fact.

Order. Messages are sent in the order of ``put``, and never two of one topic at a time: a topic's messages arrive in order
whatever happens to the connection. Only a topic that the broker refuses falls behind: its messages wait, in order, and
are retried at growing intervals, while all others are sent; a message larger than the broker accepts waits alone. No message
is dropped for a refusal unless its policy says so.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count, islice
from typing import Protocol

from caesura.bus.port import BusUnavailable, PublishRefused, PublishTooLarge
from caesura.delivery.entries import PendingMessage, RefusedTopic
from caesura.delivery.message import OutboxMessage
from caesura.delivery.outbox_store import MemoryOutbox, OutboxStore
from caesura.delivery.policy import EVERY, NEWEST, DeliveryPolicy
from caesura.runtime.errors import StoreError
from caesura.runtime.logs import get_logger
from caesura.runtime.sampler import Sampler

IN_FLIGHT = 10
"""Messages that wait for the broker's answer at once: half of a connection's limit, so that other publishers get through."""

_ANSWER_S = 10.0  # s: for the broker to acknowledge one message
_PAUSE_S = 0.1  # s: after a connection that failed in the middle, before the next try
_RETRY_S = 2.0  # s: before a refused topic is tried again; doubled with every refusal
_RETRY_MOST_S = 60.0  # s: an operator who corrected the access rules does not want to wait longer
_SAY_EVERY_S = 300.0  # s: between two log lines about one refused topic
_TICK_S = 0.001  # s: a timer may fire this much early, and must not fire again for that reason
_CLOSE_S = 0.05  # s: a publish that ends by its deadline may end a tick before it
_REMOVED_AT_ONCE = 250  # messages in one transaction of the store: its owner waits for that long
_LONG_S = 3600.0  # s: length of one wait for the connection; another one follows

_log = get_logger("caesura.outbox")


class Publishes(Protocol):
    """What the publisher needs from a bus."""

    async def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, timeout_s: float = 10.0
    ) -> None: ...

    async def wait_connected(self, timeout_s: float) -> bool: ...


class ReliablePublisher:
    """See the module.

    Args:
        bus: where messages go.
        store: where they are kept until the broker has them.
        on_accepted: called once with each message, when the broker has it.
        in_flight: how many messages wait for the broker's answer at once.
        answer_s: seconds that the broker has to acknowledge a message.
        retry_s: seconds before a refused topic is tried again for the first time.
        retry_most_s: seconds between two tries at most.
    """

    def __init__(
        self,
        bus: Publishes,
        store: OutboxStore | None = None,
        *,
        on_accepted: Callable[[OutboxMessage], None] = lambda _: None,
        in_flight: int = IN_FLIGHT,
        answer_s: float = _ANSWER_S,
        retry_s: float = _RETRY_S,
        retry_most_s: float = _RETRY_MOST_S,
    ) -> None:
        self._bus = bus
        self._store = store if store is not None else MemoryOutbox()
        self._on_accepted = on_accepted
        self._window = in_flight
        self._answer_s = answer_s
        self._retry_s = retry_s
        self._retry_most_s = retry_most_s
        self._numbers = count()
        self._known: dict[str, PendingMessage] = {}
        """Maps an event id to its pending entry."""
        self._newest: dict[str, PendingMessage] = {}
        """Maps a topic to the message on it that a newer one replaces."""
        self._queue: list[PendingMessage] = []
        self._in_flight: dict[str, PendingMessage] = {}
        self._refused: dict[str, RefusedTopic] = {}
        self._deadlines: list[tuple[float, PendingMessage]] = []
        self._repeats: list[tuple[float, PendingMessage]] = []
        self._repeating = 0
        self._to_remove: dict[str, None] = {}
        self._removing = False
        self._held = True
        """Nothing is sent until the connection is back and everything that was in flight when it failed has returned."""
        self._wake = asyncio.Event()
        self._removal = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._sampler = Sampler(_SAY_EVERY_S, lambda: asyncio.get_running_loop().time())

    def __len__(self) -> int:
        """Messages that the broker has not accepted, the refused ones included."""
        return len(self._known) - self._repeating

    @property
    def unremoved(self) -> int:
        """Messages that the broker has and the store still keeps."""
        return len(self._to_remove)

    @property
    def refused(self) -> int:
        """Messages that wait because the broker refuses their topic."""
        return sum(len(each) for each in self._refused.values())

    def ping(self) -> str:
        """For the health probe: empty, or which topic is refused and what to do."""
        if not self._refused:
            return ""
        why = next(iter(self._refused.values())).why
        more = f"; so are {len(self._refused) - 1} more topics" if len(self._refused) > 1 else ""
        return f"{self.refused} messages wait for the broker: {why}{more}"

    # -- input ---------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Load what a previous run left in the store. Call it before the first ``put``.

        Raises:
            StoreError: the store cannot be read.
        """
        for message in await self._store.load():
            self.put(message, policy=NEWEST if message.retain else EVERY)

    def put(
        self,
        *messages: OutboxMessage,
        policy: DeliveryPolicy = EVERY,
        accepted: Callable[[], None] | None = None,
    ) -> None:
        """Publish these as soon as possible; does not wait. A message with the id of a waiting one replaces it.

        Args:
            accepted: called when the broker has each.
        """
        for message in messages:
            self._take(message, policy, accepted)

    async def deliver(self, message: OutboxMessage, policy: DeliveryPolicy) -> None:
        """``put``, and wait until the broker has it.

        Raises:
            BusUnavailable: it was given up.
            PublishRefused: the broker refuses it, and the policy says not to retry.
        """
        entry = self._take(message, policy, None)
        if entry.waiter is None:
            entry.waiter = asyncio.get_running_loop().create_future()
            entry.waiter.add_done_callback(
                lambda waiter: waiter.exception()
            )  # nobody may be waiting any more
        await asyncio.shield(entry.waiter)

    async def drained(self, timeout_s: float) -> bool:
        """Wait until only refused messages are left; returns whether nothing at all is left."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return not len(self)

    def _take(
        self, message: OutboxMessage, policy: DeliveryPolicy, accepted: Callable[[], None] | None
    ) -> PendingMessage:
        known = self._known.get(message.event_id)
        if known is not None:
            if self._in_flight.get(message.topic) is not known:
                known.message = message
            return known
        now = asyncio.get_running_loop().time()
        deadline = math.inf if policy.give_up_s is None else now + policy.give_up_s
        entry = PendingMessage(next(self._numbers), message, policy, deadline, accepted)
        if policy.newest_only:
            older = self._newest.get(message.topic)
            if older is not None and self._in_flight.get(message.topic) is not older:
                self._end(older, BusUnavailable(f"a newer message on {message.topic!r} came first"))
            self._newest[message.topic] = entry
        self._known[message.event_id] = entry
        heappush(self._queue, entry)
        if policy.give_up_s is not None:
            heappush(self._deadlines, (deadline, entry))
        self._idle.clear()
        self._wake.set()
        return entry

    # -- output --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Publish, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._remove(), name="outbox-remove")
            group.create_task(self._reconnected(0.0), name="outbox-connect")
            while True:
                self._wake.clear()
                self._look_at_time(asyncio.get_running_loop().time() + _TICK_S)
                while (entry := self._next()) is not None:
                    self._in_flight[entry.message.topic] = entry
                    group.create_task(self._send(entry, group), name="outbox-send")
                self._note_idle()
                due = self._next_due()
                try:
                    async with asyncio.timeout_at(due if due < math.inf else None):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    def _next(self) -> PendingMessage | None:
        """The next message to send now; None: none can be sent."""
        while self._queue and not self._held and len(self._in_flight) < self._window:
            entry = self._queue[0]
            topic = entry.message.topic
            refused = self._refused.get(topic)
            if entry.over:
                heappop(self._queue)
            elif refused is not None and refused.trial is not entry:
                refused.entries.append(heappop(self._queue))
            elif topic in self._in_flight:
                return None  # one at a time: this one, and so all behind it, once the first is acknowledged
            else:
                return heappop(self._queue)
        return None

    async def _send(self, entry: PendingMessage, group: asyncio.TaskGroup) -> None:
        message, loop = entry.message, asyncio.get_running_loop()
        try:
            await self._bus.publish(
                message.topic,
                message.payload,
                qos=1,
                retain=message.retain,
                timeout_s=max(0.0, min(self._answer_s, entry.deadline - loop.time())),
            )
        except BusUnavailable as error:
            self._back(entry, error, loop.time())
            if not self._held:
                self._held = True
                group.create_task(self._reconnected(_PAUSE_S), name="outbox-connect")
        except PublishRefused as error:
            self._refuse(entry, error, loop.time())
        except (ValueError, TypeError) as error:
            # It can never be sent, and would block everything behind it.
            _log.error("outbox.unsendable", type=message.type, event_id=message.event_id, why=str(error))
            self._end(entry, BusUnavailable(f"it cannot be sent on {message.topic!r}: {error}"))
        else:
            self._took(entry, loop.time())
        finally:
            self._in_flight.pop(message.topic, None)
            self._wake.set()

    async def _reconnected(self, pause_s: float) -> None:
        """Hold everything back until there is a connection; to keep the order, everything in flight must return first."""
        await asyncio.sleep(pause_s)
        while not await self._bus.wait_connected(_LONG_S) or self._in_flight:  # noqa: ASYNC110 - two conditions
            await asyncio.sleep(_PAUSE_S)
        self._held = False
        self._wake.set()

    def _back(self, entry: PendingMessage, error: BusUnavailable, now: float) -> None:
        newest = self._newest.get(entry.message.topic)
        if entry.policy.newest_only and newest is not entry:
            self._end(entry, BusUnavailable(f"a newer message on {entry.message.topic!r} came first"))
        elif now >= entry.deadline - _CLOSE_S:
            self._give_up(entry, error)
        else:
            heappush(self._queue, entry)

    def _refuse(self, entry: PendingMessage, error: PublishRefused, now: float) -> None:
        if entry.policy.refusal_ends and not entry.taken:
            self._end(entry, error)
            return
        topic = entry.message.topic
        if isinstance(error, PublishTooLarge):
            # The broker would probably accept the next one of its topic; this one may wait indefinitely.
            of_topic = self._refused.get(topic)
            if of_topic is not None and of_topic.trial is entry:
                of_topic.trial, of_topic.due = None, now
            entry.refused_as = entry.message.event_id
        refused = self._refused.setdefault(entry.refused_as, RefusedTopic(self._retry_s))
        refused.trial = None
        refused.why = str(error)
        refused.due = now + refused.delay_s
        refused.delay_s = min(2 * refused.delay_s, self._retry_most_s)
        if entry.policy.newest_only and self._newest.get(topic) is not entry:
            self._end(entry, error)
        elif now >= entry.deadline - _CLOSE_S:
            self._give_up(entry, error)
        else:
            refused.entries.appendleft(entry)
        if self._sampler.due(topic) is not None:
            _log.error(
                "outbox.refused",
                topic=topic,
                why=str(error),
                waiting=len(refused),
                advice="correct the access rules of the broker: it is kept and tried again, and the others are published",
            )

    def _took(self, entry: PendingMessage, now: float) -> None:
        refused = self._refused.pop(entry.refused_as, None)
        entry.refused_as = entry.message.topic
        if refused is not None:
            _log.info("outbox.accepted_again", topic=entry.message.topic, waiting=len(refused))
            for each in refused.entries:
                heappush(self._queue, each)
            self._idle.clear()
        if not entry.taken:
            entry.taken = True
            if entry.waiter is not None:
                entry.waiter.set_result(None)
            self._on_accepted(entry.message)
            if entry.accepted is not None:
                entry.accepted()
        if entry.policy.repeat_s is not None and entry.policy.wanted():
            entry.deadline = math.inf
            self._repeating += 1
            heappush(self._repeats, (now + entry.policy.repeat_s, entry))
        else:
            self._end(entry, None)

    def _end(self, entry: PendingMessage, error: Exception | None) -> None:
        """End the work on it."""
        if entry.over:
            return
        entry.over = True
        message = entry.message
        self._known.pop(message.event_id, None)
        if self._newest.get(message.topic) is entry:
            del self._newest[message.topic]
        refused = self._refused.get(entry.refused_as)
        if refused is not None and refused.trial is entry:
            refused.trial, refused.due = None, -math.inf  # the next of its topic is tried
        if error is not None and entry.waiter is not None and not entry.waiter.done():
            entry.waiter.set_exception(error)
        self._to_remove[message.event_id] = None
        self._removal.set()
        self._idle.clear()

    def _give_up(self, entry: PendingMessage, error: Exception) -> None:
        _log.warning(
            "outbox.given_up",
            type=entry.message.type,
            topic=entry.message.topic,
            seconds=entry.policy.give_up_s,
            why=str(error),
        )
        self._end(entry, error)

    def _look_at_time(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, entry = heappop(self._deadlines)
            # One in flight ends by its own timeout.
            if (
                not entry.over
                and entry.deadline <= now
                and self._in_flight.get(entry.message.topic) is not entry
            ):
                refused = self._refused.get(entry.refused_as)
                why = refused.why if refused is not None else "no connection to the broker"
                self._give_up(entry, BusUnavailable(why))
        while self._repeats and self._repeats[0][0] <= now:
            _, entry = heappop(self._repeats)
            self._repeating -= 1
            if entry.policy.wanted():
                entry.number = next(self._numbers)
                heappush(self._queue, entry)
            else:
                self._end(entry, None)
        for topic, refused in list(self._refused.items()):
            if refused.due <= now:
                self._try_again(topic, refused)

    def _try_again(self, topic: str, refused: RefusedTopic) -> None:
        """Send the first message of a refused topic; the others follow if the broker accepts it."""
        while refused.entries and refused.entries[0].over:
            refused.entries.popleft()
        if not refused.entries:
            del self._refused[topic]
            return
        refused.due = math.inf
        refused.trial = refused.entries.popleft()
        heappush(self._queue, refused.trial)

    def _next_due(self) -> float:
        return min(
            self._deadlines[0][0] if self._deadlines else math.inf,
            self._repeats[0][0] if self._repeats else math.inf,
            min((each.due for each in self._refused.values()), default=math.inf),
        )

    def _note_idle(self) -> None:
        if len(self) <= self.refused and not self._to_remove:
            self._idle.set()

    async def _remove(self) -> None:
        """Remove what the broker has from the store: off the loop, everything that accumulated in one transaction."""
        while True:
            await self._removal.wait()
            self._removal.clear()
            batch = list(islice(self._to_remove, _REMOVED_AT_ONCE))
            if not batch:
                continue
            try:
                await self._store.remove(batch)
            except StoreError as error:
                # Sent again after a restart, under the same id: harmless, and worth only a log line.
                if self._sampler.due("store") is not None:
                    _log.warning("outbox.not_removed", messages=len(batch), why=str(error))
                await asyncio.sleep(self._retry_s)
                self._removal.set()
            else:
                for each in batch:
                    self._to_remove.pop(each, None)
                if self._to_remove:
                    self._removal.set()
                self._wake.set()
