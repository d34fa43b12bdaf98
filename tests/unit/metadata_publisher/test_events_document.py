"""The events document on the wire, per api-version."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Literal

import jsonschema
import pytest

from caesura.contract.messages import ScheduledEvent, SetDocument
from caesura.lifecycle.document import find_event
from caesura_metadata_publisher.api_versions import EVENTS_VERSIONS, events_version
from caesura_metadata_publisher.events_document import (
    awaits_approval,
    entity_tag,
    unchanged,
    wire_document,
)

# Azure's document as a schema, version 2020-07-01.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["DocumentIncarnation", "Events"],
    "additionalProperties": False,
    "properties": {
        "DocumentIncarnation": {"type": "integer", "minimum": 0},
        "Events": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": [
                    "EventId",
                    "EventStatus",
                    "EventType",
                    "ResourceType",
                    "Resources",
                    "NotBefore",
                    "Description",
                    "EventSource",
                    "DurationInSeconds",
                ],
                "properties": {
                    "EventId": {"pattern": "^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$"},
                    "EventStatus": {"enum": ["Scheduled", "Started"]},
                    "EventType": {"enum": ["Freeze", "Reboot", "Redeploy", "Preempt", "Terminate"]},
                    "ResourceType": {"const": "VirtualMachine"},
                    "Resources": {"type": "array", "minItems": 1, "items": {"type": "string"}},
                    "NotBefore": {
                        "pattern": "^$|^(Mon|Tue|Wed|Thu|Fri|Sat|Sun), [0-9]{2} "
                        "(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) [0-9]{4} "
                        "[0-9]{2}:[0-9]{2}:[0-9]{2} GMT$"
                    },
                    "Description": {"type": "string"},
                    "EventSource": {"enum": ["Platform", "User"]},
                    "DurationInSeconds": {"type": "integer", "minimum": -1},
                },
                "allOf": [
                    {
                        "if": {"properties": {"EventStatus": {"const": "Started"}}},
                        "then": {"properties": {"NotBefore": {"const": ""}}},
                        "else": {"properties": {"NotBefore": {"minLength": 29}}},
                    }
                ],
            },
        },
    },
}

ID = "c7061bac-afdc-4513-b24b-aa5f13a16123"


def event(
    status: Literal["scheduled", "started"] = "scheduled",
    not_before: datetime = datetime(2026, 4, 20, 22, 26, 58, tzinfo=UTC),
    *,
    approved: bool = False,
    event_type: Literal["Freeze", "Reboot"] = "Freeze",
) -> ScheduledEvent:
    return ScheduledEvent(
        event_id=ID,
        event_type=event_type,
        status=status,
        resources=("web-1", "web-2"),
        not_before=not_before,
        description="Host server is undergoing maintenance.",
        duration_s=9,
        approved=approved,
    )


def document(*events: ScheduledEvent, incarnation: int = 2) -> SetDocument:
    return SetDocument(set="web", incarnation=incarnation, events=events)


def wire(document: SetDocument, version: str = "2020-07-01") -> dict[str, Any]:
    known = events_version(version)
    assert known is not None
    decoded = json.loads(wire_document(document, known))
    assert isinstance(decoded, dict)
    return decoded


def test_the_documented_example() -> None:
    assert wire(document(event())) == {
        "DocumentIncarnation": 2,
        "Events": [
            {
                "EventId": ID,
                "EventStatus": "Scheduled",
                "EventType": "Freeze",
                "ResourceType": "VirtualMachine",
                "Resources": ["web-1", "web-2"],
                "NotBefore": "Mon, 20 Apr 2026 22:26:58 GMT",
                "Description": "Host server is undergoing maintenance.",
                "EventSource": "Platform",
                "DurationInSeconds": 9,
            }
        ],
    }


@pytest.mark.parametrize(
    "each", [document(), document(event()), document(event("started"), event(event_type="Reboot"))]
)
def test_it_fits_the_schema(each: SetDocument) -> None:
    jsonschema.validate(wire(each), SCHEMA)


def test_no_events_are_an_empty_array() -> None:
    assert wire(document(incarnation=7)) == {"DocumentIncarnation": 7, "Events": []}


def test_not_before_is_blank_once_started() -> None:
    assert wire(document(event("started")))["Events"][0]["NotBefore"] == ""


def test_not_before_is_in_gmt_and_never_later_than_the_real_instant() -> None:
    paris = timezone(timedelta(hours=2))
    when = datetime(2026, 4, 21, 0, 26, 58, 999_999, tzinfo=paris)
    assert wire(document(event(not_before=when)))["Events"][0]["NotBefore"] == "Mon, 20 Apr 2026 22:26:58 GMT"


@pytest.mark.parametrize(
    ("version", "absent"),
    [
        ("2020-07-01", set()),
        ("2019-08-01", {"DurationInSeconds"}),
        ("2019-04-01", {"DurationInSeconds", "EventSource"}),
        ("2019-01-01", {"DurationInSeconds", "EventSource", "Description"}),
        ("2017-11-01", {"DurationInSeconds", "EventSource", "Description"}),
        ("2017-08-01", {"DurationInSeconds", "EventSource", "Description"}),
        ("2017-03-01", {"DurationInSeconds", "EventSource", "Description"}),
    ],
)
def test_older_versions_lack_the_newer_members(version: str, absent: set[str]) -> None:
    newest = set(wire(document(event()))["Events"][0])
    assert set(wire(document(event()), version)["Events"][0]) == newest - absent


def test_the_preview_version_has_underscores_before_names() -> None:
    assert wire(document(event()), "2017-03-01")["Events"][0]["Resources"] == ["_web-1", "_web-2"]


def test_every_version_shows_the_types_we_schedule() -> None:
    both = document(event(), event(event_type="Reboot"))
    for each in EVENTS_VERSIONS:
        assert [e["EventType"] for e in wire(both, each.version)["Events"]] == ["Freeze", "Reboot"]


@pytest.mark.parametrize(
    ("if_none_match", "same"),
    [
        ('"2"', True),
        ('W/"2"', True),
        ('"1", "2"', True),
        ("*", True),
        ('"1"', False),
        ("2", True),
        ("", False),
    ],
)
def test_if_none_match(if_none_match: str, *, same: bool) -> None:
    assert unchanged(if_none_match, entity_tag(document())) is same


def test_an_event_is_found_whatever_the_case_of_its_id() -> None:
    assert find_event(document(event()), ID.upper()) == event()
    assert find_event(document(event()), "f020ba2e-3bc0-4c40-a10b-86575a9eabd5") is None


def test_only_a_scheduled_event_that_nobody_approved_awaits_approval() -> None:
    assert awaits_approval(event())
    assert not awaits_approval(event(approved=True))
    assert not awaits_approval(event("started"))
    assert not awaits_approval(None)
