"""Messages of another version, on any topic: one clear line, all are counted, what follows is received, nothing is repeated for ever."""

from __future__ import annotations

import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.bus.port import Delivery
from caesura.bus.refusal_log import RefusalLog
from caesura.contract import messages as m
from caesura.contract.codec import Malformed, decode
from caesura.contract.generated import golden_payload
from caesura.contract.topics import CHANNELS

_TOPIC = "caesura/v1/host/host-1/operation"
_GOOD = json.loads(golden_payload([channel.message for channel in CHANNELS].index(m.OperationReported)))


def _event(**data: Any) -> bytes:
    return json.dumps({**_GOOD, "data": {**_GOOD["data"], **data}}).encode()


_FROM_LATER: dict[str, tuple[str, bytes, str, str]] = {
    "a type": (
        _TOPIC,
        json.dumps({**_GOOD, "type": "caesura.operation.ended.v1"}).encode(),
        "unknown_type",
        "ended",
    ),
    "a value of a closed vocabulary": (_TOPIC, _event(status="suspended"), "malformed", "suspended"),
    "another type of a member": (_TOPIC, _event(wave="first"), "malformed", "wave"),
    "a topic": ("caesura/v1/host/host-1/moon", _event(), "unknown_topic", "topic table"),
    "a command of before": ("caesura/v1/fleet/host/host-1/freeze", _event(), "unknown_topic", "topic table"),
}


class Service:
    """A service that receives reports."""

    def __init__(self) -> None:
        self.post = MessageClient(MemoryBus(MemoryBroker(), client_id="a"), "/caesura/test")
        self.received: list[m.OperationReported] = []
        self.post.subscribe(m.OperationReported, self._take)

    async def _take(self, report: m.OperationReported, _: object) -> None:
        self.received.append(report)

    async def deliver(self, topic: str, payload: bytes) -> None:
        await self.post.deliver(Delivery(topic, payload))


@pytest.mark.parametrize("what", _FROM_LATER)
async def test_what_cannot_be_read_is_said_once_and_counted_each_time(what: str) -> None:
    topic, payload, kind, words = _FROM_LATER[what]
    service = Service()
    with capture_logs() as logs:
        for _ in range(500):
            await service.deliver(topic, payload)
        await service.deliver(_TOPIC, _event())
    (line,) = logs
    assert line["event"] == "bus.message_refused"
    assert (line["topic"], line["kind"], line["log_level"]) == (topic, kind, "warning")
    assert words in line["why"]
    assert service.post.decode_errors[kind] == 500
    assert len(service.received) == 1, "what follows is received"


async def test_what_is_another_fault_has_a_line_of_its_own() -> None:
    service = Service()
    with capture_logs() as logs:
        for number in range(3):
            await service.deliver(_TOPIC, _event(status=f"later-{number}"))
            await service.deliver(_TOPIC, _event(wave=f"later-{number}"))
            await service.deliver("caesura/v1/host/host-2/operation", _event(host="host-2", status="later"))
    assert len(logs) == 3
    assert {line["topic"].split("/")[3] for line in logs} == {"host-1", "host-2"}


def test_what_is_still_refused_after_a_while_is_said_again_with_a_count() -> None:
    now = [0.0]
    refused = RefusalLog(lambda: now[0])
    error = Malformed(_TOPIC, "data of no shape")
    with capture_logs() as logs:
        for _ in range(5):
            refused.say(_TOPIC, error)
        now[0] += 3600.0
        refused.say(_TOPIC, error)
    assert [line["left_out"] for line in logs] == [0, 4]


def test_members_and_reason_codes_of_a_later_version_are_no_fault() -> None:
    report = decode(_TOPIC, _event(codes=["moon_in_the_way"], mood="good")).message
    assert isinstance(report, m.OperationReported)
    assert report.codes == ("moon_in_the_way",)
