"""One connection of the operator's command: collect the retained state, send a request, await its answer."""

from __future__ import annotations

import asyncio
import getpass
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from caesura.bus.diagnosis import (
    BAD_USER_OR_PASSWORD,
    NOT_AUTHORIZED,
    ConnectionLost,
    ConnectionProblem,
    ConnectRefused,
    NoBrokerReached,
    SubscribeRefused,
    explain,
)
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions, TlsFilesUnusable, options_from
from caesura.bus.port import Bus, BusError, BusStats
from caesura.bus.resync import Resync
from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.envelope import Message, source_of
from caesura.contract.parts import with_parts
from caesura.contract.topics import CHANNELS, channel_of
from caesura.delivery.message import prepare
from caesura.delivery.policy import DeliveryPolicy
from caesura.delivery.publisher import ReliablePublisher
from caesura.fleet.retained_messages import Cleared
from caesura.runtime.identity import new_id
from caesura.runtime.settings import SettingsError
from caesura_ctl.errors import BadRequest, NoBroker, NoCoordinatorAnswer
from caesura_ctl.fleet_view import FleetView
from caesura_ctl.settings import CtlSettings

CONNECT_S = 5.0
ANSWER_S = 10.0
_TAKEN_S = 2.0
"""s: for the broker to accept a request."""
_REPEAT_S = 1.0
"""s: between two sends of an unanswered request; the coordinator carries out a repeated one only once."""
_BACKLOG = 200_000
"""Messages that may wait where they come at QoS 0 and would be dropped: what a large fleet retains."""
_QUIET_S = 0.3
"""s: of silence after which all retained messages count as received: MQTT does not mark their end."""

_NOT_KNOWN = frozenset({BAD_USER_OR_PASSWORD, NOT_AUTHORIZED})

Listener = Callable[[Received], Awaitable[None]]
R = TypeVar("R", bound=m.RolloutRequested | m.FreezeRequested | m.AbortRequested | m.ResumeRequested)


class ConnectionNews:
    """Reports the loss and the return of the connection as text, each once.

    Args:
        stats: those of a bus that has been connected.
        missed: called on every loss.
    """

    LOST = "connection to the broker lost, trying again"

    def __init__(self, stats: BusStats, missed: Callable[[], None]) -> None:
        self.up = True
        self._stats = stats
        self._missed = missed
        self._connects = 1

    def news(self) -> list[str]:
        """The lines to print since the last call."""
        lines = []
        # Lost and back between two checks: messages published in between are missing all the same.
        if self.up and (not self._stats.connected or self._stats.connects > self._connects):
            self.up = False
            self._missed()
            lines.append(self.LOST)
        if not self.up and self._stats.connected:
            self.up = True
            lines.append("connected to the broker again")
        self._connects = self._stats.connects
        return lines


def client_name(settings: CtlSettings) -> str:
    """The name under which requests are made: a valid topic level."""
    return settings.client or re.sub(r"[^A-Za-z0-9_-]", "-", _login())[:40] or "operator"


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container user without a name (KeyError up to Python 3.12)
        return "operator"


