"""Which commands this host obeys: expiry, duplicates, and whether the command fits the host; epochs are in ``epoch_authority``. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime

import msgspec

from caesura.contract.messages import (
    AbortOperation,
    OperationReported,
    StartOperation,
    VmRecord,
)
from caesura.contract.reasons import ReasonCode
from caesura.lifecycle.budget import budget_refusal
from caesura.lifecycle.proof import PAUSING
from caesura_host_updater.epoch_authority import EpochAuthority, NotObeyed
from caesura_host_updater.inventory.updates import Catalogue, UpdateFile

STOPPING = "the host updater is stopping"
"""Why nothing begins, and why what was begun is aborted."""


class Refuse(msgspec.Struct, frozen=True):
    """Do nothing but log why."""

    code: ReasonCode
    why: str


class Ignore(msgspec.Struct, frozen=True):
    """Do nothing and report nothing: the sender has no authority here.

    A report would be the end of the operation, and the coordinator that leads may request the very same one: a
    rollout that was under way at a takeover continues with the ids it had.
    """

    why: str


class Underway(msgspec.Struct, frozen=True):
    """The operation is known and has not ended."""


class Repeat(msgspec.Struct, frozen=True):
    """The operation is known and ended: repeat its report."""

    report: OperationReported


class Accept(msgspec.Struct, frozen=True):
    """Do it. ``update`` is None for a freeze on demand."""

    update: UpdateFile | None


class AbortRunning(msgspec.Struct, frozen=True):
    """Abort the operation under way."""


class Tombstone(msgspec.Struct, frozen=True):
    """Record that the operation never starts here: its abort arrived first."""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What the decision needs to know of the host."""

    host: str
    vms: Mapping[str, VmRecord]
    catalogue: Catalogue
    busy: str = ""
    """The operation under way."""
    stopping: bool = False


def evaluate_start(
    command: StartOperation,
    *,
    host: Host,
    authority: EpochAuthority | NotObeyed,
    known: Underway | Repeat | None,
    now: datetime,
) -> Ignore | Refuse | Underway | Repeat | Accept:
    """What to do with a command to start an operation.

    Args:
        authority: the result of ``observe_epoch`` for this command.
        known: what is known of its operation id; None: it is a new one.
        now: the host's wall clock.
    """
    if known is not None:
        return known
    if isinstance(authority, NotObeyed):
        return Ignore(authority.why)
    if command.host != host.host:
        return Refuse("command_misdirected", f"the command is for host {command.host}, this is {host.host}")
    if now > command.not_after:
        late_s = (now - command.not_after).total_seconds()
        return Refuse("command_late", f"the command arrived {late_s:.1f} s after its not_after")
    if host.stopping:
        return Refuse("host_stopping", STOPPING)
    if host.busy:
        return Refuse("host_busy", f"busy with operation {host.busy}")
    wrong = _wrong_targets(command, host)
    if wrong is not None:
        return wrong
    return _judge_update(command, host)


def _wrong_targets(command: StartOperation, host: Host) -> Refuse | None:
    """What is wrong with the command's VMs, None if nothing."""
    for vm, count in Counter(target.vm for target in command.targets).items():
        if count > 1:
            return Refuse("command_invalid", f"VM {vm} is named {count} times")
    for target in command.targets:
        record = host.vms.get(target.vm)
        if record is None:
            return Refuse("vm_gone", f"VM {target.vm} is not on this host")
        if (target.set, target.update_domain) != (record.set, record.update_domain):
            return Refuse(
                "vm_moved",
                f"VM {target.vm} is in set {record.set} domain {record.update_domain}, "
                f"the command says {target.set} domain {target.update_domain}: plan again",
            )
        if record.state != "running":
            return Refuse("vm_not_running", f"VM {target.vm} is {record.state}, not running")
    return None


def _judge_update(command: StartOperation, host: Host) -> Refuse | Accept:
    for target in command.targets:
        record = host.vms[target.vm]
        if command.method not in record.methods:
            missing = record.methods_missing.get(command.method, "this host does not know it")
            why = f"method {command.method} is not possible for VM {target.vm}: {missing}"
            return Refuse("method_unavailable", why)
    # The plan was made by the same rule, and by what this host had published then.
    why_not = budget_refusal(command.budget_s, command.hold_s) if command.method in PAUSING else None
    if why_not is not None:
        return Refuse("budget_too_short", why_not)
    if not command.update:
        if command.method != "freeze":
            return Refuse("command_invalid", f"method {command.method} without an update does nothing")
        return Accept(None)
    update = host.catalogue.updates.get(command.update)
    if update is None:
        files = ", ".join(f"{each.file}: {each.reason}" for each in host.catalogue.refused)
        return Refuse(
            "update_unknown",
            f"update {command.update} is not known here{f' (refused files: {files})' if files else ''}",
        )
    if command.method != update.method:
        return Refuse(
            "update_differs",
            f"update {update.name} has impact {update.impact}"
            + (f" and vmm {update.vmm}" if update.vmm else "")
            + f": it is applied by method {update.method}, not by {command.method}",
        )
    if command.method in ("freeze", "replace"):  # the others run the update before or after the pause
        why_not = budget_refusal(command.budget_s, update.expected_s)
        if why_not is not None:
            return Refuse("budget_too_short", f"update {update.name} {why_not}")
    if command.method in ("freeze", "replace", "reboot", "kexec"):
        named = {target.vm for target in command.targets}
        # Another kernel ends whatever it does not keep, a VM that somebody paused as well.
        spared = ("stopped",) if command.method == "kexec" else ("stopped", "paused", "unknown")
        left = [vm for vm, record in host.vms.items() if record.state not in spared and vm not in named]
        if update.scope == "host" and left:
            return Refuse(
                "command_invalid",
                f"update {update.name} is of scope host, but the command leaves out {', '.join(left)}",
            )
    return Accept(update)


def evaluate_abort(
    command: AbortOperation,
    *,
    busy: str,
    authority: EpochAuthority | NotObeyed,
    known: Underway | Repeat | None,
) -> Ignore | AbortRunning | Underway | Repeat | Tombstone:
    """What to do with a command to abort an operation."""
    if isinstance(authority, NotObeyed):
        return Ignore(authority.why)
    if command.operation == busy:
        return AbortRunning()
    return known if known is not None else Tombstone()
