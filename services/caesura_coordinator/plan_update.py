"""What a plan has to know about an update: its one definition, its duration, whether that is allowed. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import msgspec

from caesura.contract.messages import (
    Policy,
    Refusal,
    Selection,
    UpdateRecord,
)
from caesura.lifecycle.budget import PREPARE_S, START_S, budget_refusal
from caesura_coordinator.fleet_snapshot import FleetSnapshot
from caesura_coordinator.plan_kernel import RETURN_S

_SWAP_PAUSE_S = (
    1.0  # s: far more than the milliseconds that a swap takes; the upper bound that an event announces
)
HOLD = UpdateRecord(update="hold", impact="pause", scope="vm", expected_s=0.0, timeout_s=1.0)
"""Freeze on demand, as an update that only takes time."""


def definition(
    fleet: FleetSnapshot, update: str, selection: Selection
) -> tuple[UpdateRecord | None, list[Refusal]]:
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
            reason=f"defines {update!r} otherwise than {first_host} does (version, impact, scope, vmm or kernel)",
        )
        for host, record in others
        if (record.version, record.impact, record.scope, record.vmm, record.kernel)
        != (first.version, first.impact, first.scope, first.vmm, first.kernel)
    ]
    return first, refusals


def slowest(fleet: FleetSnapshot, record: UpdateRecord, hosts: Iterable[str]) -> UpdateRecord:
    """The definition with the times of the slowest host: each host may have its own."""
    all_of_them = [
        each for host in hosts for each in fleet.inventories[host].updates if each.update == record.update
    ]
    return msgspec.structs.replace(
        record,
        expected_s=max((each.expected_s for each in all_of_them), default=record.expected_s),
        timeout_s=max((each.timeout_s for each in all_of_them), default=record.timeout_s),
        shutdown_s=max((each.shutdown_s for each in all_of_them), default=record.shutdown_s),
        kill_after_timeout=any(each.kill_after_timeout for each in all_of_them),
    )


def update_limits(record: UpdateRecord, policy: Policy, expected_s: float) -> Iterable[Refusal]:
    """Why the policy does not allow the update."""
    if record.impact == "pause":
        why = budget_refusal(policy.budget_s, 0.0 if _runs_before(record) else expected_s)
        if why is not None:
            yield Refusal(subject=record.update, code="budget_too_short", reason=why)
    if record.impact == "reboot" and not policy.allow_reboot:
        yield Refusal(
            subject=record.update,
            code="reboot_not_allowed",
            reason="needs a reboot, which loses guest memory: allow it with --allow-reboot",
        )


def _runs_before(record: UpdateRecord) -> bool:
    """Whether the update's command runs before anything is paused for it."""
    return record.vmm == "beside" or bool(record.kernel)


def expected_pause_s(record: UpdateRecord, expected_s: float, jump_s: float = 0.0) -> float:
    """How long a VM is expected to be paused, seconds; ``jump_s``: the measured change of the host's kernel."""
    if record.impact != "pause":
        return 0.0
    if record.kernel:
        return jump_s
    return _SWAP_PAUSE_S if record.vmm == "beside" else expected_s


def outside_pause_s(record: UpdateRecord) -> float:
    """The most that a host may take before its first pause and after its last, beyond the pause budget."""
    if record.impact == "reboot":
        return record.shutdown_s + record.timeout_s + START_S
    before = record.timeout_s if record.impact == "none" or _runs_before(record) else 0.0
    after = RETURN_S if record.kernel else 0.0
    return before + (PREPARE_S if record.vmm or record.kernel else 0.0) + after
