"""One connection of the operator's command: collect what is retained, send a request, await its answer."""

from __future__ import annotations

import asyncio
import getpass
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec

from caesura.bus.mqtt import MqttBus
from caesura.bus.options import options_from
from caesura.bus.port import Bus, BusError
from caesura.bus.post import Post
from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.envelope import Message
from caesura.contract.topics import CHANNELS, channel_of
from caesura.runtime.errors import CaesuraError
from caesura.runtime.identity import new_id
from caesura_ctl.picture import Picture
from caesura_ctl.settings import CtlSettings

CONNECT_S = 5.0
ANSWER_S = 10.0
_REPEAT_S = 1.0
"""s: between two sendings of a request that has no answer yet; the coordinator answers a repeated one once."""
_QUIET_S = 0.3
"""s: without a message, after which everything retained has arrived: MQTT has no end mark for it."""

Listener = Callable[[Received], Awaitable[None]]
R = TypeVar("R", bound=m.RolloutRequested | m.FreezeRequested | m.AbortRequested | m.ResumeRequested)


class NoBroker(CaesuraError):
    """The broker cannot be reached."""

    exit_code = 4


class NoAnswer(CaesuraError):
    """The coordinator did not answer in time."""

    exit_code = 5


class BadRequest(CaesuraError):
    """A request that breaks the contract, found before it is sent."""

    exit_code = 2


def client_name(settings: CtlSettings) -> str:
    """The name under which requests are made: a clean topic level."""
    return settings.client or re.sub(r"[^A-Za-z0-9_-]", "-", _login())[:40] or "operator"


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container user without a name (KeyError up to Python 3.12)
        return "operator"


class Session:
    """The command's side of the bus while it is connected."""

    def __init__(self, bus: Bus, client: str) -> None:
        self.bus = bus
        self.client = client
        self.picture = Picture()
        self.post = Post(bus, f"/caesura/ctl/{client}")
        self.changed = asyncio.Event()
        self.listeners: list[Listener] = []
        self._answers: dict[str, asyncio.Future[m.RequestAnswered]] = {}
        self._last = asyncio.get_running_loop().time()
        for channel in CHANNELS:
            self.post.on(channel.message, self._received)

    async def _received(self, message: Message, received: Received) -> None:
        self._last = asyncio.get_running_loop().time()
        self.picture.fold(message)
        if isinstance(message, m.RequestAnswered):
            waiting = self._answers.get(message.request)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        for listener in self.listeners:
            await listener(received)
        self.changed.set()

    async def settled(self, limit_s: float = 3.0) -> None:
        """Return when everything retained has arrived: after a short silence, or ``limit_s`` seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        # Silence is what is awaited, and nothing announces it: hence a sleep until it would be complete.
        while (left := min(self._last + _QUIET_S, end) - loop.time()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)

    async def ask(self, request: R) -> m.RequestAnswered:
        """Send a request until it is answered.

        Raises:
            BadRequest: it breaks the contract (a notice of zero, a budget above 30 s, an impossible name).
            NoAnswer: no coordinator answered within 10 s.
        """
        try:
            msgspec.convert(msgspec.to_builtins(request), type(request))
        except msgspec.ValidationError as error:
            raise BadRequest(_humane(error)) from error
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[m.RequestAnswered] = loop.create_future()
        self._answers[request.request] = answer
        end = loop.time() + ANSWER_S
        try:
            while loop.time() < end:
                try:
                    await self.post.send(request, client=self.client, timeout_s=2.0)
                except BusError as error:
                    raise NoBroker(str(error)) from error
                done, _ = await asyncio.wait({answer}, timeout=_REPEAT_S)
                if done:
                    return answer.result()
        finally:
            del self._answers[request.request]
        heard = self.picture.coordinator
        who = (
            "is not on the bus"
            if heard is None or not heard.online
            else f"({heard.coordinator}) is on the bus but silent"
        )
        raise NoAnswer(
            f"no answer within {ANSWER_S:g} s: the coordinator {who}. Is caesura-coordinator running? "
            "Should it come back within a minute it may still do what you asked: caesura status tells."
        )


def _humane(error: msgspec.ValidationError) -> str:
    text = str(error)
    path = text.partition(" - at ")[2].strip("`$. ")
    what = text.partition(" - at ")[0]
    return f"{path or 'the request'}: {what}"


def new_request_id() -> str:
    """An id under which the coordinator remembers its answer."""
    return new_id()


@asynccontextmanager
async def connect(
    settings: CtlSettings, kinds: Sequence[type[Message]] | None = None, *, listener: Listener | None = None
) -> AsyncIterator[Session]:
    """A session with the broker of ``settings``.

    Args:
        kinds: message types to subscribe to; None: all that an operator may read.
        listener: called with every message, what is retained included.

    Raises:
        NoBroker: not connected within 5 s; the text says why.
    """
    client = client_name(settings)
    options = options_from(settings, client_id=f"ctl-{client}-{new_id()[:8]}")
    channels = (
        [channel for channel in CHANNELS if "ctl" in channel.readers]
        if kinds is None
        else [channel_of(kind) for kind in kinds]
    )
    filters = [
        channel.filter(client=client) if "client" in channel.parameters else channel.filter()
        for channel in channels
    ]
    bus = MqttBus(options, filters=filters)
    session = Session(bus, client)
    if listener is not None:
        session.listeners.append(listener)
    running = asyncio.create_task(bus.run(session.post.deliver), name="bus")
    try:
        if not await bus.wait_connected(CONNECT_S):
            raise NoBroker(
                f"cannot reach the broker at {settings.broker_url}: {bus.stats.last_error or 'no answer'}. "
                "Start it, or name another one with --broker or CAESURA_CTL_BROKER_URL."
            )
        yield session
    finally:
        await bus.close()
        await running
