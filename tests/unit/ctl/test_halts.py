"""Which halts are resumed without a person: each reason comes from the code that makes it, not from this file."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from caesura.contract import messages as m
from caesura.contract.reasons import KNOWN
from caesura.fleet.state import FleetState
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura.lifecycle.proof import memory_proof
from caesura_coordinator.authority import Authority
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.inputs import Approve, DocumentSuperseded, Input, Tick
from caesura_coordinator.plan import make_plan
from caesura_coordinator.records import Rollout, Wave, new_rollout
from caesura_coordinator.rollout import decide
from caesura_demo.halts import is_transient
from caesura_host_updater.command_admission import Host, Refuse, evaluate_start
from caesura_host_updater.epoch_authority import EpochAuthority
from caesura_host_updater.inventory.updates import Catalogue
from caesura_host_updater.operation.crash_outcome import recovered
from caesura_host_updater.operation.inputs import (
    AbortReceived,
    Armed,
    Disarmed,
    Event,
    GuardLost,
    ResumeEnded,
    Start,
    UpdateEnded,
    VmFroze,
    VmNotFrozen,
)
from caesura_host_updater.operation.machine import decide as decide_pause
from caesura_host_updater.operation.report import final_report
from caesura_host_updater.operation.state import Operation, UpdateRun, VmPause
from caesura_testing.refold import refold
from caesura_vmcontrol.intent import GuardAction, Intent, Intervention

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)
_AUTHORITY = Authority(coordinator="c", epoch=1)
_POLICY = m.Policy(notice_s=10.0, budget_s=15.0, soak_s=2.0, verify_timeout_s=20.0)
_PATCH = m.UpdateRecord(
    update="patch", version="1", impact="pause", scope="host", expected_s=2.0, timeout_s=9.0
)


def _fleet() -> FleetLookup:
    vm = m.VmRecord(
        vm="web-1",
        set="web",
        update_domain=0,
        state="running",
        methods=("live", "freeze"),
        clock="simulated",
        proofs={"freeze": ("digest_equal",)},
    )
    inventory = m.HostInventory(
        host="host-1",
        driver="process",
        epoch=1,
        coordinator="c",
        vms=(vm,),
        updates=(_PATCH,),
        guard="ready",
        commands=COMMANDS,
    )
    return FleetLookup(refold(FleetState(), inventory, _host(online=True), _agent(online=True)))


def _host(*, online: bool) -> m.HostPresence:
    return m.HostPresence(host="host-1", online=online, instance="i")


def _agent(*, online: bool) -> m.AgentPresence:
    return m.AgentPresence(vm="web-1", online=online, boot_id="b")


class Story:
    """One host with one VM, and a rollout that goes as far as a test lets it."""

    def __init__(self, **changes: object) -> None:
        self.fleet = _fleet()
        self.now = T0
        policy = msgspec.structs.replace(_POLICY, **changes)
        plan = make_plan(self.fleet.snapshot(), update="patch", selection=m.Selection(), policy=policy)
        self.rollout: Rollout = new_rollout(
            "r", plan, policy=policy, fence_hosts=("host-1",), requested_by="rollout", now=T0
        )

    def give(self, received: Input, after_s: float = 0.0) -> Story:
        self.now += timedelta(seconds=after_s)
        self.rollout, _ = decide(self.rollout, received, self.fleet, _AUTHORITY, self.now)
        return self

    def waits(self, seconds: float = 30.0) -> Story:
        return self.give(Tick()).give(Tick(), seconds).give(Tick(), seconds)

    @property
    def wave(self) -> Wave:
        wave = self.rollout.current
        assert wave is not None
        return wave

    def changed(self, **changes: object) -> Story:
        inventory = msgspec.structs.replace(self.fleet.inventories["host-1"], **changes)
        self.fleet = FleetLookup(refold(self.fleet.state, inventory))
        return self

    def announced(self) -> Story:
        return self.give(Tick())

    def answered(self, *, ready: bool = True) -> Story:
        event = self.wave.events[0].event_id
        self.give(m.VmReady(vm="web-1", event_id=event, ready=ready, reason="" if ready else "disk is full"))
        return self.give(Approve(event_id=event, by="web-1"))

    def started(self) -> Story:
        return self.announced().answered().give(Tick())

    def reported(
        self,
        status: m.OperationStatus = "completed",
        reason: str = "",
        codes: tuple[str, ...] = (),
        **result: object,
    ) -> Story:
        values = {"state": "running", "frozen": True, "pause_s": 2.0, "resumed_by": "updater", **result}
        vm = m.VmResult(vm="web-1", set="web", update_domain=0, **values)  # type: ignore[arg-type]
        return self.give(
            m.OperationReported(
                operation=self.wave.operations[0].operation,
                host="host-1",
                epoch=1,
                status=status,
                reason=reason,
                codes=codes,
                vms=(vm,),
                at=self.now,
            )
        )

    def clock(
        self,
        *,
        synced: bool = True,
        error_s: float = 0.001,
        memory: bool = True,
        proof: m.MemoryProof | None = None,
    ) -> Story:
        return self.give(
            m.VmClockSynced(
                vm="web-1",
                host="host-1",
                set="web",
                update_domain=0,
                operation=self.wave.operations[0].operation,
                synced=synced,
                by="agent" if synced else "nobody",
                error_after_s=error_s,
                memory=proof or m.MemoryProof(proof="heartbeat", ok=memory),
                reason="" if synced else "no answer; the agent is silent",
                at=self.now,
            )
        )

    def halted(self) -> tuple[str, ...]:
        assert self.rollout.status == "halted", self.rollout
        assert self.rollout.codes == self.rollout.waves[self.wave.index].codes
        assert KNOWN.issuperset(self.rollout.codes)
        return self.rollout.codes


def _without_host(story: Story) -> Story:
    story.fleet = FleetLookup(refold(story.fleet.state, _host(online=False)))
    return story


def _without_agent(story: Story) -> Story:
    story.fleet = FleetLookup(refold(story.fleet.state, _agent(online=False)))
    return story


_AWAY: dict[str, Callable[[], Story]] = {
    "host offline before": lambda: _without_host(Story()).waits(),
    "agent offline before": lambda: _without_agent(Story()).waits(),
    "no guard": lambda: Story().changed(guard="absent").waits(),
    "epoch not acknowledged": lambda: Story().changed(epoch=0).waits(),
    "host gone after the notice": lambda: _without_host(Story().announced()).answered().waits(),
    "agent silent": lambda: Story().announced().waits(),
    "not verified: host offline": lambda: _without_host(Story().started().reported()).clock().waits(),
    "not verified: agent offline": lambda: _without_agent(Story().started().reported()).clock().waits(),
    "agent gone in the soak": lambda: _without_agent(Story().started().reported().clock()).waits(),
}

_FOUND: dict[str, Callable[[], Story]] = {
    "another is obeyed": lambda: Story().changed(epoch=7).waits(),
    "an epoch is refused": lambda: (
        Story().changed(epoch=0, refused_epoch="no coordinator can have it").waits()
    ),
    "memory changed": lambda: (
        Story().started().reported(memory=m.MemoryProof(proof="digest", ok=False, detail="a is not b"))
    ),
    "another guest": lambda: Story().started().reported().clock(memory=False),
    "unproven": lambda: Story(on_unproven="halt").started().reported().clock(),
    "canary": lambda: (
        Story().started().reported().clock(proof=memory_proof((), ["canary_equal"], "canary differs: a; b"))
    ),
    "over budget": lambda: Story().started().reported(pause_s=40.8),
    "unsynced": lambda: Story().started().reported().clock(synced=False),
    "clock off": lambda: Story().started().reported().clock(error_s=-0.5),
    "no verdict on the clock": lambda: Story().started().reported().waits(),
    "VM paused after the resume": lambda: Story().started().reported(state="paused"),
    "VM is gone": lambda: Story().changed(vms=()).waits(),
    "lost": lambda: Story().started().waits(60.0),
    "not ready": lambda: Story().announced().answered(ready=False),
    "busy": lambda: Story().changed(operation="of somebody else").waits(),
    "another coordinator": lambda: (
        Story().announced().give(DocumentSuperseded(set="web", open_events=frozenset()))
    ),
    "agent offline, and a finding": lambda: _without_agent(
        Story().started().reported().clock(synced=False)
    ).waits(),
    "agent offline, and no verdict": lambda: _without_agent(Story().started().reported()).waits(),
}


@pytest.mark.parametrize("name", list(_AWAY))
def test_what_was_away_is_resumed(name: str) -> None:
    codes = _AWAY[name]().halted()
    assert is_transient(codes), codes


@pytest.mark.parametrize("name", list(_FOUND))
def test_what_was_found_is_for_a_person(name: str) -> None:
    codes = _FOUND[name]().halted()
    assert not is_transient(codes), codes


@pytest.mark.parametrize("codes", [(), ("something_new",), ("host_offline", "something_new")])
def test_what_is_unknown_is_for_a_person(codes: tuple[str, ...]) -> None:
    assert not is_transient(codes)


def test_a_host_that_gives_no_codes_is_for_a_person() -> None:
    """One of an older version: its words are for people."""
    codes = Story().started().reported("failed", "the host updater is stopping").halted()
    assert codes == ("unexplained",)
    assert not is_transient(codes)


# -- what hosts say --


def _operation(**vm: Any) -> Operation:
    pause = VmPause(vm="web-1", set="web", update_domain=0, **vm)
    return Operation(
        operation="o", method="freeze", budget_s=15.0, update="patch", runs=(UpdateRun(),), vms=(pause,)
    )


def _machine(*events: tuple[float, Event]) -> Operation:
    """The host's pause machine, begun at 100 s and fed with these, with the seconds at which they come."""
    op = _operation()
    for now, event in ((100.0, Start()), *events):
        op, _ = decide_pause(op, event, now)
    return op


