"""What is counted, once, under which labels."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

import pytest

from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.envelope import Header, Message
from caesura.contract.topics import CHANNELS, channel_of
from caesura_metrics_exporter.metrics.counters import PAUSE_BUCKETS, FactCounters
from caesura_metrics_exporter.metrics.series import Counts, Histogram

AT = datetime(2026, 4, 20, 22, 26, 58, tzinfo=UTC)


def received(message: Message, message_id: str = "1", source: str = "/caesura/test") -> Received:
    header = Header(specversion="1.0", id=message_id, source=source, type=type(message).TYPE, time=AT)
    return Received(channel_of(type(message)), {}, header, message)


def resumed(
    pause_s: float = 9.0,
    *,
    operation: str = "op1",
    vm: str = "web-1",
    by: Literal["updater", "guard"] = "updater",
    within: bool = True,
    memory: m.MemoryProof | None = None,
) -> m.VmResumed:
    return m.VmResumed(
        vm=vm,
        host="host-1",
        set="web",
        update_domain=2,
        operation=operation,
        method="freeze",
        pause_s=pause_s,
        budget_s=30,
        within_budget=within,
        resumed_by=by,
        memory=memory,
        at=AT,
    )


def counted(counts: Counts) -> dict[tuple[str, ...], float]:
    return dict(counts.items())


def observed(histogram: Histogram) -> dict[tuple[str, ...], tuple[float, float]]:
    """Label values to (count, sum)."""
    return {labels: (buckets[-1][1], total) for labels, buckets, total in histogram.items()}


PAUSE = ("web", "2", "freeze")


def test_a_pause_is_observed_under_set_domain_and_method() -> None:
    counters = FactCounters()
    counters.take(received(resumed(9.0)))
    assert observed(counters.pauses) == {PAUSE: (1, 9.0)}
    assert counted(counters.overruns) == {PAUSE: 0}
    assert counted(counters.guard_resumes) == {PAUSE: 0}


def test_overruns_and_guard_resumes_are_known_from_zero_for_all_that_a_host_could_pause() -> None:
    # Nearly every overrun is the first with its labels, and may begin and end between two scrapes.
    counters = FactCounters()
    vms = (
        m.VmRecord(vm="web-1", set="web", update_domain=2, state="running", methods=("live", "freeze")),
        m.VmRecord(vm="db-1", set="db", update_domain=0, state="running", methods=("swap", "reboot")),
    )
    counters.take(received(m.HostInventory(host="host-1", driver="process", epoch=1, vms=vms)))
    zeros = {PAUSE: 0.0, ("db", "0", "swap"): 0.0}
    assert counted(counters.overruns) == zeros
    assert counted(counters.guard_resumes) == zeros
    assert observed(counters.pauses) == {}, "a histogram is 18 series"
    counters.forget_host("host-1")
    assert counted(counters.overruns) == zeros, "what happened to the domain stays"
    counters.forget_set("db")
    assert counted(counters.overruns) == {PAUSE: 0.0}


def test_what_ends_a_pause_is_known_from_zero_while_the_vm_stands_still() -> None:
    # Prometheus sees an increase only from a number that it has seen before.
    counters = FactCounters()
    frozen = m.VmFrozen(
        vm="web-1",
        host="host-1",
        set="web",
        update_domain=2,
        operation="op1",
        method="freeze",
        budget_s=30,
        at=AT,
    )
    counters.take(received(frozen))
    assert counted(counters.overruns) == {PAUSE: 0}
    assert counted(counters.guard_resumes) == {PAUSE: 0}
    assert observed(counters.pauses) == {PAUSE: (0, 0.0)}
    counters.take(received(resumed(9.0)))
    assert observed(counters.pauses) == {PAUSE: (1, 9.0)}


def test_an_overrun_and_a_guard_resume_are_counted() -> None:
    counters = FactCounters()
    counters.take(received(resumed(31.0, by="guard", within=False)))
    assert counted(counters.overruns) == {PAUSE: 1}
    assert counted(counters.guard_resumes) == {PAUSE: 1}


def test_the_pause_buckets_run_from_1_ms_to_60_s_with_boundaries_at_budgets() -> None:
    assert (PAUSE_BUCKETS[0], PAUSE_BUCKETS[-1]) == (0.001, 60.0)
    assert set(PAUSE_BUCKETS) >= {1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0}
    assert list(PAUSE_BUCKETS) == sorted(set(PAUSE_BUCKETS))


def test_the_same_message_twice_counts_once() -> None:
    counters = FactCounters()
    approved = m.EventApproved(event_id="e1", set="web", vm="web-1", at=AT)
    assert counters.take(received(approved, "a"))
    assert not counters.take(received(approved, "a"))
    assert counters.take(received(approved, "a", source="/caesura/other"))
    assert counted(counters.approvals) == {("web",): 2}
    assert counted(counters.messages) == {("caesura.event.approved.v1",): 3}
    assert counted(counters.duplicates) == {("caesura.event.approved.v1",): 1}


@pytest.mark.parametrize(
    "fact",
    [
        resumed(),
        m.VmFrozen(
            vm="web-1",
            host="host-1",
            set="web",
            update_domain=2,
            operation="op1",
            method="freeze",
            budget_s=30,
            at=AT,
        ),
        m.VmClockSynced(
            vm="web-1",
            host="host-1",
            set="web",
            update_domain=2,
            operation="op1",
            synced=True,
            by="agent",
            at=AT,
        ),
        m.EventChanged(
            event_id="e1",
            set="web",
            event_type="Freeze",
            status="started",
            resources=("web-1",),
            incarnation=2,
            not_before=AT,
            at=AT,
        ),
        m.OperationReported(operation="op1", host="host-1", epoch=1, status="completed", at=AT),
        m.StartOperation(
            operation="op1",
            epoch=1,
            coordinator="c1",
            host="host-1",
            rollout="r1",
            wave=0,
            method="freeze",
            targets=(m.OperationTarget(vm="web-1", set="web", update_domain=2),),
            budget_s=30,
            not_after=AT,
        ),
    ],
    ids=lambda fact: type(fact).__name__,
)
def test_a_fact_said_again_under_a_new_id_counts_once(fact: Message) -> None:
    counters = FactCounters()
    assert counters.take(received(fact, "a"))
    assert not counters.take(received(fact, "b"))


def test_other_vms_and_other_operations_are_other_facts() -> None:
    counters = FactCounters()
    for operation, vm in (("op1", "web-1"), ("op1", "web-2"), ("op2", "web-1")):
        counters.take(received(resumed(1.0, operation=operation, vm=vm)))
    assert observed(counters.pauses) == {PAUSE: (3, 3.0)}


def test_clock_errors_are_absolute_and_proofs_are_counted() -> None:
    counters = FactCounters()
    synced = m.VmClockSynced(
        vm="web-1",
        host="host-1",
        set="web",
        update_domain=2,
        operation="op1",
        synced=False,
        by="agent",
        error_before_s=-9.0,
        error_after_s=0.25,
        memory=m.MemoryProof(proof="heartbeat", ok=True),
        at=AT,
    )
    counters.take(received(synced))
    assert observed(counters.clock_errors) == {
        ("web", "after"): (1, 0.25),
        ("web", "before"): (1, 9.0),
    }
    assert counted(counters.clock_syncs) == {("web", "2", "agent", "unsynced"): 1}
    counters.take(received(resumed(memory=m.MemoryProof(proof="digest", ok=False))))
    counters.take(received(resumed(operation="op2", memory=m.MemoryProof(proof="none", ok=True))))
    assert counted(counters.memory_proofs) == {
        ("web", "2", "digest_equal", "broken"): 1,
        ("web", "2", "digest_equal", "held"): 0,
        ("web", "2", "not_rebooted", "broken"): 0,
        ("web", "2", "not_rebooted", "held"): 1,
    }


def event(status: m.EventStatus, *, delay_s: float | None = None) -> m.EventChanged:
    return m.EventChanged(
        event_id="e1",
        set="web",
        event_type="Freeze",
        status=status,
        resources=("web-1",),
        incarnation=2,
        not_before=AT,
        notice_s=900.0,
        approval_delay_s=delay_s,
        at=AT,
    )


def test_notice_is_taken_when_scheduled_and_the_approval_delay_once() -> None:
    counters = FactCounters()
    counters.take(received(event("scheduled"), "a"))
    counters.take(received(event("started", delay_s=12.0), "b"))
    counters.take(received(event("completed", delay_s=12.0), "c"))
    assert observed(counters.notice) == {("Freeze",): (1, 900.0)}
    assert observed(counters.approval_delay) == {("Freeze",): (1, 12.0)}
    assert counted(counters.events) == {
        ("web", "Freeze", "completed"): 1,
        ("web", "Freeze", "scheduled"): 1,
        ("web", "Freeze", "started"): 1,
    }


def test_an_operation_with_its_update() -> None:
    counters = FactCounters()
    accepted = m.OperationReported(operation="op1", host="host-1", epoch=1, status="accepted", at=AT)
    outcome = m.UpdateOutcome(update="kernel", outcome="timeout", seconds=20.0)
    failed = m.OperationReported(
        operation="op1", host="host-1", epoch=1, status="failed", update=outcome, overhead_s=0.05, at=AT
    )
    for message in (accepted, failed):
        counters.take(received(message, message.status))
    assert counted(counters.operations) == {("accepted",): 1, ("failed",): 1}
    assert counted(counters.updates) == {("host-1", "kernel", "timeout"): 1}
    assert observed(counters.update_seconds) == {("kernel",): (1, 20.0)}
    assert observed(counters.overhead) == {(): (1, 0.05)}


def test_hooks_readiness_and_waves() -> None:
    counters = FactCounters()
    counters.take(received(m.HookFinished(vm="web-1", hook="prepare", outcome="failed", seconds=2.0), "a"))
    counters.take(received(m.VmReady(vm="web-1", event_id="e1", ready=False), "b"))
    counters.take(
        received(m.WaveChanged(rollout="r1", wave=0, status="started", domains={"web": 2}, at=AT), "c")
    )
    counters.take(received(m.AgentClockSynced(vm="web-1", boot_id="b", trigger="start", synced=True), "d"))
    assert counted(counters.hooks) == {("prepare", "failed"): 1}
    assert observed(counters.hook_seconds) == {("prepare",): (1, 2.0)}
    assert counted(counters.readiness) == {("not_ready",): 1}
    assert counted(counters.waves) == {("started",): 1}
    assert counted(counters.agent_syncs) == {("start", "synced"): 1}


def test_a_host_that_is_gone_takes_its_series_with_it() -> None:
    counters = FactCounters()
    counters.take(received(resumed()))
    for host in ("host-1", "host-2"):
        outcome = m.UpdateOutcome(update="kernel", outcome="failed", seconds=1.0)
        report = m.OperationReported(
            operation="o", host=host, epoch=1, status="failed", update=outcome, at=AT
        )
        counters.take(received(report, host))
    counters.forget_host("host-1")
    assert counted(counters.updates) == {("host-2", "kernel", "failed"): 1}
    assert observed(counters.pauses) == {PAUSE: (1, 9.0)}, "they are the domain's"
    assert counted(counters.operations) == {("failed",): 2}


def test_hosts_times_domains_is_no_label() -> None:
    """They are as many as VMs: no series has both, and no histogram has a host."""
    for each in vars(FactCounters()).values():
        if isinstance(each, Counts | Histogram):
            assert not {"host", "update_domain"} <= set(each.names)
            assert not {"host", "set"} <= set(each.names)
        if isinstance(each, Histogram):
            assert "host" not in each.names


def test_no_label_is_an_event_a_rollout_an_operation_or_a_vm() -> None:
    forbidden = {"event", "event_id", "rollout", "operation", "vm", "wave"}
    series = [each for each in vars(FactCounters()).values() if isinstance(each, Counts | Histogram)]
    assert len(series) > 20
    for each in series:
        assert not forbidden & set(each.names)


def test_every_type_on_the_bus_can_be_taken() -> None:
    # Types without facts are counted as messages all the same.
    assert {channel.message for channel in CHANNELS} >= {m.HostInventory, m.RolloutState}
    counters = FactCounters()
    counters.take(received(m.HostPresence(host="host-1", online=True, instance="i")))
    assert counted(counters.messages) == {("caesura.host.presence.v1",): 1}
