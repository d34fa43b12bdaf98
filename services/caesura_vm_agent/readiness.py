"""Which scheduled events need preparing, what was answered, what must be recovered from. Pure.

An event that names this VM is prepared once (per run of the agent), however often its document arrives;
the answer is repeated while the event is open. A prepared event that vanishes without a pause (cancelled,
failed) is recovered from too: a workload that was drained must not stay drained.

Of several open events that name this VM only the next one is prepared for: the recovery from one would undo what was prepared for another.
The others have their turn when it is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from caesura.contract.messages import HookFinished, ScheduledEvent, SetDocument, VmReady

_KEEP = 256  # finished events and operations remembered, to recognize a late duplicate


class Prepare(msgspec.Struct, frozen=True):
    """Run the prepare hook for this event, then report whether the guest is ready."""

    event: ScheduledEvent


class Recover(msgspec.Struct, frozen=True):
    """Run the recover hook. ``operation`` is empty when the event ended without a pause."""

    event_id: str
    operation: str = ""
    pause_s: float = 0.0


class Announce(msgspec.Struct, frozen=True):
    """Publish what was answered, for the first time or again."""

    ready: VmReady


Effect = Prepare | Recover | Announce


class ReadinessState(msgspec.Struct, frozen=True, kw_only=True):
    """What this agent knows about its events."""

    vm: str
    incarnation: int = -1
    """Of the newest document seen; older ones are late and change nothing."""
    open: Mapping[str, ScheduledEvent] = {}
    """The open events that name this VM, the next one first."""
    answers: Mapping[str, VmReady | None] = {}
    """Event id to the answer; None while the prepare hook runs."""
    recovered: tuple[str, ...] = ()
    """Events that were recovered from, the newest last."""
    operations: tuple[str, ...] = ()
    """Operations whose resume was handled, the newest last."""


def on_document(state: ReadinessState, document: SetDocument) -> tuple[ReadinessState, list[Effect]]:
    """A document of the set arrived, new, repeated or late."""
    if document.incarnation < state.incarnation:
        return state, []
    effects: list[Effect] = []
    mine = sorted((each for each in document.events if state.vm in each.resources), key=_turn)
    open_now = {each.event_id: each for each in mine}
    answers = dict(state.answers)
    recovered = state.recovered
    for event_id in state.open:
        # While its hook still runs the recovery waits: on_prepared returns it.
        if event_id not in open_now and answers.get(event_id) is not None and event_id not in recovered:
            effects.append(Recover(event_id))
            recovered = (*recovered, event_id)[-_KEEP:]
    for later in mine[1:]:
        if answers.get(later.event_id) is not None and later.status == "scheduled":
            del answers[later.event_id]  # another one comes first after all: it is prepared for again then
    changed = msgspec.structs.replace(
        state,
        incarnation=document.incarnation,
        open=open_now,
        answers=_trimmed(answers, open_now),
        recovered=recovered,
    )
    return _prepare_next(changed, effects)


def on_prepared(state: ReadinessState, event_id: str, answer: VmReady) -> tuple[ReadinessState, list[Effect]]:
    """The prepare hook of an event ended (or there is none) with this answer."""
    event = state.open.get(event_id)
    if event is not None and event.status == "scheduled" and event_id != next(iter(state.open)):
        # Another one comes first after all: it is prepared for again when that is gone.
        others = {name: known for name, known in state.answers.items() if name != event_id}
        return _prepare_next(msgspec.structs.replace(state, answers=others), [])
    state = msgspec.structs.replace(state, answers={**state.answers, event_id: answer})
    if event is not None:
        return state, [Announce(answer)]
    effects: list[Effect] = []
    if event_id not in state.recovered:
        recovered = (*state.recovered, event_id)[-_KEEP:]
        state, effects = msgspec.structs.replace(state, recovered=recovered), [Recover(event_id)]
    return _prepare_next(state, effects)


def _prepare_next(state: ReadinessState, effects: list[Effect]) -> tuple[ReadinessState, list[Effect]]:
    """Prepare for the next event unless that was done; after a hook that runs, and after its recovery."""
    event = next(iter(state.open.values()), None)
    if event is None or event.event_id in state.answers or None in state.answers.values():
        return state, effects
    asked = msgspec.structs.replace(state, answers={**state.answers, event.event_id: None})
    return asked, [*effects, Prepare(event)]


def on_resumed(
    state: ReadinessState, operation: str, event_id: str, pause_s: float
) -> tuple[ReadinessState, list[Effect]]:
    """This VM runs again after ``operation``; a repeated message gives no effect."""
    if operation in state.operations:
        return state, []
    operations = (*state.operations, operation)[-_KEEP:]
    if event_id and event_id in state.recovered and event_id not in state.open:
        # The event ended and was recovered from before this (late) message came.
        return msgspec.structs.replace(state, operations=operations), []
    recovered = (*state.recovered, event_id)[-_KEEP:] if event_id else state.recovered
    changed = msgspec.structs.replace(state, operations=operations, recovered=recovered)
    return changed, [Recover(event_id, operation, pause_s)]


def _turn(event: ScheduledEvent) -> tuple[bool, datetime]:
    return event.status != "started", event.not_before


def announcements(state: ReadinessState, *, scheduled_only: bool) -> list[Announce]:
    """The answers to repeat: of scheduled events on every beat, of started ones after a reconnect too."""
    return [
        Announce(answer)
        for event_id, event in state.open.items()
        if (answer := state.answers.get(event_id)) is not None
        and (event.status == "scheduled" or not scheduled_only)
    ]


def answer_of(vm: str, event_id: str, hook: HookFinished | None) -> VmReady:
    """What a prepare hook's end means; no hook at all means ready."""
    if hook is None or hook.outcome == "succeeded":
        return VmReady(vm=vm, event_id=event_id, ready=True)
    tail = hook.output_tail.strip()
    last = f": {tail.splitlines()[-1][:500]}" if tail else ""
    match hook.outcome:
        case "timeout":
            why = f"prepare hook did not end within its time ({hook.seconds:.1f} s)"
        case "missing":
            why = "prepare hook could not be started"
        case _:
            why = f"prepare hook ended with exit code {hook.exit_code}"
    return VmReady(vm=vm, event_id=event_id, ready=False, reason=why + last)


def _trimmed(
    answers: Mapping[str, VmReady | None], open_now: Mapping[str, object]
) -> dict[str, VmReady | None]:
    # Answers of closed events are kept for a while: a late duplicate must not start the hook again.
    closed = [event_id for event_id, answer in answers.items() if event_id not in open_now and answer]
    forgotten = set(closed[:-_KEEP])
    return {event_id: answer for event_id, answer in answers.items() if event_id not in forgotten}