def _recovered(catch: Intervention | None = None, *, same_boot: bool = True, **vm: Any) -> Operation:
    """The operation of an updater that died, as its next start finds it."""
    fired = None if catch is None else GuardAction("the host updater died", 101.0, {"web-1": catch})
    record = Intent("o", "boot", 100.0, 109.0, (), fired)
    return recovered(_operation(**vm), record, {}, same_boot=same_boot)


_FROZEN = (
    (100.1, Armed()),
    (100.2, VmFroze("web-1", 100.1, 100.2)),
)
_RESUMED = ((104.0, ResumeEnded("web-1", 104.0, "running")), (104.1, Disarmed()))
_ENDED_BY_SIGNAL = UpdateEnded("", "failed", -15, 1.0, "")

_ENDS: dict[str, tuple[bool, Callable[[], Operation]]] = {
    "stopped before": (
        True,
        lambda: _machine(
            (100.05, AbortReceived("host_stopping", "the host updater is stopping")),
            *_FROZEN[:1],
            *_RESUMED,
        ),
    ),
    "stopped in the pause": (
        True,
        lambda: _machine(
            *_FROZEN,
            (101.0, AbortReceived("host_stopping", "the host updater is stopping")),
            (101.5, _ENDED_BY_SIGNAL),
            *_RESUMED,
        ),
    ),
    "guard died while it was armed": (
        True,
        lambda: _machine((100.05, GuardLost()), *_FROZEN[:1], *_RESUMED),
    ),
    "guard died in the pause": (
        True,
        lambda: _machine(*_FROZEN, (101.0, GuardLost()), (101.5, _ENDED_BY_SIGNAL), *_RESUMED),
    ),
    "updater died before": (True, _recovered),
    "updater died in the pause, the guard resumed": (
        True,
        lambda: _recovered(Intervention(True, None, 103.0, "running"), called_at=100.5, frozen_at=100.6),
    ),
    "updater died after the resume": (
        True,
        lambda: _recovered(called_at=100.5, frozen_at=100.6, resumed_at=102.0, resumed_by="updater"),
    ),
    "the machine was started anew": (True, lambda: _recovered(same_boot=False)),
    "the update failed": (
        False,
        lambda: _machine(*_FROZEN, (101.0, UpdateEnded("", "failed", 3, 1.0, "")), *_RESUMED),
    ),
    "aborted by a person": (
        False,
        lambda: _machine(
            *_FROZEN,
            (101.0, AbortReceived("aborted", "wrong update")),
            (101.5, _ENDED_BY_SIGNAL),
            *_RESUMED,
        ),
    ),
    "not frozen": (
        False,
        lambda: _machine(*_FROZEN[:1], (100.2, VmNotFrozen("web-1", 100.1, "it did not stop")), *_RESUMED),
    ),
    "over budget, the guard resumed": (
        False,
        lambda: _recovered(Intervention(True, None, 140.0, "running"), called_at=100.5, frozen_at=100.6),
    ),
}


