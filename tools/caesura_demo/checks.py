"""Which rules held: from the bus, the workloads' reports, and the kernel's process states. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import msgspec

from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout
from caesura_ctl.durations import show_pause
from caesura_ctl.fleet_view import FleetView, Pause
from caesura_ctl.memory_proofs import Shown, counted
from caesura_demo.guests import GuestMethod, GuestStatus


class WorkloadStatus(msgspec.Struct, frozen=True):
    """A workload's report about itself."""

    vm: str
    count: int
    polls: int
    poll_errors: int
    approved: list[str]
    gaps_s: list[float]
    digest_checks: int
    digests_ok: bool


class Check(msgspec.Struct, frozen=True):
    """One rule and whether it held."""

    rule: str
    held: bool
    detail: str


def judge(
    fleet_view: FleetView,
    rollout: WholeRollout,
    workloads: Mapping[str, WorkloadStatus],
    patched: Sequence[str],
    still_frozen: Sequence[str],
) -> list[Check]:
    """All rules, in the order in which a rollout meets them."""
    pauses = fleet_view.pauses_of(rollout.rollout)
    expected = {vm for wave in rollout.waves for vm in wave.vms}
    return [
        Check("the rollout completed", rollout.status == "completed", rollout.reason or rollout.status),
        _approvals(fleet_view, rollout, workloads),
        _every_vm(pauses, expected),
        _one_domain_at_a_time(pauses),
        _budget(pauses),
        _patched(patched, {host for wave in rollout.waves for host in wave.hosts}),
        _memory(fleet_view, pauses, workloads, expected),
        _clocks(fleet_view, pauses, rollout.policy.clock_bound_s),
        _events(fleet_view, rollout),
        Check(
            "no VM left paused",
            not still_frozen and not fleet_view.frozen,
            ", ".join([*still_frozen, *fleet_view.frozen]) or f"kernel asked for {len(expected)} VMs",
        ),
    ]


def judge_guests(
    fleet_view: FleetView,
    rollout: WholeRollout,
    guests: Sequence[GuestStatus],
    patched: Sequence[str],
    *,
    method: GuestMethod,
) -> list[Check]:
    """All rules for real guests, in the order in which a rollout meets them."""
    pauses = fleet_view.pauses_of(rollout.rollout)
    expected = {vm for wave in rollout.waves for vm in wave.vms}
    ids = _event_ids(fleet_view, rollout)
    asked = sum(any(each.lower() in ids for each in guest.approved) for guest in guests)
    checks = [
        Check("the rollout completed", rollout.status == "completed", rollout.reason or rollout.status),
        _approved(fleet_view, ids, asked),
        _every_vm(pauses, expected),
        _one_domain_at_a_time(pauses),
        _budget(pauses),
    ]
    if method != "swap":
        checks.append(_patched(patched, {host for wave in rollout.waves for host in wave.hosts}))
    if method != "freeze":
        checks.append(_moved(fleet_view, pauses))
    silent = [guest.vm for guest in guests if not guest.beats]
    back = [guest.vm for guest in guests if guest.steps_back]
    return [
        *checks,
        _guest_memory(fleet_view, pauses),
        _clocks(fleet_view, pauses, rollout.policy.clock_bound_s),
        Check(
            "no guest's monotonic clock went back",
            not back and not silent,
            ", ".join(back) or f"{len(guests)} guests asked",
        ),
        _events(fleet_view, rollout),
        Check(
            "no VM left paused",
            not silent and not fleet_view.frozen,
            ", ".join([*silent, *fleet_view.frozen]) or f"heartbeats of {len(guests)} guests",
        ),
    ]


def _moved(fleet_view: FleetView, pauses: Sequence[Pause]) -> Check:
    details = {
        result.vm: result.detail
        for operation in {each.operation for each in pauses} & fleet_view.reports.keys()
        for result in fleet_view.reports[operation].vms
    }
    moved = [vm for vm, detail in details.items() if detail]
    return Check(
        "every guest runs in a new QEMU process",
        len(moved) == len(pauses) > 0,
        f"{len(moved)}/{len(pauses)} guests" + (f"; {moved[0]}: {details[moved[0]]}" if moved else ""),
    )


def _guest_memory(fleet_view: FleetView, pauses: Sequence[Pause]) -> Check:
    shown = [Shown(pause, fleet_view.clocks) for pause in pauses]
    return Check(
        "memory proven for every guest", bool(shown) and all(each.proven for each in shown), counted(shown)
    )


def _approvals(
    fleet_view: FleetView, rollout: WholeRollout, workloads: Mapping[str, WorkloadStatus]
) -> Check:
    ids = _event_ids(fleet_view, rollout)
    asked = sum(any(each.lower() in ids for each in work.approved) for work in workloads.values())
    return _approved(fleet_view, ids, asked)


def _approved(fleet_view: FleetView, ids: set[str], asked: int) -> Check:
    approved = {
        event_id for event_id in ids if any(each.approved_by for each in _facts(fleet_view, event_id))
    }
    return Check(
        "workloads were warned and approved",
        approved == ids and bool(ids),
        f"{len(approved)}/{len(ids)} events, by {asked} workloads over HTTP",
    )


