"""Rules about events: their members by version, and their life as far as it was watched."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from caesura_metadata_conformance.probe import Probe, events_of
from caesura_metadata_conformance.rule import RuleBook, expect, need

EVENTS = RuleBook("E", "events")
_DOC = "scheduled-events.md"
_NO_EVENT = "there is no event: order one, and run this with --watch"

_GUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_RFC_1123 = re.compile(
    r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), [0-9]{2} (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) [0-9]{4} "
    r"[0-9]{2}:[0-9]{2}:[0-9]{2} GMT"
)
_MEMBERS = (
    "EventId",
    "EventStatus",
    "EventType",
    "ResourceType",
    "Resources",
    "NotBefore",
    "Description",
    "EventSource",
    "DurationInSeconds",
)
_HIDDEN_FROM = {"Preempt": "2017-08-01", "Terminate": "2017-11-01"}
"""The newest api-version that does not know the type."""


def _each(
    member: str,
    holds: Callable[[Any], bool],
    only: Callable[[dict[str, Any]], bool] = lambda _: True,
    lacking: str = _NO_EVENT,
) -> Callable[[Probe], None]:
    def check(probe: Probe) -> None:
        events = [event for event in probe.events() if only(event)]
        need(events, lacking)
        for event in events:
            value = event.get(member)
            expect(holds(value), f"{member} is {value!r:.100} of event {event.get('EventId')!r}")

    return check


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) and each for each in value)


EVENTS.add(
    "EventId is a GUID", _DOC, _each("EventId", lambda v: isinstance(v, str) and bool(_GUID.fullmatch(v)))
)
EVENTS.add(
    "EventStatus is Scheduled or Started", _DOC, _each("EventStatus", lambda v: v in ("Scheduled", "Started"))
)
EVENTS.add(
    "EventType is a documented one",
    _DOC,
    _each("EventType", lambda v: v in ("Freeze", "Reboot", "Redeploy", "Preempt", "Terminate")),
)
EVENTS.add("ResourceType is VirtualMachine", _DOC, _each("ResourceType", lambda v: v == "VirtualMachine"))
EVENTS.add("Resources is a list of names, not empty", _DOC, _each("Resources", _words))
EVENTS.add(
    "NotBefore is RFC 1123 in GMT while Scheduled",
    _DOC,
    _each(
        "NotBefore",
        lambda v: isinstance(v, str) and bool(_RFC_1123.fullmatch(v)),
        lambda event: event.get("EventStatus") == "Scheduled",
        "no event was seen Scheduled",
    ),
)
EVENTS.add(
    "NotBefore is an empty string once Started",
    _DOC,
    _each(
        "NotBefore",
        lambda v: v == "",
        lambda event: event.get("EventStatus") == "Started",
        "no event was seen Started",
    ),
)
EVENTS.add("Description is a string", _DOC, _each("Description", lambda v: isinstance(v, str)))
EVENTS.add("EventSource is Platform or User", _DOC, _each("EventSource", lambda v: v in ("Platform", "User")))
EVENTS.add(
    "DurationInSeconds is a number, -1 or more",
    "Go clients decode into int",
    _each("DurationInSeconds", lambda v: _integer(v) and v >= -1),
)


@EVENTS.rule("An event has the nine documented members and no other", _DOC)
def _members(probe: Probe) -> None:
    events = probe.events()
    need(events, _NO_EVENT)
    for event in events:
        expect(set(event) == set(_MEMBERS), f"differs in {sorted(set(event) ^ set(_MEMBERS))}")


def _absent(member: str, version: str) -> Callable[[Probe], None]:
    def check(probe: Probe) -> None:
        events = events_of(probe.document(version))
        need(events, _NO_EVENT)
        for event in events:
            expect(member not in event, f"{member} is there with {version}")
            expect("EventId" in event, f"EventId is missing with {version}")

    return check


for _member, _before in (
    ("DurationInSeconds", "2019-08-01"),
    ("EventSource", "2019-04-01"),
    ("Description", "2019-01-01"),
):
    EVENTS.add(f"api-version {_before} has no {_member} yet", _DOC, _absent(_member, _before))


@EVENTS.rule("api-version 2017-03-01 has a leading underscore in Resources, later ones have none", _DOC)
def _underscore(probe: Probe) -> None:
    new, old = probe.document(), probe.document("2017-03-01")
    known = {event.get("EventId"): event.get("Resources") for event in events_of(new)}
    both = [
        (event.get("Resources"), known[event.get("EventId")])
        for event in events_of(old)
        if event.get("EventId") in known
    ]
    need(both, _NO_EVENT)
    for underscored, plain in both:
        expect(_words(underscored) and _words(plain), f"{underscored!r:.100} and {plain!r:.100}")
        expect(
            underscored == [f"_{name}" for name in plain or ()],
            f"{underscored!r:.100} instead of _ before {plain!r:.100}",
        )


@EVENTS.rule("Preempt and Terminate are hidden from api-versions before them", _DOC)
def _later_types(probe: Probe) -> None:
    found = [each for each in events_of(probe.document()) if each.get("EventType") in _HIDDEN_FROM]
    need(found, "there is no event of such a type")
    for event in found:
        version = _HIDDEN_FROM[event["EventType"]]
        ids = {each.get("EventId") for each in events_of(probe.document(version))}
        expect(event.get("EventId") not in ids, f"{event['EventType']} is shown with {version}")


# -- life, as watched -------------------------------------------------------------------------------------------


def _incarnations(probe: Probe) -> list[tuple[int, Any]]:
    return [
        (each["DocumentIncarnation"], each.get("Events"))
        for each in probe.seen()
        if isinstance(each, dict) and _integer(each.get("DocumentIncarnation"))
    ]


def _changes(probe: Probe) -> list[tuple[Any, Any]]:
    """Documents that came one after the other with other events."""
    seen = probe.seen()
    return [(before, after) for before, after in pairwise(seen) if events_of(before) != events_of(after)]


_NO_CHANGE = "the document did not change while it was watched: order an event, and run this with --watch"


@EVENTS.rule("The same incarnation has the same events", _DOC)
def _same(probe: Probe) -> None:
    seen = _incarnations(probe)
    need(len(seen) > 1, "it was looked at only once: use --watch")
    first: dict[int, Any] = {}
    for incarnation, events in seen:
        expect(first.setdefault(incarnation, events) == events, f"incarnation {incarnation} had two contents")


@EVENTS.rule("The incarnation rises with every change", _DOC)
def _rises(probe: Probe) -> None:
    changes = _changes(probe)
    need(changes, _NO_CHANGE)
    for before, after in changes:
        numbers = before.get("DocumentIncarnation"), after.get("DocumentIncarnation")
        expect(all(map(_integer, numbers)) and numbers[1] > numbers[0], f"{numbers[0]} became {numbers[1]}")


@EVENTS.rule("The incarnation never goes back", "azure-events-az keeps the last one across restarts")
def _never_back(probe: Probe) -> None:
    numbers = [number for number, _ in _incarnations(probe)]
    need(len(numbers) > 1, "it was looked at only once: use --watch")
    for before, after in pairwise(numbers):
        expect(after >= before, f"{before} became {after}")


def _lives(probe: Probe) -> dict[str, list[dict[str, Any]]]:
    lives: dict[str, list[dict[str, Any]]] = {}
    for event in probe.events():
        lives.setdefault(str(event.get("EventId")).lower(), []).append(event)
    return lives


@EVENTS.rule(
    "An event keeps its EventId when it starts", "Event Grid's text; every client that waits for its event"
)
def _keeps_id(probe: Probe) -> None:
    changes = _changes(probe)
    need(
        any(life[0].get("EventStatus") == "Scheduled" for life in _lives(probe).values()),
        "no event was seen Scheduled",
    )
    started = False
    for before, after in changes:
        old = {str(each.get("EventId")).lower(): each for each in events_of(before)}
        new = {str(each.get("EventId")).lower(): each for each in events_of(after)}
        for event_id, event in new.items():
            if event.get("EventStatus") != "Started":
                continue
            started |= event_id in old and old[event_id].get("EventStatus") == "Scheduled"
            if event_id in old:
                continue
            replaced = [
                each
                for gone, each in old.items()
                if gone not in new
                and each.get("EventStatus") == "Scheduled"
                and (each.get("EventType"), each.get("Resources"))
                == (event.get("EventType"), event.get("Resources"))
            ]
            expect(
                not replaced,
                f"{replaced and replaced[0].get('EventId')} came back Started as {event.get('EventId')}",
            )
    need(started, "no event was seen to start")


@EVENTS.rule("NotBefore does not change while an event is Scheduled", "tests of Microsoft's mock server")
def _fixed(probe: Probe) -> None:
    lives = [
        [each for each in life if each.get("EventStatus") == "Scheduled"] for life in _lives(probe).values()
    ]
    need(any(len(life) > 1 for life in lives), "no event was seen Scheduled twice: use --watch")
    for life in lives:
        times = {str(each.get("NotBefore")) for each in life}
        expect(len(times) <= 1, f"it was {', '.join(sorted(times))}")


@EVENTS.rule("An event that started is never Scheduled again", "scheduled-events-overview.md")
def _one_way(probe: Probe) -> None:
    lives = _lives(probe).values()
    need(
        any(each.get("EventStatus") == "Started" for life in lives for each in life),
        "no event was seen Started",
    )
    for life in lives:
        states = [each.get("EventStatus") for each in life]
        if "Started" in states:
            expect(
                "Scheduled" not in states[states.index("Started") :],
                f"event {life[0].get('EventId')} went back",
            )
