"""A metadata server without a socket, faithful by the publisher's own pure modules; and what makes it wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

import msgspec

from caesura.contract.messages import ScheduledEvent, SetDocument, VmRecord
from caesura.fleet.state import LocatedVm
from caesura_metadata_conformance.exchange import Ask, NoAnswer, Reply
from caesura_metadata_publisher.api_versions import INSTANCE_VERSIONS
from caesura_metadata_publisher.events_document import entity_tag, unchanged, wire_document
from caesura_metadata_publisher.instance import answer_instance
from caesura_metadata_publisher.instance_fields import InstanceLocation, instance_tree
from caesura_metadata_publisher.request import (
    ApproveEvents,
    HttpResponse,
    ReadEvents,
    ReadInstance,
    bad_request,
    not_http,
    parse,
)

ONE, TWO = "c7061bac-afdc-4513-b24b-aa5f13a16123", "f020ba2e-3bc0-4c40-a10b-86575a9eabd5"
NOT_BEFORE = datetime(2026, 4, 20, 22, 26, 58, tzinfo=UTC)

Change = Callable[[dict[str, Any], str], None]
"""Changes a document that is shown; the second argument is its api-version."""
Answering = Callable[[Ask, Reply], Reply]


def event(
    event_id: str = ONE,
    status: Literal["scheduled", "started"] = "scheduled",
    event_type: Literal["Freeze", "Preempt"] = "Freeze",
) -> ScheduledEvent:
    return ScheduledEvent(
        event_id=event_id,
        event_type=event_type,
        status=status,
        resources=("web-1", "web-2"),
        not_before=NOT_BEFORE + timedelta(minutes=event_id == TWO),
        duration_s=9,
    )


LIFE = (
    SetDocument(set="web", incarnation=3, events=()),
    SetDocument(set="web", incarnation=4, events=(event(),)),
    SetDocument(set="web", incarnation=4, events=(event(),)),
    SetDocument(set="web", incarnation=5, events=(event(status="started"),)),
    SetDocument(set="web", incarnation=6, events=(event(status="started"), event(TWO, event_type="Preempt"))),
)
"""What a watcher sees, one after the other; the last one stays."""


class PlayedServer:
    """A transport to a server that shows ``LIFE``. ``sleep`` is its clock: each shows the next document."""

    def __init__(
        self,
        life: Sequence[SetDocument] = LIFE,
        *,
        changed: Change | None = None,
        answering: Answering | None = None,
        down: bool = False,
    ) -> None:
        self._life = life
        self._at = 0
        self._changed = changed
        self._answering = answering
        self._down = down
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._at = min(self._at + 1, len(self._life) - 1)

    def exchange(self, asks: Sequence[Ask]) -> list[Reply]:
        if self._down:
            raise NoAnswer("refused")
        replies = [self._reply(ask) for ask in asks]
        if self._answering is None:
            return replies
        return [self._answering(ask, reply) for ask, reply in zip(asks, replies, strict=True)]

    def _reply(self, ask: Ask) -> Reply:
        parts = urlsplit(ask.target)
        query = parse_qsl(parts.query, keep_blank_values=True)
        headers = {name.lower(): value for name, value in ask.headers}
        answer = self._answer(ask, parts.path, query, headers)
        kind = {"content-type": answer.content_type} if answer.body else {}
        closing = {"connection": "close"} if headers.get("connection") == "close" else {}
        sent = {name.lower(): value for name, value in answer.headers.items()}
        return Reply(status=answer.status, headers={**kind, **closing, **sent}, body=answer.body)

    def _answer(
        self, ask: Ask, path: str, query: list[tuple[str, str]], headers: dict[str, str]
    ) -> HttpResponse:
        if ask.raw:
            return not_http("Bad status line")
        if headers.get("host") == "-":
            return bad_request("The Host header is missing.")
        parsed = parse(ask.method, path, query, headers, ask.body)
        document = self._life[self._at]
        match parsed:
            case HttpResponse():
                return parsed
            case ReadEvents():
                tag = entity_tag(document)
                if parsed.if_none_match and unchanged(parsed.if_none_match, tag):
                    return HttpResponse(status=304, headers={"ETag": tag})
                body = wire_document(document, parsed.version)
                if self._changed is not None:
                    shown = json.loads(body)
                    self._changed(shown, parsed.version.version)
                    body = json.dumps(shown).encode()
                return HttpResponse(status=200, body=body, headers={"ETag": tag})
            case ApproveEvents():
                return HttpResponse(status=200)
            case ReadInstance():
                record = VmRecord(vm="web-1", set="web", update_domain=0, state="running")
                tree = instance_tree(LocatedVm("host-1", record), None, parsed.version, InstanceLocation())
                return answer_instance(tree, parsed.path, parsed.format)
            case _:
                body = msgspec.json.encode({"apiVersions": sorted(INSTANCE_VERSIONS)})
                return HttpResponse(status=200, body=body)
