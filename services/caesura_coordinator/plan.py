"""Which VMs are handled together, with which method and why, and what blocks the plan. Pure.

The rule that shapes every plan: a wave pauses VMs of only one domain of an availability set (I1).
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import msgspec

from caesura.contract.messages import (
    MOST_TARGETS,
    Limits,
    Plan,
    Policy,
    Refusal,
    Selection,
)
from caesura_coordinator.fleet_snapshot import FleetSnapshot
from caesura_coordinator.plan_kernel import expected_jump_s, kernel_refusals
from caesura_coordinator.plan_members import (
    all_passed,
    canary_refusals,
    host_refusals,
    members_of_plan,
    passed_over,
    selected_hosts,
    split_hosts,
)
from caesura_coordinator.plan_update import (
    HOLD,
    definition,
    expected_pause_s,
    outside_pause_s,
    slowest,
    update_limits,
)
from caesura_coordinator.plan_waves import most_hosts, waves

_WAVE_OVERHEAD_S = 2.0  # s: commands, resumes and clock-sync around a pause, for the estimate only
_NO_LIMITS = Limits()
_MOST_HINTS = 3
_MOST_UNKNOWN = 20


def make_plan(
    fleet: FleetSnapshot,
    *,
    update: str,
    selection: Selection,
    policy: Policy,
    limits: Limits = _NO_LIMITS,
    hold_s: float = 0.0,
) -> Plan:
    """Plan a rollout of ``update`` (or, with ``hold_s`` above zero, a freeze on demand).

    Every refusal names the obstacle; a plan with refusals must not be started. A plan with neither waves nor
    refusals has nothing to do: everything selected already has the update.
    """
    refusals = [*_unknown_names(fleet, selection, limits), *_contested_vms(fleet, selection)]
    record, update_refusals = (HOLD, []) if hold_s else definition(fleet, update, selection)
    refusals += update_refusals
    if record is None or refusals:
        return Plan(update=update, refusals=tuple(refusals), hold_s=hold_s)
    hosts = selected_hosts(fleet, record, selection, hold_s=hold_s)
    if not hold_s:
        record = slowest(fleet, record, hosts)
    expected_s = hold_s or record.expected_s
    refusals += update_limits(record, policy, expected_s)
    if record.scope == "host" and selection.vms:
        refusals.append(
            Refusal(
                subject=record.update,
                code="selection_too_narrow",
                reason="a host-scope update pauses every VM of a host: select hosts or sets, not single VMs",
            )
        )
    passed = passed_over(fleet, hosts, record, limits)
    acting = [host for host in hosts if not all_passed(fleet, host, passed)]
    refusals += host_refusals(fleet, acting)
    refusals += kernel_refusals(fleet, acting, record, policy)
    jump_s = expected_jump_s(fleet, acting, record)
    members, skipped, member_refusals = members_of_plan(
        fleet, hosts, record, selection, policy, passed, hold_s=hold_s
    )
    refusals += member_refusals
    # The fence checks every host of these sets before a pause: what would block there is reported now.
    others = sorted(fleet.hosts_of({each.vm.set for each in members}) - set(hosts))
    refusals += (
        msgspec.structs.replace(each, reason=f"{each.reason}: it holds VMs of the same sets")
        for each in host_refusals(fleet, others)
    )
    if record.scope == "host":
        refusals += split_hosts(members, policy.domain_key)
    refusals += canary_refusals(members, skipped, limits)
    if not members and not refusals and not any(each.skip == "installed" for each in skipped):
        refusals.append(
            Refusal(
                subject=update or "hold",
                code="nothing_selected",
                reason="nothing selected has a running VM to act on",
            )
        )
    planned = () if refusals else tuple(waves(members, by_host=record.scope == "host", limits=limits))
    wave_s = (
        (policy.notice_s if record.impact != "none" else 0.0)
        + expected_s
        + jump_s
        + _WAVE_OVERHEAD_S
        + policy.soak_s
    )
    return Plan(
        update=update,
        event_type="Reboot" if record.impact == "reboot" else "Freeze",
        waves=planned,
        skipped=tuple(skipped),
        refusals=tuple(refusals),
        estimate_s=round(len(planned) * wave_s, 3),
        expected_pause_s=expected_pause_s(record, expected_s, jump_s),
        outside_pause_s=outside_pause_s(record),
        hold_s=hold_s,
        scope=record.scope,
        max_hosts=most_hosts(members, limits),
        max_hosts_by_default=not limits.max_hosts and most_hosts(members, limits) > 0,
    )


def nothing_to_do(plan: Plan) -> str:
    """Why a plan without refusals has no waves; empty if it has some, or was refused."""
    if plan.waves or plan.refusals:
        return ""
    return (
        f"nothing to do: everything selected already has {plan.update or 'it'}, or is skipped for the reasons in the plan; "
        "--again applies it again"
    )


def sets_of(plan: Plan) -> tuple[str, ...]:
    """Every set that the plan touches, each once, in order of first touch."""
    return tuple(dict.fromkeys(vm.set for wave in plan.waves for vm in wave.vms))


def most_targets(plan: Plan) -> str:
    """The hosts whose part of a wave is too large for one command, and why; empty if there are none."""
    for wave in plan.waves:
        for host, count in Counter(vm.host for vm in wave.vms).items():
            if count > MOST_TARGETS:
                return (
                    f"{host} would pause {count} VMs at once, and a command names at most {MOST_TARGETS}: "
                    "select fewer sets, or spread them over more hosts"
                )
    return ""


def _unknown_names(fleet: FleetSnapshot, selection: Selection, limits: Limits) -> Iterable[Refusal]:
    canary = (limits.canary_host,) if limits.canary_host else ()
    asked: tuple[tuple[str, Collection[str], tuple[str, ...]], ...] = (
        ("host", fleet.inventories, (*selection.hosts, *limits.exclude_hosts, *canary)),
        ("set", fleet.sets(), (*selection.sets, *limits.exclude_sets)),
        ("VM", fleet.vm_names(), (*selection.vms, *limits.exclude_vms)),
    )
    for kind, known, names in asked:
        unknown = [name for name in dict.fromkeys(names) if name not in known]
        # A search compares the name with all of the fleet: a tenth of a second among 10,000 VMs.
        near = _nearest(unknown[:_MOST_HINTS], known)
        for name in unknown[:_MOST_UNKNOWN]:
            hint = f", did you mean {near[name]!r}?" if name in near else ""
            yield Refusal(
                subject=name, code="name_unknown", reason=f"no {kind} of this name has reported{hint}"
            )
        if len(unknown) > _MOST_UNKNOWN:
            yield Refusal(
                subject=unknown[_MOST_UNKNOWN],
                code="name_unknown",
                reason=f"no {kind} of this name has reported, nor of {len(unknown) - _MOST_UNKNOWN - 1} more of those that were given",
            )
    if not fleet.inventories:
        yield Refusal(
            subject="fleet",
            code="host_unknown",
            reason="no host has reported an inventory yet: are the host updaters running?",
        )


def _nearest(names: Sequence[str], known: Collection[str]) -> dict[str, str]:
    """Maps a misspelt name to the known one that is most like it, where one is."""
    ordered = sorted(known) if names else []
    found = {name: difflib.get_close_matches(name, ordered, n=1) for name in names}
    return {name: near[0] for name, near in found.items() if near}


def _contested_vms(fleet: FleetSnapshot, selection: Selection) -> Iterable[Refusal]:
    """A selection that names a contested VM is refused; otherwise the plan leaves the VM out."""
    for name in selection.vms:
        if name in fleet.contested:
            yield Refusal(subject=name, code="vm_contested", reason=fleet.contested[name].reason)
