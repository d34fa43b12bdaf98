"""The metadata API of one VM, as the publisher serves it, with a witness: what clients asked for and got."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from caesura.bus.port import Bus, Delivery
from caesura.runtime.health import serve_requests
from caesura_metadata_publisher.api_versions import EventsVersion
from caesura_metadata_publisher.http import metadata_handler, refusal
from caesura_metadata_publisher.listeners import Listener
from caesura_metadata_publisher.request import ApproveEvents, HttpResponse, Request
from caesura_metadata_publisher.service import MetadataPublisher
from caesura_metadata_publisher.settings import MetadataPublisherSettings
from caesura_rehearse.observations import Approval, Observations, RefusedRequest

_SHUTDOWN_S = 0.2  # s: nothing that is in flight at the end of a rehearsal matters


class Witness:
    """Writes down what clients asked for and got.

    Args:
        observations: where.
        began: the instant (CLOCK_MONOTONIC, seconds) that counts as zero.
        changed: called after each note.
    """

    def __init__(self, observations: Observations, began: float, changed: Callable[[], None]) -> None:
        self._observations = observations
        self._began = began
        self.changed = changed

    def answered(self, vm: str, method: str, path: str, status: int, body: bytes) -> None:
        """A request was answered."""
        at = time.monotonic() - self._began
        if status >= 400:
            refusal = RefusedRequest(
                at=at, vm=vm, method=method, path=path, status=status, why=_error_of(body)
            )
            self._observations.refusals.append(refusal)
        elif method == "GET" and path.lower().rstrip("/").endswith("/scheduledevents"):
            self._observations.polls[vm] = self._observations.polls.get(vm, 0) + 1
            if status == 200:
                self._observations.delivered(vm, body, at)
        self.changed()

    def approved(self, vm: str, event_ids: tuple[str, ...]) -> Callable[[], None]:
        """Events are approved; returns what takes the note back."""
        at = time.monotonic() - self._began
        notes = [Approval(at=at, vm=vm, event_id=each) for each in event_ids]
        self._observations.approvals += notes
        self.changed()

        def withdraw() -> None:
            kept = [each for each in self._observations.approvals if not any(each is note for note in notes)]
            self._observations.approvals[:] = kept

        return withdraw


class WitnessedPublisher(MetadataPublisher):
    """The metadata publisher, whose accepted approvals are written down: also those that change nothing."""

    def __init__(self, settings: MetadataPublisherSettings, bus: Bus, witness: Witness) -> None:
        super().__init__(settings, bus)
        self._witness = witness

    async def run_bus(self) -> None:
        """As in the publisher; what is waited for is looked at after each message."""

        async def deliver(delivery: Delivery) -> None:
            await self._post.deliver(delivery)
            self._witness.changed()

        await self._bus.run(deliver, self.publish_state)

    def polled(self, vm: str, version: EventsVersion) -> None:
        """No short way for polls: every answer passes the witness."""

    async def answer(self, listener: Listener, request: Request) -> HttpResponse:
        """As in the publisher."""
        if not isinstance(request, ApproveEvents):
            return await super().answer(listener, request)
        # Noted before: what follows from an approval may happen before its answer is sent.
        withdraw = self._witness.approved(listener.vm, request.event_ids)
        answer = await super().answer(listener, request)
        if answer.status != 200:
            withdraw()
        return answer


@asynccontextmanager
async def serve_vm(
    publisher: MetadataPublisher, vm: str, listen: str | socket.socket, witness: Witness
) -> AsyncIterator[str]:
    """Serve the metadata API of ``vm`` while the block runs; yields the address.

    Args:
        listen: ``host:port``, or a bound socket.

    Raises:
        ListenError: the address cannot be opened.
    """
    shown = listen if isinstance(listen, str) else f"{listen.getsockname()[0]}:{listen.getsockname()[1]}"
    handle = metadata_handler(publisher, Listener(vm, shown))

    async def witnessed(request: web.BaseRequest) -> web.StreamResponse:
        response = await handle(request)
        body = (
            response.body if isinstance(response, web.Response) and isinstance(response.body, bytes) else b""
        )
        witness.answered(vm, request.method, request.path, response.status, body)
        return response

    refuse = refusal(publisher)
    async with serve_requests(witnessed, refuse, listen, shutdown_s=_SHUTDOWN_S) as address:
        yield address


def _error_of(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(error)[:300]
