"""Which request meets which fault."""

from __future__ import annotations

import json

import pytest

from caesura_rehearse.faults import BadFault, DocumentHistory, Fault, Faults, parse_fault


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500", Fault(kind="status", status=500)),
        ("429 x5", Fault(kind="status", status=429, times=5)),
        ("slow 2.5s x1", Fault(kind="slow", seconds=2.5, times=1)),
        ("drop", Fault(kind="drop")),
        (" stale x2", Fault(kind="stale", times=2)),
        ("empty", Fault(kind="empty")),
    ],
)
def test_words(text: str, expected: Fault) -> None:
    assert parse_fault(text) == expected
    assert parse_fault(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "501", "slow", "slow soon", "drop x0", "drop 3", "stale x-1"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(BadFault, match="is not a fault: 'slow 20s', 410"):
        parse_fault(text)


def test_one_after_the_other() -> None:
    faults = Faults((parse_fault("500 x2"), parse_fault("drop x1"), parse_fault("stale")))
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
