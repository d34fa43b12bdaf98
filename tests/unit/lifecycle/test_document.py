"""The document of a set: incarnations rise, ids stay, ends are final (I6, I7)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from caesura.contract.messages import ScheduledEvent, SetDocument
from caesura.lifecycle import document as d
from caesura.lifecycle.errors import IllegalStatusChange


def _event(event_id: str) -> ScheduledEvent:
    return ScheduledEvent(
        event_id=event_id,
        event_type="Freeze",
        status="scheduled",
        resources=("web-1",),
        not_before=datetime(2026, 4, 20, tzinfo=UTC),
    )


def test_every_change_raises_the_incarnation_and_repetition_does_not() -> None:
    one = d.schedule(d.nothing_yet("web"), _event("A"))
    assert one.incarnation == 1
    assert d.schedule(one, _event("A")) == one
    two = d.start(one, "A")
    assert (two.incarnation, two.events[0].status) == (2, "started")
    assert d.start(two, "A") == two
    three = d.end(two, "A")
    assert (three.incarnation, three.events) == (3, ())
    assert d.end(three, "A") == three


def test_an_approval_is_newer_for_services_and_no_change_for_workloads() -> None:
    one = d.schedule(d.nothing_yet("web"), _event("A"))
    two = d.approve(one, "a")  # ids are compared without case
    assert (two.incarnation, two.revision, two.events[0].approved) == (1, 1, True)
    assert d.version_of(two) > d.version_of(one)
    assert d.approve(two, "A") == two
    assert d.adopt(one, two) is two
    assert d.adopt(two, one) is two
    three = d.start(two, "A")
    assert (three.incarnation, three.revision) == (2, 0)
    assert d.version_of(three) > d.version_of(two)
    above = d.above(one, two)
    assert (above.incarnation, above.revision) == (1, 2), (
        "newer for whoever took the other, the same for workloads"
    )
    assert above.events == one.events


def test_a_host_that_another_coordinator_does_not_name_is_no_change_for_workloads() -> None:
    mine = d.schedule(d.nothing_yet("web"), msgspec.structs.replace(_event("A"), host="h1"))
    theirs = d.schedule(d.nothing_yet("web"), _event("A"))
    above = d.above(mine, theirs)
    assert (above.incarnation, above.revision) == (theirs.incarnation, theirs.revision + 1)
    assert above.events == mine.events


def test_events_that_change_together_change_the_document_once() -> None:
    one = d.schedule(d.nothing_yet("web"), _event("A"), _event("B"), _event("C"))
    assert (one.incarnation, len(one.events)) == (1, 3)
    two = d.start(one, "a", "C")
    assert (two.incarnation, [each.status for each in two.events]) == (2, ["started", "scheduled", "started"])
    three = d.end(two, "A", "B", "never there")
    assert (three.incarnation, [each.event_id for each in three.events]) == (3, ["C"])
    assert d.end(three, "A") is three
    with pytest.raises(IllegalStatusChange):
        d.start(three, "C", "A")
    assert d.schedule(three, *three.events) is three


def test_not_before_moves_later_only_and_of_scheduled_events_only() -> None:
    one = d.start(d.schedule(d.nothing_yet("web"), _event("A"), _event("B")), "B")
    at = one.events[0].not_before
    later = at + timedelta(seconds=60)
    two = d.postpone(one, later, "a", "B")
    assert two.incarnation == one.incarnation + 1, "workloads see it"
    assert [each.not_before for each in two.events] == [later, at]
    assert d.postpone(two, later, "A") is two
    assert d.postpone(two, at, "A") is two, "never earlier"
    assert d.postpone(two, later + timedelta(seconds=1), "C") is two


def test_an_ended_event_cannot_start_and_the_error_names_both_states() -> None:
    with pytest.raises(IllegalStatusChange, match="'ended or unknown' to 'started'"):
        d.start(d.nothing_yet("web"), "A")


def test_an_id_is_never_reused_for_something_else() -> None:
    one = d.start(d.schedule(d.nothing_yet("web"), _event("A")), "A")
    with pytest.raises(IllegalStatusChange, match="'started' to 'scheduled'"):
        d.schedule(one, _event("A"))


def test_a_published_document_that_is_ahead_is_adopted_and_one_behind_is_not() -> None:
    ours = d.schedule(d.nothing_yet("web"), _event("A"))
    ahead = d.end(d.start(ours, "A"), "A")
    assert d.adopt(ours, ahead) is ahead
    assert d.adopt(ahead, ours) is ahead


class Lives(RuleBasedStateMachine):
    """Any order of operations: the incarnation never goes back, an id never returns after its end."""

    open_ids = Bundle("open_ids")

    def __init__(self) -> None:
        super().__init__()
        self.document = d.nothing_yet("web")
        self.ended: set[str] = set()
        self.seen = 0

    @rule(target=open_ids, number=st.integers(0, 10**6))
    def schedule(self, number: int) -> str:
        event_id = f"{number}-{self.seen}"
        self.document = d.schedule(self.document, _event(event_id))
        return event_id

    @rule(event_id=open_ids)
    def approve(self, event_id: str) -> None:
        self.document = d.approve(self.document, event_id)

    @rule(event_id=open_ids)
    def start(self, event_id: str) -> None:
        self.document = d.start(self.document, event_id)

    @rule(event_id=open_ids, minutes=st.integers(-5, 5))
    def postpone(self, event_id: str, minutes: int) -> None:
        before = {each.event_id: each.not_before for each in self.document.events}
        at = datetime(2026, 4, 20, tzinfo=UTC) + timedelta(minutes=minutes)
        self.document = d.postpone(self.document, at, event_id)
        assert all(each.not_before >= before[each.event_id] for each in self.document.events)

    @rule(event_id=consumes(open_ids))
    def end(self, event_id: str) -> None:
        self.document = d.end(self.document, event_id)
        self.ended.add(event_id)

    @invariant()
    def never_back(self) -> None:
        assert self.document.incarnation >= self.seen
        self.seen = self.document.incarnation
        assert not self.ended & {event.event_id for event in self.document.events}


TestLives = Lives.TestCase


@pytest.mark.parametrize(("ours", "theirs", "becomes"), [(9, 5, 9), (5, 5, 6), (4, 5, 6)])
def test_the_leaders_document_stands_above_what_another_published(
    ours: int, theirs: int, becomes: int
) -> None:
    mine = SetDocument(set="web", incarnation=ours, events=(_event("A"),))
    foreign = SetDocument(set="web", incarnation=theirs, events=())
    assert d.above(mine, foreign).incarnation == becomes
    assert d.above(mine, foreign).events == mine.events
    assert d.version_of(d.above(mine, foreign)) > d.version_of(foreign)
