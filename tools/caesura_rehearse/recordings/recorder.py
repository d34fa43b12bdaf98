"""Records what a Scheduled Events server serves: asks it again and again, and writes down each change."""

from __future__ import annotations

import asyncio
import http.client
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import msgspec

from caesura.runtime.errors import CaesuraError, ConfigError
from caesura.runtime.threads import in_thread
from caesura_rehearse.recordings.recording import (
    API_VERSION,
    MOST_BYTES,
    MOST_DOCUMENT_BYTES,
    MOST_S,
    ChangeLog,
    RecordedLine,
    RecordingHead,
    encode_line,
    events_in,
)

_ANSWER_S = 150.0
"""s: the real server takes up to two minutes for its first answer (azure-compute-docs, "Enabling and disabling Scheduled Events")."""
_END_LINE_BYTES = 100
_PATH = "/metadata/scheduledevents"


class BadServer(ConfigError):
    """The address cannot be used, or nothing of that kind answers there."""


class RecordingFull(CaesuraError):
    """The file has reached its greatest size; what was recorded until then can be replayed."""


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    file: str
    seconds: float
    documents: int
    """Different ones, one after the other."""
    events: int
    size_bytes: int


class Server:
    """Where documents come from. Requests go past any proxy.

    Args:
        url: of the server, or of the document.

    Raises:
        BadServer: it is not an HTTP address.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme != "http" or not parts.hostname or port == -1:
            raise BadServer(f"{url!r} is not an address such as http://169.254.169.254")
        self.url = url
        self._host, self._port = parts.hostname, port or 80
        path = parts.path if parts.path not in ("", "/") else _PATH
        self._target = f"{path}?{parts.query or f'api-version={API_VERSION}'}"

    def ask(self) -> tuple[int, bytes, str]:
        """Status, body, and why there was no answer (status 0). Blocking."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_ANSWER_S)
        try:
            connection.request("GET", self._target, headers={"Metadata": "true", "Connection": "close"})
            answer = connection.getresponse()
            body = answer.read(MOST_DOCUMENT_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return 0, b"", f"no answer: {why}"
        finally:
            connection.close()
        if len(body) > MOST_DOCUMENT_BYTES:
            return 0, b"", f"the answer has more than {MOST_DOCUMENT_BYTES} bytes"
        return answer.status, body, ""


class Recorder:
    """One recording.

    Args:
        server: that is asked.
        file: that is written; it must not exist.
        every_s: seconds from one request to the next.
        overwrite: whether the file may exist, and is lost.
        say: called with each piece of news, for people.
        most_bytes: of the file.
    """

    def __init__(
        self,
        server: Server,
        file: Path,
        every_s: float,
        say: Callable[[str], None],
        *,
        overwrite: bool = False,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._server = server
        self._file = file
        self._every_s = every_s
        self._say = say
        self._overwrite = overwrite
        self._most_bytes = most_bytes
        self._stop = asyncio.Event()
        self._began = 0.0
        self._size = 0
        self._documents = 0
        self._events: set[str] = set()

    def stop(self) -> None:
        """The recording ends, and its file is complete."""
        self._stop.set()

    async def run(self, for_s: float | None) -> Recorded:
        """Record, for ``for_s`` seconds; None: until ``stop``.

        Raises:
            BadServer: the first request has no document; no file is left.
            ConfigError: the file cannot be written, or exists.
            RecordingFull: the file has reached its greatest size.
        """
        self._began = time.monotonic()
        first = ChangeLog()
        head = RecordingHead(
            caesura_recording=1, server=self._server.url, began=datetime.now(UTC), every_s=self._every_s
        )
        line = await self._ask(first)
        if self._stop.is_set():
            raise BadServer(f"{self._server.url} had not answered yet: nothing was recorded")
        if line is None or line.document is None:
            why = line.error if line is not None and line.error else "no answer"
            status = f"{line.status} " if line is not None and line.status else ""
            raise BadServer(f"{self._server.url} serves no document of scheduled events: {status}{why[:300]}")
        with await in_thread("open", self._open) as file:
            await self._write(file, encode_line(head))
            await self._note(file, line)
            await self._follow(file, first, min(for_s or MOST_S, MOST_S))
            ended = RecordedLine(at=self._now, ended=True)
            await self._write(file, encode_line(ended))
        return Recorded(
            file=str(self._file),
            seconds=ended.at,
            documents=self._documents,
            events=len(self._events),
            size_bytes=self._size,
        )

    @property
    def _now(self) -> float:
        return round(time.monotonic() - self._began, 3)

    async def _follow(self, file: IO[bytes], changes: ChangeLog, for_s: float) -> None:
        due = 0.0
        while True:
            due = max(due + self._every_s, self._now)  # requests that were missed are not made up for
            if await self._stopped(min(due, for_s) - self._now) or due > for_s:
                return
            line = await self._ask(changes)
            if line is None:
                continue
            if self._size + len(encode_line(line)) + _END_LINE_BYTES > self._most_bytes:
                await self._write(file, encode_line(RecordedLine(at=self._now, ended=True)))
                raise RecordingFull(
                    f"{self._file} has reached {self._most_bytes} bytes after {self._now:.0f} s; what it has can be replayed"
                )
            await self._note(file, line)

    async def _stopped(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(max(within_s, 0.0)):
                await self._stop.wait()
        except TimeoutError:
            return False
        return True

    async def _ask(self, changes: ChangeLog) -> RecordedLine | None:
        """One request; None: nothing new, or it was stopped before the answer came."""
        asking = asyncio.ensure_future(in_thread("ask the server", self._server.ask))
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({asking, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not asking.done():
            asking.cancel()
            return None
        status, body, error = asking.result()
        return changes.line(self._now, status, body, error)

    async def _note(self, file: IO[bytes], line: RecordedLine) -> None:
        await self._write(file, encode_line(line))
        if line.document is None:
            self._say(f"{line.at:7.1f} s  {line.status or ''} {line.error[:200]}")
            return
        document = events_in(line.document)
        self._documents += 1
        self._events |= {each.event_id.lower() for each in document.events}
        shown = ", ".join(f"{each.event_type} {each.status}" for each in document.events) or "no event"
        self._say(f"{line.at:7.1f} s  incarnation {document.incarnation}: {shown}")

    def _open(self) -> IO[bytes]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if self._overwrite else os.O_EXCL)
        try:
            return open(os.open(self._file, flags, 0o644), "wb", buffering=0)  # noqa: PTH123 - a descriptor; closed by the caller
        except FileExistsError as error:
            raise ConfigError(f"{self._file} exists: name another file, or give --overwrite") from error
        except OSError as error:
            raise ConfigError(f"cannot write {self._file}: {error.strerror or error}") from error

    async def _write(self, file: IO[bytes], text: bytes) -> None:
        def write() -> None:
            file.write(text)

        try:
            await in_thread("write", write)
        except OSError as error:
            raise ConfigError(f"cannot write {self._file}: {error.strerror or error}") from error
        self._size += len(text)


def check_free(file: Path, *, overwrite: bool) -> None:
    """Refuse at once, before the server is asked. Raises ConfigError."""
    if file.exists() and not overwrite:
        raise ConfigError(f"{file} exists: name another file, or give --overwrite")
    if not file.parent.is_dir():
        raise ConfigError(f"cannot write {file}: there is no folder {file.parent}")
