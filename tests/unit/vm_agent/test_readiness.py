"""Which events are prepared, what is answered, what is recovered from."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from typing import Literal

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from caesura.contract.messages import HookFinished, ScheduledEvent, SetDocument, VmReady
from caesura_vm_agent.readiness import (
    Announce,
    Effect,
    Prepare,
    ReadinessState,
    Recover,
    announcements,
    answer_of,
    on_document,
    on_prepared,
    on_resumed,
)


def event(
    event_id: str = "e1",
    status: Literal["scheduled", "started"] = "scheduled",
    resources: tuple[str, ...] = ("web-1",),
) -> ScheduledEvent:
    return ScheduledEvent(
        event_id=event_id,
        event_type="Freeze",
        status=status,
        resources=resources,
        not_before=datetime(2026, 4, 20, 22, 26, 58, tzinfo=UTC),
    )


def document(incarnation: int, *events: ScheduledEvent) -> SetDocument:
    return SetDocument(set="web", incarnation=incarnation, events=events)


READY = VmReady(vm="web-1", event_id="e1", ready=True)
FRESH = ReadinessState(vm="web-1")


def prepared() -> ReadinessState:
    state, _ = on_document(FRESH, document(1, event()))
    state, _ = on_prepared(state, "e1", READY)
    return state


def test_an_event_that_names_this_vm_is_prepared_once() -> None:
    state, effects = on_document(FRESH, document(1, event()))
    assert effects == [Prepare(event())]
    assert on_document(state, document(1, event())) == (state, [])
    _, later = on_document(state, document(2, event(status="started")))
    assert later == []


def test_an_event_first_seen_as_started_is_prepared_too() -> None:
    _, effects = on_document(FRESH, document(1, event(status="started")))
    assert [type(effect) for effect in effects] == [Prepare]


def test_an_event_of_other_vms_is_not_ours() -> None:
    _, effects = on_document(FRESH, document(1, event(resources=("web-2", "web-11"))))
    assert effects == []


def test_the_answer_is_announced_and_repeated_while_scheduled() -> None:
    state, _ = on_document(FRESH, document(1, event()))
    assert announcements(state, scheduled_only=False) == []  # the hook still runs
    state, effects = on_prepared(state, "e1", READY)
    assert effects == [Announce(READY)]
    assert announcements(state, scheduled_only=True) == [Announce(READY)]
    state, _ = on_document(state, document(2, event(status="started")))
    assert announcements(state, scheduled_only=True) == []
    assert announcements(state, scheduled_only=False) == [Announce(READY)]  # after a reconnect
    state, _ = on_document(state, document(3))
    assert announcements(state, scheduled_only=False) == []


def test_a_late_older_document_changes_nothing() -> None:
    state, _ = on_document(prepared(), document(5))
    assert on_document(state, document(4, event("e9"))) == (state, [])


def test_a_late_duplicate_of_a_closed_event_does_not_start_the_hook_again() -> None:
    state, _ = on_document(prepared(), document(2))
    _, effects = on_document(state, document(3, event()))
    assert effects == []


def test_a_cancelled_event_is_recovered_from_without_a_pause() -> None:
    _, effects = on_document(prepared(), document(2))
    assert effects == [Recover("e1", "", 0.0)]


def test_an_event_cancelled_while_its_hook_runs_is_recovered_from_when_it_ends() -> None:
    state, _ = on_document(FRESH, document(1, event()))
    state, effects = on_document(state, document(2))
    assert effects == []
    _, effects = on_prepared(state, "e1", READY)
    assert effects == [Recover("e1")]


def test_a_pause_during_the_prepare_hook_is_recovered_from_once() -> None:
    state, _ = on_document(FRESH, document(1, event(status="started")))
    state, effects = on_resumed(state, "op1", "e1", 9.0)
    assert effects == [Recover("e1", "op1", 9.0)]
    state, effects = on_document(state, document(2))
    assert effects == []
    assert on_prepared(state, "e1", READY)[1] == []


def test_a_pause_is_recovered_from_once_and_the_events_end_adds_nothing() -> None:
    state, effects = on_resumed(prepared(), "op1", "e1", 9.0)
    assert effects == [Recover("e1", "op1", 9.0)]
    assert on_resumed(state, "op1", "e1", 9.0) == (state, [])
    _, effects = on_document(state, document(3))
    assert effects == []


def test_a_second_pause_of_the_same_event_is_recovered_from_too() -> None:
    state, _ = on_resumed(prepared(), "op1", "e1", 9.0)
    _, effects = on_resumed(state, "op2", "e1", 1.0)
    assert effects == [Recover("e1", "op2", 1.0)]


def test_a_resume_that_arrives_after_the_event_ended_does_not_recover_again() -> None:
    state, _ = on_document(prepared(), document(2))
    _, effects = on_resumed(state, "op1", "e1", 9.0)
    assert effects == []


@pytest.mark.parametrize(
    ("outcome", "exit_code", "tail", "words"),
    [
        ("failed", 3, "draining\nno quorum\n", "exit code 3: no quorum"),
        ("timeout", None, "", "did not end within its time"),
        ("missing", None, "cannot start '/no'", "could not be started: cannot start '/no'"),
    ],
)
def test_a_hook_that_did_not_succeed_is_not_ready_with_the_reason(
    outcome: Literal["failed", "timeout", "missing"], exit_code: int | None, tail: str, words: str
) -> None:
    hook = HookFinished(
        vm="web-1", hook="prepare", event_id="e1", outcome=outcome, exit_code=exit_code, output_tail=tail
    )
    answer = answer_of("web-1", "e1", hook)
    assert not answer.ready
    assert words in answer.reason


def test_no_hook_and_a_good_hook_mean_ready() -> None:
    good = HookFinished(vm="web-1", hook="prepare", event_id="e1", outcome="succeeded", exit_code=0)
    assert answer_of("web-1", "e1", None).ready
    assert answer_of("web-1", "e1", good).ready


def _at(event_id: str, minute: int, status: Literal["scheduled", "started"] = "scheduled") -> ScheduledEvent:
    not_before = datetime(2026, 4, 20, 22, minute, tzinfo=UTC)
    return msgspec.structs.replace(event(event_id, status), not_before=not_before)


def test_of_two_events_the_later_one_is_prepared_for_when_the_other_is_gone() -> None:
    """The recovery from the first would undo what was prepared for the second."""
    first, second = _at("e1", 10), _at("e2", 30)
    state, effects = on_document(FRESH, document(1, second, first))
    assert effects == [Prepare(first)]
    state, effects = on_prepared(state, "e1", READY)
    assert effects == [Announce(READY)]
    state, effects = on_document(state, document(2, second, _at("e1", 10, "started")))
    assert effects == []
    state, effects = on_document(state, document(3, second))
    assert effects == [Recover("e1"), Prepare(second)]


def test_an_event_that_another_one_overtakes_is_prepared_for_again() -> None:
    """A rollout that is resumed announces its event after one that waits behind it."""
    waiting, resumed = _at("e1", 50), _at("e2", 10)
    state, _ = on_document(FRESH, document(1, waiting))
    state, _ = on_prepared(state, "e1", READY)
    state, effects = on_document(state, document(2, waiting, resumed))
    assert effects == [Prepare(resumed)]
    assert announcements(state, scheduled_only=True) == [], "it is not ready for e1 any more"
    state, _ = on_prepared(state, "e2", VmReady(vm="web-1", event_id="e2", ready=True))
    state, effects = on_document(state, document(3, waiting))
    assert effects == [Recover("e2"), Prepare(waiting)]


def test_a_hook_that_runs_when_its_event_vanishes_is_recovered_from_before_the_next_is_prepared_for() -> None:
    first, second = _at("e1", 10), _at("e2", 30)
    state, _ = on_document(FRESH, document(1, first, second))
    state, effects = on_document(state, document(2, second))
    assert effects == [], "its hook runs"
    state, effects = on_prepared(state, "e1", READY)
    assert effects == [Recover("e1"), Prepare(second)]


class AnyOrder(RuleBasedStateMachine):
    """Documents, hook ends and resumes in any order, any of them repeated; an event that has ended does not come back."""

    def __init__(self) -> None:
        super().__init__()
        self.state = FRESH
        self.hooks: list[tuple[str, str]] = []
        """Prepare hooks in the order in which they begin, and recoveries: the worker runs one after the other."""
        self.running: str | None = None
        self.recovers: list[tuple[str, str]] = []
        self.answered: set[str] = set()
        self.ended: set[str] = set()
        self.incarnation = 0

    def perform(self, decided: tuple[ReadinessState, list[Effect]]) -> None:
        self.state, effects = decided
        for effect in effects:
            match effect:
                case Prepare(each):
                    assert self.running is None, "one hook at a time"
                    assert each.event_id == next(iter(self.state.open)), "the next event"
                    self.running = each.event_id
                    self.hooks.append(("prepare", each.event_id))
                case Recover(event_id, operation):
                    self.recovers.append((event_id, operation))
                    self.hooks.append(("recover", event_id))
                case Announce(ready):
                    assert ready.event_id in self.answered

    @rule(ids=st.lists(st.sampled_from("abcd"), unique=True), started=st.booleans(), behind=st.integers(0, 2))
    def document_arrives(self, ids: list[str], *, started: bool, behind: int) -> None:
        self.incarnation += 1
        events = [
            msgspec.structs.replace(
                event(each, "started" if started and not turn else "scheduled"),
                not_before=datetime(2026, 4, 20, 22, turn, tzinfo=UTC),
            )
            for turn, each in enumerate(each for each in ids if each not in self.ended)
        ]
        before = set(self.state.open)
        self.perform(on_document(self.state, document(self.incarnation - behind, *events)))
        self.ended |= before - set(self.state.open)

    @rule(ready=st.booleans())
    def hook_ends(self, *, ready: bool) -> None:
        if self.running is not None:
            ended, self.running = self.running, None
            self.answered.add(ended)
            self.perform(on_prepared(self.state, ended, VmReady(vm="web-1", event_id=ended, ready=ready)))

    @rule(operation=st.sampled_from(["op1", "op2", "op3"]), event_id=st.sampled_from(["a", "b", ""]))
    def resumed(self, operation: str, event_id: str) -> None:
        self.perform(on_resumed(self.state, operation, event_id, 1.0))

    @invariant()
    def an_event_is_prepared_again_only_after_something_else(self) -> None:
        """Otherwise what a hook did would be done twice."""
        assert not any(one == two for one, two in pairwise(self.hooks) if one[0] == "prepare")

    @invariant()
    def what_is_repeated_is_still_true(self) -> None:
        for each in announcements(self.state, scheduled_only=True):
            last = max(at for at, hook in enumerate(self.hooks) if hook == ("prepare", each.ready.event_id))
            after = [event_id for hook, event_id in self.hooks[last + 1 :] if hook == "recover"]
            by_pause = {event_id for event_id, operation in self.recovers if operation}
            assert set(after) <= by_pause | {each.ready.event_id}, (
                "recovered since then: not prepared any more"
            )

    @invariant()
    def every_pause_is_recovered_from_at_most_once(self) -> None:
        paused = [operation for _, operation in self.recovers if operation]
        unpaused = [event_id for event_id, operation in self.recovers if not operation]
        assert len(paused) == len(set(paused))
        assert len(unpaused) == len(set(unpaused))

    @invariant()
    def nothing_stays_prepared_without_an_event(self) -> None:
        if not self.state.open and self.running is None and self.hooks:
            paused = {event_id for event_id, operation in self.recovers if operation}
            assert self.hooks[-1][0] == "recover" or self.hooks[-1][1] in paused


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
