"""The metadata API of one VM, as the publisher serves it, with a witness: what clients asked for and got."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from caesura.bus.port import Bus, Delivery
from caesura.runtime.health import LowLevelHandler, serve_requests
from caesura_metadata_publisher.api_versions import EventsVersion
from caesura_metadata_publisher.http import metadata_handler, refusal
from caesura_metadata_publisher.listeners import Listener
from caesura_metadata_publisher.request import ApproveEvents, HttpResponse, ReadEvents, Request
from caesura_metadata_publisher.service import MetadataPublisher
from caesura_metadata_publisher.settings import MetadataPublisherSettings
from caesura_rehearse.recordings.replay import Replay
from caesura_rehearse.results.observations import Approval, Observations, RefusedRequest
from caesura_rehearse.simulation.faults import STATUS_TEXTS, DocumentHistory, Fault, RequestFaults

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
        elif method == "GET" and _is_for_events(path):
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
        self.replay: Replay | None = None
        """Whose documents are served instead of those of the bus."""

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
        if self.replay is not None and isinstance(request, ReadEvents):
            return self.replay.read(request.if_none_match)
        if not isinstance(request, ApproveEvents):
            return await super().answer(listener, request)
        # Noted before: what follows from an approval may happen before its answer is sent.
        withdraw = self._witness.approved(listener.vm, request.event_ids)
        answer = await super().answer(listener, request)
        if answer.status != 200:
            withdraw()
        elif self.replay is not None:
            self.replay.approved(listener.vm, request.event_ids)
        return answer


@asynccontextmanager
async def serve_vm(
    publisher: MetadataPublisher,
    vm: str,
    listen: str | socket.socket,
    witness: Witness,
    faults: RequestFaults,
) -> AsyncIterator[str]:
    """Serve the metadata API of ``vm`` while the block runs; yields the address.

    Args:
        listen: ``host:port``, or a bound socket.
        faults: of the requests.

    Raises:
        ListenError: the address cannot be opened.
    """
    shown = listen if isinstance(listen, str) else f"{listen.getsockname()[0]}:{listen.getsockname()[1]}"
    handle = metadata_handler(publisher, Listener(vm, shown))
    history = DocumentHistory()

    async def witnessed(request: web.BaseRequest) -> web.StreamResponse:
        fault = faults.next(time.monotonic(), for_document=_is_for_events(request.path))
        response = await (handle(request) if fault is None else _faulty(request, handle, fault, history))
        body = _body_of(response)
        if (
            fault is None
            and response.status == 200
            and request.method == "GET"
            and _is_for_events(request.path)
        ):
            history.served(body)
        witness.answered(vm, request.method, request.path, response.status, body)
        return response

    refuse = refusal(publisher)
    async with serve_requests(witnessed, refuse, listen, shutdown_s=_SHUTDOWN_S) as address:
        yield address


async def _faulty(
    request: web.BaseRequest, handle: LowLevelHandler, fault: Fault, history: DocumentHistory
) -> web.StreamResponse:
    match fault.kind:
        case "slow":
            await asyncio.sleep(fault.seconds)
        case "status":
            error = json.dumps({"error": STATUS_TEXTS[fault.status]}).encode()
            return web.Response(status=fault.status, body=error, content_type="application/json")
        case "drop":
            if request.transport is not None:
                request.transport.abort()
            return web.Response(
                status=499, body=b'{"error": "the connection was dropped"}'
            )  # for the witness alone
        case "stale" | "empty":
            pass
    response = await handle(request)
    if request.method != "GET" or response.status != 200 or fault.kind == "slow":
        return response
    body = _body_of(response)
    other = history.stale(body) if fault.kind == "stale" else history.empty(body)
    return web.Response(status=200, body=other, headers={"Content-Type": "application/json; charset=utf-8"})


def _is_for_events(path: str) -> bool:
    return path.lower().rstrip("/").endswith("/scheduledevents")


def _body_of(response: web.StreamResponse) -> bytes:
    body = response.body if isinstance(response, web.Response) else b""
    return body if isinstance(body, bytes) else b""


def _error_of(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(error)[:300]