def _event_ids(fleet_view: FleetView, rollout: WholeRollout) -> set[str]:
    """The ids of the rollout's events, in lower case: those that were announced, and those that its waves name."""
    announced = (name for name, facts in fleet_view.events.items() if facts[0].rollout == rollout.rollout)
    named = (event_id for wave in rollout.waves for event_id in wave.events.values())
    return {each.lower() for each in (*announced, *named)}


def _facts(fleet_view: FleetView, event_id: str) -> list[m.EventChanged]:
    return next((facts for known, facts in fleet_view.events.items() if known.lower() == event_id), [])


def _every_vm(pauses: Sequence[Pause], expected: set[str]) -> Check:
    counts: dict[str, int] = {}
    for pause in pauses:
        counts[pause.vm] = counts.get(pause.vm, 0) + 1
    once = {vm for vm, count in counts.items() if count == 1}
    return Check("every VM paused once", once == expected == set(counts), f"{len(once)}/{len(expected)} VMs")


def overlaps(intervals: Iterable[tuple[str, int, datetime, datetime]]) -> list[str]:
    """Pairs of domains of one set that were paused at once, as text. Intervals are (set, domain, from, to)."""
    found = set()
    rows = sorted(intervals, key=lambda row: row[2])
    for index, (name, domain, _, end) in enumerate(rows):
        for other_name, other_domain, start, _ in rows[index + 1 :]:
            if start >= end:
                break
            if other_name == name and other_domain != domain:
                found.add(f"{name}: domains {min(domain, other_domain)} and {max(domain, other_domain)}")
    return sorted(found)


def _one_domain_at_a_time(pauses: Sequence[Pause]) -> Check:
    known = [
        (each.set, each.update_domain, each.frozen_at, each.resumed_at)
        for each in pauses
        if each.frozen_at is not None
    ]
    clashes = overlaps(known)
    order = dict.fromkeys(
        f"{each.set}/{each.update_domain}"
        for each in sorted(pauses, key=lambda each: each.resumed_at)
        if not each.set.startswith("_")
    )
    complete = len(known) == len(pauses) > 0
    return Check(
        "one update domain of a set at a time",
        complete and not clashes,
        "; ".join(clashes) or (" → ".join(order) if complete else "the start of a pause was not received"),
    )


def _budget(pauses: Sequence[Pause]) -> Check:
    worst = max(pauses, key=lambda each: each.pause_s / each.budget_s, default=None)
    if worst is None:
        return Check("every pause inside its budget", held=False, detail="no pause seen")
    held = all(each.pause_s <= each.budget_s and each.resumed_by == "updater" for each in pauses)
    return Check(
        "every pause inside its budget",
        held,
        f"longest {show_pause(worst.pause_s)} of {worst.budget_s:g}s ({worst.vm})",
    )


def _patched(patched: Sequence[str], hosts: set[str]) -> Check:
    return Check(
        "every host updated once, while its VMs were paused",
        sorted(patched) == sorted(hosts),
        f"{len(patched)}/{len(hosts)} hosts",
    )


def _memory(
    fleet_view: FleetView,
    pauses: Sequence[Pause],
    workloads: Mapping[str, WorkloadStatus],
    expected: set[str],
) -> Check:
    shown = [Shown(pause, fleet_view.clocks) for pause in pauses]
    by_host = sum(each.proven and "digest_equal" in each.held for each in shown)
    by_guest = sum(
        vm in workloads and workloads[vm].digest_checks > 0 and workloads[vm].digests_ok for vm in expected
    )
    return Check(
        "memory proven for every VM",
        by_host == len(pauses) == len(expected) == by_guest,
        f"{counted(shown)}; by the workload itself {by_guest}/{len(expected)}",
    )


def _clocks(fleet_view: FleetView, pauses: Sequence[Pause], bound_s: float) -> Check:
    verdicts = [fleet_view.clocks.get((each.operation, each.vm)) for each in pauses]
    right = [
        each
        for each in verdicts
        if each and each.synced and each.error_after_s is not None and abs(each.error_after_s) <= bound_s
    ]
    worst = max((abs(each.error_after_s or 0.0) for each in right), default=0.0)
    before = max((abs(each.error_before_s or 0.0) for each in right), default=0.0)
    simulated = " (simulated guest clocks)" if any(each.simulated for each in right) else ""
    return Check(
        "clocks corrected",
        len(right) == len(pauses) > 0,
        f"{len(right)}/{len(pauses)} VMs, off by up to {before:.3f} s before, {worst * 1000:.2f} ms after{simulated}",
    )


def _events(fleet_view: FleetView, rollout: WholeRollout) -> Check:
    ids = _event_ids(fleet_view, rollout)
    ends = {
        event_id: [
            each.status
            for each in _facts(fleet_view, event_id)
            if each.status in {"completed", "cancelled", "failed"}
        ]
        for event_id in ids
    }
    held = bool(ids) and all(end == ["completed"] for end in ends.values())
    open_events = sum(len(document.events) for document in fleet_view.documents.values())
    return Check(
        "every event reached exactly one end",
        held and open_events == 0,
        f"{sum(end == ['completed'] for end in ends.values())}/{len(ids)} completed, {open_events} still open",
    )
