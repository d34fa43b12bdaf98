"""Which hosts and VMs a plan includes, with which method and why, and which it skips or cannot include. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from caesura.contract.messages import (
    DomainKey,
    HostInventory,
    Limits,
    Method,
    PlannedVm,
    Policy,
    Refusal,
    Selection,
    SkipCode,
    UpdateRecord,
    VmRecord,
)
from caesura_coordinator.fleet_snapshot import FleetSnapshot
from caesura_coordinator.plan_waves import Member
from caesura_coordinator.proofs import planned_proofs, unprovable
from caesura_coordinator.wave_gates import why_outdated

Passed = Mapping[tuple[str, str], tuple[SkipCode, str]]
"""Maps (host, VM) to the reason for skipping it: a code, and a sentence."""


def domain_of(vm: VmRecord | PlannedVm, key: DomainKey) -> int:
    """A VM's domain under the rollout's domain key."""
    return vm.update_domain if key == "update_domain" else vm.fault_domain


def selected_hosts(
    fleet: FleetSnapshot, record: UpdateRecord, selection: Selection, *, hold_s: float
) -> list[str]:
    """Hosts that the selection covers and that can apply the update."""
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


def host_refusals(fleet: FleetSnapshot, hosts: Sequence[str]) -> Iterable[Refusal]:
    """Hosts that may not pause VMs now."""
    for host in hosts:
        if not fleet.is_online(host):
            yield Refusal(subject=host, code="host_offline", reason="its host updater is offline")
        elif other := fleet.other_fleets.get(host):
            yield Refusal(
                subject=host,
                code="host_of_another_fleet",
                reason=f"its host updater says that it is of fleet {other!r}, not of this coordinator's: each fleet has a broker of its own; "
                "if it is of this one, set the same fleet for both (CAESURA_HOST_UPDATER_FLEET)",
            )
        elif outdated := why_outdated(fleet.inventories[host]):
            yield Refusal(subject=host, code="host_outdated", reason=outdated)
        elif fleet.inventories[host].guard == "absent":
            yield Refusal(
                subject=host, code="guard_absent", reason="it has no pause guard, so no pause may start there"
            )


def passed_over(fleet: FleetSnapshot, hosts: Iterable[str], record: UpdateRecord, limits: Limits) -> Passed:
    """What is excluded, and what already has the update; an excluded VM excludes its host from updates that pause whole hosts."""
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
    """A sentence that the VM already has this version of the update; empty if it has not."""
    for each in inventory.installed:
        if (each.update, each.version) == (record.update, record.version) and (
            not each.vms or vm.vm in each.vms
        ):
            who = inventory.host if record.scope == "host" else vm.vm
            version = f" {each.version}" if each.version else ""
            since = f" since {each.at:%Y-%m-%d %H:%M}Z" if each.at else ""
            return f"{who} has {each.update}{version}{since}"
    return ""


def all_passed(fleet: FleetSnapshot, host: str, passed: Passed) -> bool:
    """Whether all VMs of the host are skipped."""
    vms = fleet.inventories[host].vms
    return bool(vms) and all((host, vm.vm) in passed for vm in vms)


def canary_refusals(
    members: Sequence[Member], skipped: Iterable[PlannedVm], limits: Limits
) -> Iterable[Refusal]:
    """Canaries that are impossible."""
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


def members_of_plan(
    fleet: FleetSnapshot,
    hosts: Sequence[str],
    record: UpdateRecord,
    selection: Selection,
    policy: Policy,
    passed: Passed,
    *,
    hold_s: float,
) -> tuple[list[Member], list[PlannedVm], list[Refusal]]:
    """The VMs to act on, the skipped ones with the reason, and the refusals."""
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
                # A pause of the whole host cannot leave it out, and another host's claim must not prevent the pause.
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
                # No wave with it would start: report that now, before any event is announced.
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
    # Hosts of a selected set that do not define the update: listed, so that nobody assumes they were updated.
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


def _ownerless(fleet: FleetSnapshot, hosts: Sequence[str], selection: Selection) -> Iterable[PlannedVm]:
    """The VMs of the selection that do not belong to a host, since several name them."""
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


def _reboot_reason(record: UpdateRecord) -> str:
    reason = "the update needs a reboot"
    if record.kill_after_timeout:
        reason = f"{reason}; a VM that does not shut down within {record.shutdown_s:g} s is killed"
    return reason


def _method(vm: VmRecord, record: UpdateRecord, *, hold_s: float) -> tuple[Method, str]:
    """The least invasive method that the update allows and the driver supports."""
    if record.impact == "none":
        return "live", "the update does not pause VMs"
    if record.impact == "reboot":
        candidates: tuple[tuple[Method, str], ...] = (("reboot", _reboot_reason(record)),)
    elif hold_s:
        candidates = (("freeze", f"freeze on demand for {hold_s:g} s"),)
    elif record.kernel == "kexec":
        reason = (
            f"the host starts kernel {record.kernel_release} with the VM's memory in RAM; nothing of Caesura runs between the two kernels, "
            "so an end within the budget is expected, not promised, and a restart is a small possibility"
        )
        candidates = (("kexec", reason),)
    elif record.vmm == "beside":
        candidates = (("swap", "the update installs a new VMM beside the one that runs"),)
    elif record.vmm == "instead":
        candidates = (("replace", "the VMM must not run during the update"),)
    elif record.scope == "vm":
        candidates = (("freeze", "the update is of scope vm: only this VM pauses for it"),)
    else:
        candidates = (("freeze", "the update is of scope host: every VM of the host pauses"),)
    for method, reason in candidates:
        if method in vm.methods:
            risk = vm.pause_risk if method != "reboot" else ""
            return method, f"{reason}; {risk}" if risk else reason
    wanted = candidates[-1][0]
    nothing = (
        "" if vm.methods else ", nor anything else: `caesura status` shows what its host says of its driver"
    )
    why = vm.methods_missing.get(wanted, f"the driver does not offer it{nothing}")
    return "skip", f"cannot {wanted}: {why}"[:1000]


def split_hosts(members: Sequence[Member], key: DomainKey) -> Iterable[Refusal]:
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
