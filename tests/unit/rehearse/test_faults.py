"""Which request meets which fault."""

from __future__ import annotations

import json

import pytest

from caesura_rehearse.simulation.faults import (
    BadFault,
    DocumentHistory,
    Fault,
    FaultQueue,
    RequestFaults,
    parse_fault,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500", Fault(kind="status", status=500)),
        ("429 x5", Fault(kind="status", status=429, times=5)),
        ("slow 2.5s x1", Fault(kind="slow", seconds=2.5, times=1)),
        ("drop", Fault(kind="drop")),
        (" stale x2", Fault(kind="stale", times=2)),
        ("empty", Fault(kind="empty")),
        ("slow 2m", Fault(kind="slow", seconds=120.0)),
        ("rate", Fault(kind="rate")),
        ("gap", Fault(kind="gap")),
        ("vanish x1", Fault(kind="vanish", times=1)),
        ("neighbour", Fault(kind="neighbour")),
        ("moved 30s", Fault(kind="moved", seconds=30.0)),
        ("moved -30s x2", Fault(kind="moved", seconds=-30.0, times=2)),
        ("app-2: 500 x3", Fault(kind="status", status=500, times=3, vm="app-2")),
    ],
)
def test_words(text: str, expected: Fault) -> None:
    assert parse_fault(text) == expected
    assert parse_fault(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "501", "slow", "slow soon", "drop x0", "drop 3", "stale x-1", "moved", "slow -2s", "app-2:"]
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(BadFault, match="is not a fault: 'slow 20s', 410"):
        parse_fault(text)


@pytest.mark.parametrize(
    ("text", "says"), [("rate x3", "does not hit a number"), ("app-1: gap", "name no VM")]
)
def test_words_that_do_not_go_together(text: str, says: str) -> None:
    with pytest.raises(BadFault, match=says):
        parse_fault(text)


def test_what_happens_to_events() -> None:
    assert [parse_fault(each).of_events for each in ("vanish", "gap", "500", "rate")] == [
        True,
        True,
        False,
        False,
    ]


def test_more_than_five_requests_a_second_meet_the_rate_limit() -> None:
    faults = RequestFaults()
    faults.add(parse_fault("rate"))
    faults.add(parse_fault("stale x1"))
    met = [faults.next(100.0, for_document=False) for _ in range(5)] + [faults.next(100.5, for_document=True)]
    assert met == [None] * 5 + [Fault(kind="status", status=429)]
    assert faults.next(101.0, for_document=True) == parse_fault("stale x1"), "beside the limit"
    faults.clear()
    assert [faults.next(101.0, for_document=True) for _ in range(9)] == [None] * 9


def test_one_after_the_other() -> None:
    faults = FaultQueue()
    for each in ("500 x2", "drop x1", "stale"):
        faults.add(parse_fault(each))
    met = [fault.kind if (fault := faults.next()) else "" for _ in range(5)]
    assert met == ["status", "status", "drop", "stale", "stale"]
    faults.clear()
    assert faults.next() is None
    faults.add(parse_fault("empty x1"))
    assert [bool(faults.next()) for _ in range(2)] == [True, False]


def test_older_and_empty_documents() -> None:
    history = DocumentHistory()
    first, second, third = (b'{"DocumentIncarnation":%d,"Events":[1]}' % n for n in (1, 2, 3))
    assert history.stale(first) == first, "there is none before"
    history.served(first)
    history.served(second)
    history.served(second)
    assert history.stale(second) == first
    assert history.stale(third) == second, "a client that has not asked for the newest yet"
    assert json.loads(history.empty(second)) == {"DocumentIncarnation": 2, "Events": []}