class Session:
    """The command's connection to the bus."""

    def __init__(
        self, bus: Bus, client: str, fleet: str = "default", *, ignore_retained: bool = False
    ) -> None:
        self.bus = bus
        self.client = client
        self.fleet_view = FleetView()
        self.post = MessageClient(bus, source_of(fleet, "ctl", client))
        self.resync = Resync(
            self.post,
            enabled=ignore_retained,
            request=lambda: m.ClientResyncRequested(client=client),
            client=client,
        )
        self.connection = ConnectionNews(bus.stats, self.fleet_view.missed)
        self.changed = asyncio.Event()
        self._answers: dict[str, asyncio.Future[m.RequestAnswered]] = {}
        self._last = asyncio.get_running_loop().time()
        for channel in CHANNELS:
            if channel.message is not m.FleetResyncRequested:
                self.post.subscribe(channel.message, self._received)
            if channel.retain:
                self.post.on_tombstone(channel.message, partial(self._cleared, channel.message))

    async def on_connected(self) -> None:
        """Ask for the state of the fleet, where the broker does not give it."""
        self.resync.connected()

    async def _received(self, message: Message, received: Received) -> None:
        self._last = asyncio.get_running_loop().time()
        self.fleet_view.fold(message, self._last)
        self.fleet_view.note_sent(message, received.header.time)
        if isinstance(message, m.RequestAnswered):
            waiting = self._answers.get(message.request)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        self.changed.set()

    async def _cleared(self, kind: type[Message], parameters: Mapping[str, str]) -> None:
        self._last = asyncio.get_running_loop().time()
        self.fleet_view.fold(Cleared(kind, parameters), self._last)
        self.changed.set()

    async def settled(self, limit_s: float = 3.0) -> None:
        """Return when everything retained has arrived: after a short silence, or ``limit_s`` seconds.

        Where the broker's retained messages are ignored, the writers are asked first, which is waited for as long as for an answer.

        Raises:
            NoCoordinatorAnswer: nobody asked the writers.
        """
        loop = asyncio.get_running_loop()
        # Silence counts from here: what is retained is sent when the subscriptions are, and not since this was made.
        self._last = max(self._last, loop.time())
        if self.resync.enabled:
            try:
                async with asyncio.timeout(ANSWER_S):
                    await self.resync.answered.wait()
            except TimeoutError:
                raise NoCoordinatorAnswer(
                    f"the state of the fleet was not published within {ANSWER_S:g} s: with BROKER_RETAINED=ignored a coordinator must ask for "
                    "it. Is caesura-coordinator running, with the same setting?"
                ) from None
            await asyncio.sleep(self.resync.spread_s)
        end = loop.time() + limit_s
        # The condition is silence, which no event signals: hence a sleep until it would be complete.
        # A state caught between a wave and its rollout is complete a moment later: it must not be missing.
        while (left := min(self._last + _QUIET_S, end) - loop.time()) > 0 or (  # noqa: ASYNC110
            self.post.incomplete and loop.time() < end
        ):
            await asyncio.sleep(max(left, _QUIET_S / 4))

    async def ask(self, request: R) -> m.RequestAnswered:
        """Send a request until it is answered.

        Raises:
            BadRequest: it violates the contract (a notice of zero, a budget above 30 s, an impossible name).
            NoBroker: the broker did not accept it, or the connection was lost.
            NoCoordinatorAnswer: no coordinator answered within 10 s.
        """
        check(request)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[m.RequestAnswered] = loop.create_future()
        self._answers[request.request] = answer
        message = prepare(
            request, source=self.post.source, event_id=new_id(), at=datetime.now(UTC), client=self.client
        )
        policy = DeliveryPolicy(
            give_up_s=_TAKEN_S, refusal_ends=True, repeat_s=_REPEAT_S, wanted=lambda: not answer.done()
        )
        end = loop.time() + ANSWER_S
        publisher = ReliablePublisher(self.bus)
        publishing = asyncio.create_task(publisher.run(), name="request")
        try:
            await publisher.deliver(message, policy)
            async with asyncio.timeout_at(end):
                return await answer
        except BusError as error:
            raise NoBroker(str(error)) from error
        except TimeoutError:
            pass
        finally:
            del self._answers[request.request]
            answer.cancel()
            publishing.cancel()
            await asyncio.wait({publishing})
        if not self.bus.stats.connected:
            raise NoBroker(f"the connection to the broker was lost: {self.bus.stats.last_error}")
        coordinator = self.fleet_view.coordinator
        who = (
            "is not on the bus. Is caesura-coordinator running?"
            if coordinator is None or not coordinator.online
            else f"({coordinator.coordinator}) is on the bus but silent. Its log and its /ready say why."
        )
        raise NoCoordinatorAnswer(
            f"no answer within {ANSWER_S:g} s: the coordinator {who} "
            "If it returns within a minute, it may still carry out the request: see caesura status."
        )


def check(request: m.RolloutRequested | m.FreezeRequested | m.AbortRequested | m.ResumeRequested) -> None:
    """Check a request against the contract, without a broker.

    Raises:
        BadRequest: naming the option that is wrong.
    """
    try:
        msgspec.convert(msgspec.to_builtins(request), type(request))
    except msgspec.ValidationError as error:
        raise BadRequest(_humane(error)) from error


_OPTIONS = {"rollout": "ROLLOUT", "reason": "--reason"}
"""Options of the request's members whose limits the command line does not check."""
_TOO_LONG = re.compile(r"Expected `str` of length <= (\d+)")

_NO_NAME = re.compile(r"Expected `str` matching regex '\^\[A-Za-z0-9_-\]\{\d,(\d+)\}.*'")


def _humane(error: msgspec.ValidationError) -> str:
    what, _, path = str(error).partition(" - at ")
    name = path.strip("`$. ")
    what = _TOO_LONG.sub(r"at most \1 characters", what)
    what = _NO_NAME.sub(r"at most \1 characters, of A-Z a-z 0-9 _ -", what)
    return f"{_OPTIONS.get(name, name) or 'the request'}: {what}"


