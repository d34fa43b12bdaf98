"""Which VMs are handled together, with which method and why, and what stands in the way. Pure.

The rule that shapes every plan: of one availability set, a wave pauses VMs of one domain only (I1).
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from caesura.contract.messages import (
    MOST_TARGETS,
    DomainKey,
    HostInventory,
    Limits,
    Method,
    Plan,
    PlannedVm,
    Policy,
    Refusal,
    Selection,
    SkipCode,
    UpdateRecord,
    VmRecord,
)
from caesura.lifecycle.budget import MIN_BUDGET_S, PREPARE_S, usable_s
from caesura_coordinator.fleet import Fleet, why_outdated
from caesura_coordinator.proofs import planned_proofs, unprovable
from caesura_coordinator.waves import Member, most_hosts, waves

_WAVE_OVERHEAD_S = 2.0  # s: commands, resumes and clock-sync around a pause, for the estimate only
_SWAP_PAUSE_S = 1.0  # s: far more than the milliseconds that a swap takes; what an event promises at most
HOLD = UpdateRecord(update="hold", impact="pause", scope="vm", expected_s=0.0, timeout_s=1.0)
"""Freeze on demand, as an update that does nothing but take time."""
_NO_LIMITS = Limits()

_Passed = Mapping[tuple[str, str], tuple[SkipCode, str]]
"""(host, VM) to why nothing is done with it: as a code, and in words."""


def make_plan(
    fleet: Fleet,
    *,
    update: str,
    selection: Selection,
    policy: Policy,
    limits: Limits = _NO_LIMITS,
    hold_s: float = 0.0,
) -> Plan:
    """Plan a rollout of ``update`` (or, with ``hold_s`` above zero, a freeze on demand).

    Every refusal names what is in the way; a plan with refusals must not be started. One with neither waves nor
    refusals has nothing to do: all that was selected has the update.
    """
    refusals = [*_unknown_names(fleet, selection, limits), *_contested_vms(fleet, selection)]
    record, update_refusals = (HOLD, []) if hold_s else _definition(fleet, update, selection)
    refusals += update_refusals
    if record is None or refusals:
        return Plan(update=update, refusals=tuple(refusals), hold_s=hold_s)
    hosts = _hosts(fleet, record, selection, hold_s=hold_s)
    if not hold_s:
        record = _slowest(fleet, record, hosts)
    expected_s = hold_s or record.expected_s
    refusals += _update_limits(record, policy, expected_s)
    if record.scope == "host" and selection.vms:
        refusals.append(
            Refusal(
                subject=record.update,
                code="selection_too_narrow",
                reason="a host-scope update pauses every VM of a host: select hosts or sets, not single VMs",
            )
        )
    passed = _passed_over(fleet, hosts, record, limits)
    refusals += _host_refusals(fleet, [host for host in hosts if not _all_passed(fleet, host, passed)])
    members, skipped, member_refusals = _members(
        fleet, hosts, record, selection, policy, passed, hold_s=hold_s
    )
    refusals += member_refusals
    # The fence asks every host of these sets before a pause: what would block there is no surprise for later.
    others = sorted(fleet.hosts_of({each.vm.set for each in members}) - set(hosts))
    refusals += (
        msgspec.structs.replace(each, reason=f"{each.reason}: it holds VMs of the same sets")
        for each in _host_refusals(fleet, others)
    )
    if record.scope == "host":
        refusals += _split_hosts(members, policy.domain_key)
    refusals += _canary_refusals(members, skipped, limits)
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
        (policy.notice_s if record.impact != "none" else 0.0) + expected_s + _WAVE_OVERHEAD_S + policy.soak_s
    )
    return Plan(
        update=update,
        event_type="Reboot" if record.impact == "reboot" else "Freeze",
        waves=planned,
        skipped=tuple(skipped),
        refusals=tuple(refusals),
        estimate_s=round(len(planned) * wave_s, 3),
        expected_pause_s=_expected_pause_s(record, expected_s),
        outside_pause_s=_outside_pause_s(record),
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
        f"nothing to do: all that was selected has {plan.update or 'it'} already, or is skipped for what the plan says; "
        "--again applies it once more"
    )


def _expected_pause_s(record: UpdateRecord, expected_s: float) -> float:
    if record.impact == "none":
        return 0.0
    return _SWAP_PAUSE_S if record.vmm == "beside" else expected_s


def _outside_pause_s(record: UpdateRecord) -> float:
    """The most that a host may take before its first pause, beyond the pause budget."""
    before = record.timeout_s if record.impact == "none" or record.vmm == "beside" else 0.0
    return before + (PREPARE_S if record.vmm else 0.0)


def sets_of(plan: Plan) -> tuple[str, ...]:
    """Every set that the plan touches, each once, in order of first touch."""
    return tuple(dict.fromkeys(vm.set for wave in plan.waves for vm in wave.vms))


def most_targets(plan: Plan) -> str:
    """Why a host's part of a wave is more than one command can name; empty if none is."""
    for wave in plan.waves:
        for host, count in Counter(vm.host for vm in wave.vms).items():
            if count > MOST_TARGETS:
                return (
                    f"{host} would pause {count} VMs at once, and a command names at most {MOST_TARGETS}: "
                    "select fewer sets, or spread them over more hosts"
                )
    return ""


