"""What polls are answered from."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from caesura.contract.messages import ScheduledEvent, SetDocument
from caesura_metadata_publisher.api_versions import EVENTS_VERSIONS
from caesura_metadata_publisher.encoded import EncodedDocuments
from caesura_metadata_publisher.polls import KnownPolls, PollAnswer


def document(incarnation: int = 1) -> SetDocument:
    event = ScheduledEvent(
        event_id="c7061bac-afdc-4513-b24b-aa5f13a16123",
        event_type="Freeze",
        status="scheduled",
        resources=("web-1",),
        not_before=datetime(2026, 4, 20, tzinfo=UTC),
    )
    return SetDocument(set="web", incarnation=incarnation, events=(event,))


def test_a_document_is_encoded_once_for_each_change_and_version() -> None:
    encoded = EncodedDocuments()
    one = document()
    newest, oldest = EVENTS_VERSIONS[0], EVENTS_VERSIONS[-1]
    assert encoded.of(one, newest) is encoded.of(one, newest)
    assert encoded.of(one, newest).body != encoded.of(one, oldest).body
    two = document(2)
    assert json.loads(encoded.of(two, newest).body)["DocumentIncarnation"] == 2
    assert encoded.of(two, newest).etag == '"2"'


def request(target: str = "/x", **headers: str) -> Any:
    given = {"Host": "h", "Metadata": "true", **headers}
    return Mock(raw_path=target, headers=given, method="GET", version=(1, 1), keep_alive=True)


def test_clients_that_invent_targets_do_not_fill_the_memory() -> None:
    polls = KnownPolls()
    for number in range(1000):
        polls.accepted(request(f"/x?{number}"), EVENTS_VERSIONS[0])
    assert polls.match(request("/x?5")) is not None
    assert polls.match(request("/x?999")) is None, "it is answered all the same, by the whole way"


@pytest.mark.parametrize("unread", [0, 100_000])
async def test_a_client_that_does_not_read_is_waited_for(unread: int) -> None:
    asked = Mock()
    asked.transport.get_write_buffer_size.return_value = unread
    asked.writer.drain = AsyncMock()
    answer = PollAnswer(200, b"head ", b"body")
    assert (answer.status, answer.body) == (200, b"body"), "a witness around the handler reads them"
    await answer.prepare(asked)
    asked.transport.write.assert_called_once_with(b"head body")
    assert asked.writer.drain.await_count == (1 if unread else 0)


async def test_a_client_that_left_ends_it() -> None:
    with pytest.raises(ConnectionResetError):
        await PollAnswer(200, b"head ", b"body").prepare(Mock(transport=None))
