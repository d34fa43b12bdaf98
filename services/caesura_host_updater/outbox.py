"""Facts on their way to the bus: kept on disk, told in order, the same CloudEvents id when told again."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping

import msgspec
import structlog

from caesura.bus.port import BusUnavailable, PublishRefused
from caesura.bus.post import Post
from caesura.contract.envelope import Message
from caesura.contract.topics import CHANNELS, channel_of
from caesura.runtime.errors import CaesuraError
from caesura_host_updater.journal import Journal, JournalThread, Letter
from caesura_host_updater.operation_state import Operation

_RETRY_S = 2.0  # s: between two tries when the broker is there but will not take a message
_PAUSE_S = 0.1  # s: after a connection that failed in the middle

_log = structlog.get_logger("caesura.outbox")


def letter_for(message: Message, event_id: str, parameters: Mapping[str, str | int]) -> Letter:
    """A message ready to be kept. Raises TopicError if it cannot be sent at all."""
    channel_of(type(message)).topic(**parameters)
    body = msgspec.Raw(msgspec.json.encode(message))
    return Letter(event_id, type(message).TYPE, dict(parameters), body)


class Outbox:
    """Sends letters one after the other; a letter leaves the journal when the broker has taken it.

    Args:
        told: called with each letter when the broker has it.
    """

    def __init__(self, post: Post, journal: JournalThread, told: Callable[[Letter, Message], None]) -> None:
        self._post = post
        self._journal = journal
        self._told = told
        self._queue: deque[Letter] = deque()
        self._filled = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._types = {channel.message.TYPE: channel.message for channel in CHANNELS}

    def __len__(self) -> int:
        return len(self._queue)

    async def load(self) -> None:
        """Take up what an earlier life could not tell."""
        for letter in await self._journal.do(Journal.letters):
            self.queue(letter)

    def put(self, letter: Letter, state: Operation) -> None:
        """Keep a fact with the state that makes it true, and tell it; does not wait for the disk."""
        self._journal.post(lambda journal: journal.note(state, [letter]))
        self.queue(letter)

    def queue(self, *letters: Letter) -> None:
        """Tell letters that are in the journal already."""
        self._queue.extend(letters)
        if letters:
            self._empty.clear()
            self._filled.set()

    async def drained(self, timeout_s: float) -> bool:
        """Wait until everything was told; false after ``timeout_s`` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Send, for ever."""
        while True:
            if not self._queue:
                self._empty.set()
                self._filled.clear()
                await self._filled.wait()
            letter = self._queue[0]
            if await self._send(letter):
                self._queue.popleft()
                self._journal.post(lambda journal, done=letter.event_id: journal.told(done))  # type: ignore[misc]

    async def _send(self, letter: Letter) -> bool:
        """Whether the letter is done with."""
        try:
            message = msgspec.json.decode(letter.body, type=self._types[letter.type])
            await self._post.send(message, event_id=letter.event_id, **letter.parameters)
        except BusUnavailable:
            await asyncio.sleep(_PAUSE_S)
            await self._post.bus.wait_connected(_RETRY_S)
            return False
        except PublishRefused as error:
            _log.error("outbox.refused", topic=error.topic, why=str(error))
            await asyncio.sleep(_RETRY_S)  # an operator must correct the access rules: no fact is dropped
            return False
        except (CaesuraError, msgspec.DecodeError, KeyError) as error:
            _log.error("outbox.unsendable", type=letter.type, event_id=letter.event_id, why=str(error))
            return True
        self._told(letter, message)
        return True