def domain_of(vm: VmRecord | PlannedVm, key: DomainKey) -> int:
    """A VM's domain under the rollout's domain key."""
    return vm.update_domain if key == "update_domain" else vm.fault_domain


def _unknown_names(fleet: Fleet, selection: Selection, limits: Limits) -> Iterable[Refusal]:
    canary = (limits.canary_host,) if limits.canary_host else ()
    asked: tuple[tuple[str, Collection[str], tuple[str, ...]], ...] = (
        ("host", fleet.inventories, (*selection.hosts, *limits.exclude_hosts, *canary)),
        ("set", fleet.state.sets(), (*selection.sets, *limits.exclude_sets)),
        ("VM", fleet.vm_names(), (*selection.vms, *limits.exclude_vms)),
    )
    for kind, known, names in asked:
        for name in dict.fromkeys(names):
            if name not in known:
                near = difflib.get_close_matches(name, sorted(known), n=1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                yield Refusal(
                    subject=name, code="name_unknown", reason=f"no {kind} of this name has reported{hint}"
                )
    if not fleet.inventories:
        yield Refusal(
            subject="fleet",
            code="host_unknown",
            reason="no host has reported an inventory yet: are the host updaters running?",
        )


def _contested_vms(fleet: Fleet, selection: Selection) -> Iterable[Refusal]:
    """Who names a VM that several hosts have is told so; whoever does not gets a plan without it."""
    for name in selection.vms:
        if name in fleet.contested:
            yield Refusal(subject=name, code="vm_contested", reason=fleet.contested[name].reason)


def _definition(fleet: Fleet, update: str, selection: Selection) -> tuple[UpdateRecord | None, list[Refusal]]:
    """The update's definition, which must be the same on every host that has it."""
    found = {
        host: record
        for host, inventory in sorted(fleet.inventories.items())
        for record in inventory.updates
        if record.update == update
    }
    if not found:
        names = sorted(
            {record.update for inventory in fleet.inventories.values() for record in inventory.updates}
        )
        near = difflib.get_close_matches(update, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"hosts know: {', '.join(names) or 'none'}"
        return None, [
            Refusal(subject=update, code="update_unknown", reason=f"no host defines this update; {hint}")
        ]
    refusals = [
        Refusal(
            subject=host,
            code="update_unknown",
            reason=f"does not define the update {update!r}: add it to updates.d there",
        )
        for host in selection.hosts
        if host in fleet.inventories and host not in found
    ]
    (first_host, first), *others = found.items()
    refusals += [
        Refusal(
            subject=host,
            code="update_differs",
            reason=f"defines {update!r} otherwise than {first_host} does (version, impact, scope or vmm)",
        )
        for host, record in others
        if (record.version, record.impact, record.scope, record.vmm)
        != (first.version, first.impact, first.scope, first.vmm)
    ]
    return first, refusals


def _slowest(fleet: Fleet, record: UpdateRecord, hosts: Iterable[str]) -> UpdateRecord:
    """The definition with the times of the host that takes longest: each host may have its own."""
    all_of_them = [
        each for host in hosts for each in fleet.inventories[host].updates if each.update == record.update
    ]
    return msgspec.structs.replace(
        record,
        expected_s=max((each.expected_s for each in all_of_them), default=record.expected_s),
        timeout_s=max((each.timeout_s for each in all_of_them), default=record.timeout_s),
    )


def _update_limits(record: UpdateRecord, policy: Policy, expected_s: float) -> Iterable[Refusal]:
    usable = usable_s(policy.budget_s)
    if record.impact == "pause" and policy.budget_s < MIN_BUDGET_S:
        yield Refusal(
            subject=record.update,
            code="budget_too_short",
            reason=f"a pause budget of {policy.budget_s:g} s is too short: resuming in time needs at least {MIN_BUDGET_S:g} s",
        )
    elif record.impact == "pause" and record.vmm != "beside" and expected_s > usable:
        yield Refusal(
            subject=record.update,
            code="budget_too_short",
            reason=f"takes {expected_s:g} s, a pause budget of {policy.budget_s:g} s leaves {usable:.2f} s for it "
            "(the rest is for the resume)",
        )
    if record.impact == "reboot" and not policy.allow_reboot:
        yield Refusal(
            subject=record.update,
            code="reboot_not_allowed",
            reason="needs a reboot, which loses guest memory: allow it with --allow-reboot",
        )


def _hosts(fleet: Fleet, record: UpdateRecord, selection: Selection, *, hold_s: float) -> list[str]:
    """Hosts that the selection reaches and that can apply the update."""
    chosen = set(fleet.inventories)
    if selection.hosts or selection.sets or selection.vms:
        of_vms = (fleet.vm(name) for name in selection.vms)
        chosen = {*selection.hosts, *fleet.hosts_of(selection.sets)}
        chosen |= {located.host for located in of_vms if located is not None}
    if not hold_s:
        chosen = {
            host
            for host in chosen
            if any(each.update == record.update for each in fleet.inventories[host].updates)
        }
    return sorted(chosen)


def _host_refusals(fleet: Fleet, hosts: Sequence[str]) -> Iterable[Refusal]:
    for host in hosts:
        if not fleet.is_online(host):
            yield Refusal(subject=host, code="host_offline", reason="its host updater is offline")
        elif outdated := why_outdated(fleet.inventories[host]):
            yield Refusal(subject=host, code="host_outdated", reason=outdated)
        elif fleet.inventories[host].guard == "absent":
            yield Refusal(
                subject=host, code="guard_absent", reason="it has no pause guard, so no pause may start there"
            )


def _passed_over(fleet: Fleet, hosts: Iterable[str], record: UpdateRecord, limits: Limits) -> _Passed:
    """What is excluded, and what has the update already; an excluded VM excludes its host from what pauses hosts whole."""
    passed: dict[tuple[str, str], tuple[SkipCode, str]] = {}
    for host in hosts:
        inventory = fleet.inventories[host]
        for vm in inventory.vms:
            if why := _excluded(host, vm, limits):
                passed[host, vm.vm] = "excluded", why
            elif not limits.again and (why := _installed(inventory, vm, record)):
                passed[host, vm.vm] = "installed", why
        if record.scope == "host":
            for vm in inventory.vms:
                if passed.get((host, vm.vm), ("", ""))[0] == "excluded":
                    whole: tuple[SkipCode, str] = (
                        "excluded",
                        f"{host} is excluded: {_excluded(host, vm, limits)}",
                    )
                    passed |= {(host, each.vm): whole for each in inventory.vms}
                    break
    return passed


def _excluded(host: str, vm: VmRecord, limits: Limits) -> str:
    if host in limits.exclude_hosts:
        return f"host {host} was excluded"
    if vm.set in limits.exclude_sets:
        return f"set {vm.set} of {vm.vm} was excluded"
    return f"VM {vm.vm} was excluded" if vm.vm in limits.exclude_vms else ""


def _installed(inventory: HostInventory, vm: VmRecord, record: UpdateRecord) -> str:
    """That the VM has the update in the version that is to be applied, in words; empty if it has not."""
    for each in inventory.installed:
        if (each.update, each.version) == (record.update, record.version) and (
            not each.vms or vm.vm in each.vms
        ):
            who = inventory.host if record.scope == "host" else vm.vm
            version = f" {each.version}" if each.version else ""
            since = f" since {each.at:%Y-%m-%d %H:%M}Z" if each.at else ""
            return f"{who} has {each.update}{version}{since}"
    return ""


def _all_passed(fleet: Fleet, host: str, passed: _Passed) -> bool:
    vms = fleet.inventories[host].vms
    return bool(vms) and all((host, vm.vm) in passed for vm in vms)


def _canary_refusals(
    members: Sequence[Member], skipped: Iterable[PlannedVm], limits: Limits
) -> Iterable[Refusal]:
    name = limits.canary_host
    done = {each.host for each in skipped if each.skip == "installed"}
    if name and name not in done and name not in {each.host for each in members}:
        yield Refusal(
            subject=name,
            code="canary_impossible",
            reason="cannot be the canary: the plan does nothing on this host",
        )
    if limits.max_hosts and limits.canary_count > limits.max_hosts:
        yield Refusal(
            subject="canary",
            code="canary_impossible",
            reason=f"{limits.canary_count} hosts are more than the {limits.max_hosts} that a wave may have",
        )


def _members(
    fleet: Fleet,
    hosts: Sequence[str],
    record: UpdateRecord,
    selection: Selection,
    policy: Policy,
    passed: _Passed,
    *,
    hold_s: float,
) -> tuple[list[Member], list[PlannedVm], list[Refusal]]:
    members: list[Member] = []
    skipped: list[PlannedVm] = []
    refusals: list[Refusal] = []
    narrowed = record.scope == "vm" and (selection.sets or selection.vms)
    for host in hosts:
        for vm in fleet.inventories[host].vms:
            if narrowed and not (
                vm.set in selection.sets or vm.vm in selection.vms or host in selection.hosts
            ):
                continue
            method, reason = _method(vm, record, hold_s=hold_s)
            expected_s = hold_s or record.expected_s
            planned = PlannedVm(
                vm=vm.vm,
                set=vm.set,
                update_domain=vm.update_domain,
                fault_domain=vm.fault_domain,
                host=host,
                method=method,
                reason=reason,
                agent=vm.agent,
                clock=vm.clock,
                proofs=planned_proofs(vm, method, policy, expected_s),
            )
            skip, why = passed.get((host, vm.vm), ("", ""))
            if not skip and vm.vm in fleet.contested and record.scope == "vm":
                # A pause of the whole host cannot leave it out, and is not another host's business to prevent.
                skip, why = "contested", fleet.contested[vm.vm].reason
            if not skip and vm.state == "stopped":
                skip, why = "stopped", "the VM is stopped"
            if skip:
                skipped.append(
                    msgspec.structs.replace(planned, method="skip", reason=why, proofs=(), skip=skip)
                )
            elif method == "skip":
                refusals.append(Refusal(subject=vm.vm, code="method_unavailable", reason=reason))
            elif vm.state_detail:
                # No wave with it would start: what its start will say is said here, before anybody is warned.
                why = (
                    f"{vm.state_detail}: no wave with it can start; repair it, or leave it out (--exclude-vm)"
                )
                refusals.append(Refusal(subject=vm.vm, code="vm_unhealthy", reason=why[:4096]))
            elif why := unprovable(vm, planned, policy):
                refusals.append(Refusal(subject=vm.vm, code="proof_impossible", reason=why[:4096]))
            else:
                members.append(
                    Member(host=host, vm=vm, planned=planned, domain=domain_of(vm, policy.domain_key))
                )
    skipped += _ownerless(fleet, hosts, selection)
    # Hosts of a selected set that lack the update keep theirs: named, so that nobody thinks they were done.
    everything = not (selection.hosts or selection.sets or selection.vms)
    others = set(hosts)
    for host, vm in fleet.vms() if len(others) < len(fleet.inventories) else ():
        selected = everything or vm.set in selection.sets or vm.vm in selection.vms
        if host not in others and selected:
            skipped.append(
                PlannedVm(
                    vm=vm.vm,
                    set=vm.set,
                    update_domain=vm.update_domain,
                    fault_domain=vm.fault_domain,
                    host=host,
                    method="skip",
                    reason=f"{host} does not define the update",
                    skip="undefined",
                    agent=vm.agent,
                    clock=vm.clock,
                )
            )
    return members, skipped, refusals


def _ownerless(fleet: Fleet, hosts: Sequence[str], selection: Selection) -> Iterable[PlannedVm]:
    """The VMs of the selection that belong to no host, since several name them."""
    everything = not (selection.hosts or selection.sets or selection.vms)
    owned = {vm.vm for _, vm in fleet.vms()}
    for name, contested in fleet.contested.items():
        vm = contested.record
        chosen = everything or vm.set in selection.sets or contested.host in selection.hosts
        if chosen and name not in owned and contested.host in hosts:
            yield PlannedVm(
                vm=name,
                set=vm.set,
                update_domain=vm.update_domain,
                fault_domain=vm.fault_domain,
                host=contested.host,
                method="skip",
                reason=contested.reason,
                agent=vm.agent,
                clock=vm.clock,
                skip="contested",
            )


def _method(vm: VmRecord, record: UpdateRecord, *, hold_s: float) -> tuple[Method, str]:
    """The method of least impact that the update allows and the driver can do."""
    if record.impact == "none":
        return "live", "the update pauses nothing"
    if record.impact == "reboot":
        candidates: tuple[tuple[Method, str], ...] = (("reboot", "the update needs a reboot"),)
    elif hold_s:
        candidates = (("freeze", f"freeze on demand for {hold_s:g} s"),)
    elif record.vmm == "beside":
        candidates = (("swap", "the update puts a new VMM beside the one that runs"),)
    elif record.vmm == "instead":
        candidates = (("replace", "the VMM must be gone while the update runs"),)
    elif record.scope == "vm":
        candidates = (("freeze", "the update is of scope vm: only this VM pauses for it"),)
    else:
        candidates = (("freeze", "the update is of scope host: every VM of the host pauses"),)
    for method, reason in candidates:
        if method in vm.methods:
            return method, reason
    wanted = candidates[-1][0]
    nothing = (
        "" if vm.methods else ", nor anything else: `caesura status` shows what its host says of its driver"
    )
    why = vm.methods_missing.get(wanted, f"the driver does not offer it{nothing}")
    return "skip", f"cannot {wanted}: {why}"[:1000]


def _split_hosts(members: Sequence[Member], key: DomainKey) -> Iterable[Refusal]:
    """Hosts that hold VMs of one set in two domains cannot take a host-scope pause."""
    held: dict[tuple[str, str], dict[int, str]] = {}
    for member in members:
        held.setdefault((member.host, member.vm.set), {}).setdefault(member.domain, member.vm.vm)
    for (host, set_name), domains in sorted(held.items()):
        if len(domains) > 1:
            named = ", ".join(f"{vm} in {key} {domain}" for domain, vm in sorted(domains.items()))
            yield Refusal(
                subject=host,
                code="host_in_two_domains",
                reason=f"holds VMs of set {set_name} in {len(domains)} domains ({named}): one pause of the host would pause both",
            )
