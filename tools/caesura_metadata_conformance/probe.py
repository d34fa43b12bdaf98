"""What the checks ask a server: the usual requests, the documents seen over time, and a record of every exchange."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from caesura_metadata_conformance.exchange import Ask, NoAnswer, Reply, Transport

EVENTS = "/metadata/scheduledevents"
INSTANCE = "/metadata/instance"
EVENTS_VERSION = "2020-07-01"
INSTANCE_VERSION = "2021-02-01"
NEWEST_INSTANCE_VERSION = "2025-04-07"
MARK = ("Metadata", "true")
NOBODYS_EVENT = "00000000-0000-4000-8000-000000000000"

_TOO_MANY = 429
_RETRIES = 8
_RETRY_S = 0.5  # s: the real service serves five requests a second


class Probe:
    """A server under check.

    Args:
        transport: where requests go.
        watch_s: seconds for which documents are looked at, from the first time that a check needs several.
        approve: whether checks may approve an open event.
        clock: seconds on a monotonic clock.
        sleep: waits some seconds.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        watch_s: float = 0.0,
        approve: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._transport = transport
        self._watch_s = watch_s
        self.approve = approve
        self._clock = clock
        self._sleep = sleep
        self._seen: list[Any] | None = None
        self.exchanges: list[tuple[Ask, Reply | None]] = []
        """Those of the current check."""

    def begin(self) -> None:
        """The next check begins."""
        self.exchanges = []

    def send(self, *asks: Ask) -> list[Reply]:
        """The answers, all on one connection. A server that says 429 is asked again, more slowly.

        Raises:
            NoAnswer: to one of them.
        """
        for attempt in range(_RETRIES):
            try:
                replies = self._transport.exchange(asks)
            except NoAnswer:
                self.exchanges += [(ask, None) for ask in asks]
                raise
            if attempt == _RETRIES - 1 or all(reply.status != _TOO_MANY for reply in replies):
                break
            self._sleep(_RETRY_S)
        self.exchanges += zip(asks, replies, strict=True)
        return replies

    def get(
        self,
        path: str = EVENTS,
        *,
        version: str | None = None,
        query: str = "",
        headers: Sequence[tuple[str, str]] = (MARK,),
        method: str = "GET",
    ) -> Reply:
        """One request without a body. ``version``: None for the usual one of the endpoint, empty for none."""
        usual = EVENTS_VERSION if path.startswith(EVENTS) else INSTANCE_VERSION
        chosen = usual if version is None else version
        parts = [f"api-version={chosen}"] if chosen else []
        target = path + "?" * bool(parts or query) + "&".join([*parts, *([query] if query else [])])
        return self.send(Ask(method=method, target=target, headers=tuple(headers)))[0]

    def post(
        self,
        body: bytes | str,
        *,
        version: str | None = EVENTS_VERSION,
        headers: Sequence[tuple[str, str]] = (MARK,),
    ) -> Reply:
        """An approval."""
        target = EVENTS + (f"?api-version={version}" if version else "")
        data = body.encode() if isinstance(body, str) else body
        return self.send(Ask(method="POST", target=target, headers=tuple(headers), body=data))[0]

    def document(self, version: str = EVENTS_VERSION) -> Any:
        """The document, None if it is not JSON or not served."""
        reply = self.get(version=version)
        return reply.json() if reply.status == 200 else None

    def seen(self) -> list[Any]:
        """The documents in the order of their arrival, looked at once: the same ones for all checks. JSON only."""
        if self._seen is None:
            self._seen = []
            until = self._clock() + self._watch_s
            while True:
                found = self.document()
                if found is not None:
                    self._seen.append(found)
                if self._clock() >= until:
                    break
                self._sleep(0.25)  # within the real service's limit
        return self._seen

    def events(self) -> list[dict[str, Any]]:
        """Every event of every document seen."""
        return [event for document in self.seen() for event in events_of(document)]


def events_of(document: Any) -> list[dict[str, Any]]:
    """The events of a document that are objects."""
    events = document.get("Events") if isinstance(document, dict) else None
    return [each for each in events if isinstance(each, dict)] if isinstance(events, list) else []


def start_requests(*ids: str, **more: object) -> str:
    """The payload of an approval."""
    return json.dumps({**more, "StartRequests": [{"EventId": each} for each in ids]})