def new_request_id() -> str:
    """The id under which the coordinator stores its answer."""
    return new_id()


@asynccontextmanager
async def connect(
    settings: CtlSettings,
    kinds: Sequence[type[Message]] | None = None,
    *,
    listener: Listener | None = None,
    connect_s: float = CONNECT_S,
) -> AsyncIterator[Session]:
    """A session with the broker of ``settings``.

    Args:
        kinds: message types to subscribe to; None: all types that an operator may read.
        listener: called with every message as it was sent, including retained ones.
        connect_s: seconds to wait for the connection, for each address of the broker.

    Raises:
        SettingsError: a file for TLS cannot be used.
        NoBroker: not connected within ``connect_s``; the text says why.
    """
    client = client_name(settings)
    options = options_from(settings, client_id=f"ctl-{client}-{new_id()[:8]}", new_id=True)
    if len(options.addresses) > 1:
        options = replace(options, subscribe_qos=0, backlog_limit=_BACKLOG)
    _check_tls(options)
    channels = (
        [channel for channel in CHANNELS if "ctl" in channel.readers]
        if kinds is None
        else [channel_of(kind) for kind in with_parts(kinds)]
    )
    filters = [
        channel.filter(client=client) if "client" in channel.parameters else channel.filter()
        for channel in channels
    ]
    bus = MqttBus(options, filters=filters)
    session = Session(bus, client, settings.fleet, ignore_retained=options.ignore_retained)
    if listener is not None:
        session.post.listeners.append(listener)
    running = asyncio.create_task(bus.run(session.post.deliver, session.on_connected), name="bus")
    resync = asyncio.create_task(session.resync.run(), name="resync")
    try:
        # A node that accepts connections and answers nothing takes the time of one broker.
        if not await bus.wait_connected(connect_s * len(options.addresses)):
            raise NoBroker(_no_broker(bus))
        yield session
    finally:
        resync.cancel()
        await asyncio.wait({resync})
        await bus.close()
        await running


def _check_tls(options: BrokerOptions) -> None:
    """Check that the files exist and are usable: otherwise the broker would be retried and blamed.

    Raises:
        SettingsError: naming the variable.
    """
    files = {
        "CAESURA_CTL_BROKER_CA_FILE": options.ca_file,
        "CAESURA_CTL_BROKER_CERT_FILE": options.cert_file,
        "CAESURA_CTL_BROKER_KEY_FILE": options.key_file,
    }
    given = {name: path for name, path in files.items() if path}
    for name, path in given.items():
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise SettingsError(f"{name}={path!r}: cannot be read: {error.strerror or error}") from error
    try:
        options.tls()
    except (ssl.SSLError, TlsFilesUnusable) as error:
        names = ", ".join(f"{name}={path!r}" for name, path in given.items())
        problem = explain(error, options)
        raise SettingsError(f"{names}: {problem.summary}; {problem.hint}") from error


def _no_broker(bus: MqttBus) -> str:
    """Why there is no connection, and what to do about it."""
    error = bus.last_failure
    addresses = ", ".join(str(each) for each in bus.options.addresses)
    broker = f"the broker at {addresses}" if len(bus.options.addresses) == 1 else f"any broker of {addresses}"
    if isinstance(error, NoBrokerReached):
        refusals = [each for each in error.failures.values() if isinstance(each, ConnectRefused)]
        error = refusals[0] if len(refusals) == len(error.failures) else error
    if error is None:
        why = ConnectionProblem("no answer", "check the network and the firewall")
    else:
        why = explain(error, bus.options)
    if isinstance(error, ConnectRefused) and error.code in _NOT_KNOWN and not bus.options.username:
        advice = "set CAESURA_CTL_BROKER_USERNAME and CAESURA_CTL_BROKER_PASSWORD_FILE"
    elif isinstance(error, ssl.SSLError):
        advice = f"{why.hint} (CAESURA_CTL_BROKER_CA_FILE)"
    else:
        advice = why.hint
    advice = advice[0].upper() + advice[1:]
    if isinstance(error, ConnectRefused | SubscribeRefused | ConnectionLost):
        return f"{broker} does not let us in: {why.summary}. {advice}."
    return (
        f"cannot reach {broker}: {why.summary}. {advice}, or name another broker with --broker or "
        "CAESURA_CTL_BROKER_URL."
    )