@pytest.mark.parametrize("name", list(_ENDS))
def test_how_a_host_ended_is_resumed_only_if_it_was_away(name: str) -> None:
    away, ended = _ENDS[name]
    op = ended()
    assert op.end in {"failed", "cancelled"}, op
    report = final_report("host-1", _command(), op, 1, {"web-1": "running"}, T0)
    assert report.status in {"failed", "cancelled"}
    codes = Story().started().reported(report.status, report.reason, report.codes).halted()
    assert codes == report.codes
    assert is_transient(codes) is away, codes


def _command() -> m.StartOperation:
    return m.StartOperation(
        operation="o",
        epoch=1,
        coordinator="c",
        host="host-1",
        rollout="r",
        wave=0,
        method="freeze",
        targets=(m.OperationTarget(vm="web-1", set="web", update_domain=0),),
        update="patch",
        budget_s=15.0,
        not_after=T0,
    )


@pytest.mark.parametrize(
    ("changes", "late_s", "away"),
    [
        ({}, 3.0, True),
        ({"stopping": True}, 0.0, True),
        ({"busy": "of another"}, 0.0, False),
        ({}, 0.0, False),
    ],
    ids=["too late", "stopping", "busy", "no such VM"],
)
def test_what_a_host_refused_is_resumed_only_if_it_was_away(
    changes: dict[str, Any], late_s: float, *, away: bool
) -> None:
    host = Host(host="host-1", vms={}, catalogue=Catalogue({}), **changes)
    verdict = evaluate_start(
        _command(),
        host=host,
        authority=EpochAuthority(1, "c"),
        known=None,
        now=T0 + timedelta(seconds=late_s),
    )
    assert isinstance(verdict, Refuse)
    codes = Story().started().reported("refused", verdict.why, (verdict.code,)).halted()
    assert codes == (verdict.code,)
    assert is_transient(codes) is away, codes
