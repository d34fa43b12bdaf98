"""What every bus does, whatever the transport: pass messages to the handler, run the greeting, shut down in order.

Tasks under ``run``: one keeps the connection (the adapter's own), one passes messages to the handler, and one acknowledges, in order, the messages
whose handler returned before its writes were on disk. A handler may publish on the same bus; no task waits for a handler.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import msgspec

from caesura.bus.filters import check_filter, matches
from caesura.bus.inbox import Inbox
from caesura.bus.port import BusStats, BusUnavailable, Commits, Connected, Delivery, Handler
from caesura.bus.rates import MUTED_S, Rates, writer_of
from caesura.contract.topics import may_be_retained
from caesura.runtime.logs import get_logger
from caesura.runtime.sampler import Sampler, cut

_log = get_logger("caesura.bus")

_WARN_EVERY_S = 10.0  # s: how often a slow handler is logged, instead of once per message


class QueuedDelivery(msgspec.Struct, frozen=True):
    """A message waiting for the handler, and how to acknowledge it to the broker."""

    delivery: Delivery
    qos: int
    acknowledge: Callable[[], None]

    @property
    def size_bytes(self) -> int:
        """The part of a message whose size the sender controls."""
        return len(self.delivery.topic) + len(self.delivery.payload)


class ReconnectingBus(ABC):
    """The adapter-independent half of a ``Bus``; see ``caesura.bus.port`` for the promises.

    Args:
        filters: topic filters to subscribe to after every connect.
        backlog_limit: messages of each QoS that may wait for the handler.
        backlog_bytes: bytes that may wait for the handler.
        close_timeout_s: how long ``close`` waits for the message that is being handled.
        rates: how much each writer may send; None: no limit.

    Raises:
        ValueError: a filter that no broker accepts.
    """

    def __init__(
        self,
        *,
        filters: Sequence[str],
        backlog_limit: int,
        backlog_bytes: int,
        close_timeout_s: float,
        rates: Rates | None = None,
    ) -> None:
        for each in filters:
            check_filter(each)
        self.filters = tuple(filters)
        self._inbox: Inbox[QueuedDelivery] = Inbox(backlog_limit, backlog_bytes)
        self._stats = BusStats()
        self._close_timeout_s = close_timeout_s
        self._ready = asyncio.Event()
        self._closing = asyncio.Event()
        self._finished = asyncio.Event()
        self._own_tasks: set[asyncio.Task[None]] = set()
        self._on_connected: Connected | None = None
        self._commits: Commits | None = None
        self._unacknowledged: deque[QueuedDelivery] = deque()
        """Handled, but what was stored for them is not on disk yet."""
        self._unacknowledged_bytes = 0
        self._acknowledged = asyncio.Event()
        self._to_acknowledge = asyncio.Event()
        self._all_acknowledged = asyncio.Event()
        self._all_acknowledged.set()
        self._started = False
        self._warned_at = float("-inf")
        self._rates = rates
        self._sampled = Sampler()
        self._muted: dict[str, float] = {}
        """Maps the filters of writers that flooded to the loop time at which they are subscribed to again."""
        self._instead: dict[str, tuple[str, ...]] = {}
        """Maps a muted wildcard filter to the filters that replace it."""
        self.peers: Callable[[str], Iterable[str]] | None = None
        """Maps a party to its known names, so that a filter for the whole party can be muted for one of them."""

    @abstractmethod
    async def _keep_connected(self) -> None:
        """Connect and reconnect until cancelled; disconnect cleanly then."""

    @abstractmethod
    def _handled(self) -> None:
        """A message left the inbox; an adapter that holds its broker back may resume reading."""

    @property
    def stats(self) -> BusStats:
        """Live counters; the same object for the life of the bus."""
        self._stats.unhandled = len(self._inbox)
        self._stats.backlog = len(self._inbox) + len(self._unacknowledged)
        return self._stats

    async def run(
        self, receive: Handler, on_connected: Connected | None = None, commits: Commits | None = None
    ) -> None:
        """See ``Bus.run``. ``on_connected`` runs beside the handler, and is cancelled when the connection ends.

        Raises:
            RuntimeError: called a second time.
        """
        if self._started:
            raise RuntimeError("a bus runs once: build a new one")
        self._started = True
        self._on_connected = on_connected
        self._commits = commits
        try:
            async with asyncio.TaskGroup() as group:
                handling = group.create_task(self._handle(receive), name="bus-handle")
                keeping = group.create_task(self._keep_connected(), name="bus-connect")
                running = {handling, keeping}
                if commits is not None:
                    running.add(group.create_task(self._settle(commits), name="bus-acknowledge"))
                self._own_tasks |= running
                await self._closing.wait()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._close_timeout_s):
                        await asyncio.wait({handling})
                        await self._all_acknowledged.wait()
                for task in running:
                    task.cancel()
        finally:
            self._closing.set()
            self._finished.set()

    async def wait_connected(self, timeout_s: float) -> bool:
        """See ``Bus.wait_connected``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """See ``Bus.close``. The message being handled is finished and acknowledged first.

        When called from the handler or ``on_connected``, it only asks ``run`` to end: it cannot wait for its caller.
        """
        self._closing.set()
        self._inbox.close()
        if self._started and asyncio.current_task() not in self._own_tasks:
            await self._finished.wait()

    async def _until_ready(self, topic: str, timeout_s: float) -> None:
        """Wait for a connection to publish on.

        Raises:
            BusUnavailable: none in time, or the bus is being closed.
        """
        if not self._ready.is_set() and not self._closing.is_set():
            waits = {asyncio.ensure_future(each.wait()) for each in (self._ready, self._closing)}
            try:
                await asyncio.wait(waits, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in waits:
                    each.cancel()
        if self._ready.is_set():
            return
        why = "the bus is closed" if self._closing.is_set() else self._stats.last_error or "not connected yet"
        raise BusUnavailable(f"no connection to publish on {topic!r}: {why}")

    async def _handle(self, receive: Handler) -> None:
        while (parcel := await self._inbox.get()) is not None:
            try:
                await receive(parcel.delivery)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise  # not acknowledged: the broker sends it again
                # Not our cancellation: the handler leaked that of one of its own tasks.
                _log.exception("bus.handler_failed", topic=parcel.delivery.topic)
            except Exception:  # noqa: BLE001 - the port: a message that crashes its handler counts as handled
                _log.exception("bus.handler_failed", topic=parcel.delivery.topic)
            self._dealt_with(parcel)
            self._handled()
            # A broker without a window of unacknowledged messages is held back by the inbox, which is full then.
            while self._too_many_unacknowledged:
                self._acknowledged.clear()
                await self._acknowledged.wait()

    def _dealt_with(self, parcel: QueuedDelivery) -> None:
        # QoS 0 has no acknowledgement to defer.
        if not parcel.qos or self._commits is None or (self._commits.settled and not self._unacknowledged):
            parcel.acknowledge()
            return
        self._unacknowledged.append(parcel)
        self._unacknowledged_bytes += parcel.size_bytes
        self._all_acknowledged.clear()
        self._to_acknowledge.set()

    @property
    def _too_many_unacknowledged(self) -> bool:
        """Apply the bounds of the inbox to the messages that have left it."""
        return (
            len(self._unacknowledged) >= self._inbox.limit
            or self._unacknowledged_bytes >= self._inbox.limit_bytes
        )

    async def _settle(self, commits: Commits) -> None:
        """Acknowledge handled messages once their writes are on disk, as many at once as have accumulated."""
        while True:
            await self._to_acknowledge.wait()
            self._to_acknowledge.clear()
            handled = len(self._unacknowledged)
            await commits.reached()
            for _ in range(handled):
                parcel = self._unacknowledged.popleft()
                self._unacknowledged_bytes -= parcel.size_bytes
                parcel.acknowledge()
            self._acknowledged.set()
            if not self._unacknowledged:
                self._all_acknowledged.set()

    def _take(self, parcel: QueuedDelivery) -> None:
        """Put a message that arrived into the inbox, or drop it (QoS 0), loudly when there is no room."""
        self._stats.received += 1
        if self._refuses(parcel):
            parcel.acknowledge()
            return
        if not self._inbox.put(parcel):
            self._stats.dropped += 1
            self._warn_backlog(parcel.delivery.topic, "messages are being dropped (QoS 0)")
        elif self._inbox.full:
            self._warn_backlog(parcel.delivery.topic, "the broker is being held back (QoS 1)")

    def _refuses(self, parcel: QueuedDelivery) -> bool:
        """Whether the message exceeds its writer's rate. Where possible, that writer's filter is then muted.

        A retained fact or command is refused, too: no writer of the contract retains one, and the number of topics on which
        somebody could is unbounded. It counts against its writer.
        """
        topic, now_s = parcel.delivery.topic, asyncio.get_running_loop().time()
        state = parcel.delivery.retained and may_be_retained(topic)
        within = state or self._rates is None or self._rates.admits(topic, parcel.size_bytes, now_s)
        if within and (state or not parcel.delivery.retained):
            return False
        party, name = writer_of(topic)
        self._stats.refused[party] = self._stats.refused.get(party, 0) + 1
        if parcel.delivery.retained:
            # Do not unsubscribe: the broker would only send what it has stored again at the next subscription.
            left_out = self._sampled.due(f"retained/{party}")
            if left_out is not None:
                _log.warning(
                    "bus.retained_refused",
                    writer=f"{party}/{name}",
                    topic=cut(topic),
                    left_out=left_out,
                    advice="no service retains it: give its user another password, and remove it from the broker "
                    "(an empty retained message on its topic)",
                )
            return True
        own = f"{'/'.join(topic.split('/', 2)[:2])}/{party}/{name}/"
        muted = [each for each in self.subscribed() if each not in self._muted and each.startswith(own)]
        wide = [each for each in self.filters if each not in self._muted and matches(each, topic)]
        if self.peers is not None and wide and not muted:
            # Other writers of its party stay subscribed, each by name. Where no name is known (operators have no
            # inventory) the filter stays: a legitimate request is worth more than the cost of the flood.
            names = set(self.peers(party)) - {name}
            for each in wide if names else ():
                self._instead[each] = tuple(each.replace("/+/", f"/{peer}/", 1) for peer in sorted(names))
                muted.append(each)
        self._muted |= dict.fromkeys(muted, now_s + MUTED_S)
        if muted:
            self._mute(muted, [instead for each in muted for instead in self._instead.get(each, ())])
        left_out = self._sampled.due(party)
        if left_out is not None:
            _log.warning(
                "bus.flood",
                writer=f"{party}/{name}",
                topic=cut(topic),
                muted_s=MUTED_S if self._muted else 0,
                left_out=left_out,
                advice="it sends more than any Caesura service: check it, or give it another password",
            )
        return True

    def subscribed(self) -> list[str]:
        """The filters to subscribe to now: without the muted ones, and with their replacements."""
        stand_ins = [each for wide in self._muted for each in self._instead.get(wide, ())]
        return [each for each in (*self.filters, *stand_ins) if each not in self._muted]

    def subscribe_also(self, filters: Sequence[str]) -> None:
        """See ``Bus``."""
        more = [each for each in dict.fromkeys(filters) if each not in self.filters]
        for each in more:
            check_filter(each)
        if more:
            self.filters = (*self.filters, *more)
            self._subscribe_more(more)

    @abstractmethod
    def _subscribe_more(self, filters: Sequence[str]) -> None:
        """These are new in ``filters``: subscribe to them if there is a connection."""

    def _mute(self, filters: Sequence[str], instead: Sequence[str]) -> None:  # noqa: B027 - an adapter need not
        """These filters were put into ``_muted``: an adapter that can unsubscribe does so until their time is up."""

    def _warn_backlog(self, topic: str, effect: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._warned_at < _WARN_EVERY_S:
            return
        self._warned_at = now
        _log.warning(
            "bus.backlog",
            effect=effect,
            backlog=len(self._inbox),
            limit=self._inbox.limit,
            backlog_bytes=self._inbox.size_bytes,
            limit_bytes=self._inbox.limit_bytes,
            dropped=self._stats.dropped,
            topic=topic,
            advice="the handler is slower than the messages come: subscribe to less, or make it faster",
        )

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        """The time from subscribed to the end of the connection: publishing works, the greeting runs."""
        self._stats.connects += 1
        self._stats.connected = True
        self._stats.last_error = ""
        self._ready.set()
        greeting = asyncio.create_task(self._run_on_connected(), name="bus-on-connected")
        self._own_tasks.add(greeting)
        try:
            yield
        finally:
            self._ready.clear()
            self._stats.connected = False
            self._own_tasks.discard(greeting)
            greeting.cancel()
            await asyncio.wait({greeting})

    async def _run_on_connected(self) -> None:
        if self._on_connected is None:
            return
        try:
            await self._on_connected()
        except BusUnavailable as error:
            _log.info("bus.on_connected_cut_short", why=str(error))  # it runs again after the next connect
        except Exception:  # noqa: BLE001 - a bug in a hook must not end the connection that others use
            _log.exception("bus.on_connected_failed")
