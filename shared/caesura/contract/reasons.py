"""Reason codes: what a sentence says, for programs. The vocabulary is closed for writers and open for readers.

Every sentence that says why something was refused, waits, failed or was aborted comes with codes: a program decides on
them and never on the words, which may change. A later version may add codes, so a reader treats an unknown code as
an unspecified reason. A code keeps its meaning for as long as v1 is in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta

ReasonCode = Literal[
    # What blocks a plan or a wave.
    "nothing_selected",
    "nothing_to_do",
    "name_unknown",
    "update_unknown",
    "update_differs",
    "update_unusable",
    "method_unavailable",
    "budget_too_short",
    "reboot_not_allowed",
    "selection_too_narrow",
    "canary_impossible",
    "proof_impossible",
    "vm_contested",
    "host_in_two_domains",
    "set_held",
    "queued",
    "queue_full",
    "too_large",
    "host_offline",
    "host_unknown",
    "inventory_incomplete",
    "host_behind",
    "host_outdated",
    "host_of_another_fleet",
    "epoch_refused",
    "host_busy",
    "host_stopping",
    "guard_absent",
    "vm_not_running",
    "vm_gone",
    "vm_unhealthy",
    "vm_moved",
    "kernel_not_ready",
    "kernel_unmeasured",
    "agent_offline",
    "agent_silent",
    "agent_not_ready",
    # Why a request or a message is refused.
    "request_of_another_fleet",
    "rollout_unknown",
    "rollout_state",
    "report_outstanding",
    "request_late",
    "store_failed",
    "message_invalid",
    "record_missing",
    "aborted",
    "superseded",
    # How an operation ends on its host.
    "command_misdirected",
    "command_late",
    "command_invalid",
    "freeze_failed",
    "prepare_failed",
    "swap_failed",
    "shutdown_failed",
    "start_failed",
    "pause_ran_out",
    "update_failed",
    "update_timeout",
    "vm_ended",
    "resume_failed",
    "memory_changed",
    "memory_unproven",
    "pause_over_budget",
    "leave_failed",
    "kernel_unexpected",
    "memory_lost",
    "internal_error",
    "guard_refused",
    "guard_acted",
    "guard_died",
    "updater_died",
    "host_rebooted",
    "report_lost",
    "result_missing",
    "unexplained",
    # Findings of the verification.
    "clock_unsynced",
    "clock_unknown",
]

DESCRIPTIONS: Final[Mapping[ReasonCode, str]] = {
    "nothing_selected": "Nothing that was selected has a running VM to act on.",
    "nothing_to_do": "Everything that was selected already has the update, or is skipped.",
    "name_unknown": "No host, set or VM of this name has reported.",
    "update_unknown": "No host, or not this one, defines the update.",
    "update_differs": "Hosts define the update differently, or not as the command says.",
    "update_unusable": "A definition in `updates.d` cannot be read.",
    "method_unavailable": "The driver cannot apply the update to this VM by the method that it needs.",
    "budget_too_short": "The work does not fit into the pause budget.",
    "reboot_not_allowed": "The update needs a reboot, and the policy does not allow one.",
    "selection_too_narrow": "The update pauses every VM of a host, and only some were named.",
    "canary_impossible": "The canary that was asked for is not part of the plan.",
    "proof_impossible": "The policy requires a proof of memory that is not possible.",
    "vm_contested": "More than one host names the VM as its own.",
    "host_in_two_domains": "One pause of the host would pause two domains of a set.",
    "set_held": "Another rollout that has not ended holds the set.",
    "queued": "It waits for another rollout that holds one of its sets.",
    "queue_full": "As many rollouts as may wait for a set do so already.",
    "too_large": "The content does not fit into one message or command.",
    "host_offline": "The host updater is not on the bus.",
    "host_unknown": "The host has not reported an inventory.",
    "inventory_incomplete": "Parts of the host's newest inventory are missing, so the state of its VMs is not known.",
    "host_behind": "The host has not acknowledged this coordinator's epoch yet.",
    "host_outdated": "The host updater's version does not read this coordinator's commands.",
    "host_of_another_fleet": "The host updater is set to another fleet than the coordinator.",
    "epoch_refused": "The host obeys another coordinator, or refuses this epoch; this does not resolve by itself.",
    "host_busy": "The host is busy with another operation.",
    "host_stopping": "The host updater is stopping.",
    "guard_absent": "The host has no pause guard.",
    "vm_not_running": "The VM is paused, stopped or in an unknown state.",
    "vm_gone": "The host does not list the VM any more.",
    "vm_unhealthy": "The VM runs, but its host reports a problem with it.",
    "vm_moved": "The VM is in another set or domain than when the plan was made.",
    "kernel_not_ready": "The host is not prepared to start another kernel under its VMs, or does not allow it.",
    "kernel_unmeasured": "Nothing that was measured on the host shows that its VMs would run again within the budget.",
    "agent_offline": "The VM's agent is not on the bus.",
    "agent_silent": "The agent did not answer the event by NotBefore.",
    "agent_not_ready": "The agent's prepare hook says that the guest may not be paused now.",
    "request_of_another_fleet": "The operator's command is set to another fleet than the coordinator.",
    "rollout_unknown": "There is no rollout with this id; or, if none was named, there is none or more than one to choose from.",
    "rollout_state": "The rollout is in a state that does not allow what was asked.",
    "report_outstanding": "A host never reported how its operation ended, so the rollout cannot be resumed.",
    "request_late": "The request arrived so late that the operator's client had given up.",
    "store_failed": "The store cannot be read or written.",
    "message_invalid": "The request could not be understood.",
    "record_missing": "The coordinator has no record of what was announced; it ended what was still open.",
    "aborted": "It was aborted, by an operator or by a coordinator.",
    "superseded": "Events were announced that this coordinator has no record of: another coordinator was active.",
    "command_misdirected": "The command is for another host.",
    "command_late": "The command arrived after its not_after.",
    "command_invalid": "The command contradicts itself or what the host knows.",
    "freeze_failed": "A VM could not be paused, or not in time.",
    "prepare_failed": "The swap or replacement of a VM could not be prepared.",
    "swap_failed": "A VM was not swapped.",
    "shutdown_failed": "A VM did not shut down in time for an update that needs a reboot, so the update did not run.",
    "start_failed": "A VM that was shut down for an update could not be started again, or is not up.",
    "pause_ran_out": "The time that the budget allows ran out before the update could run.",
    "update_failed": "The update ended with an error.",
    "update_timeout": "The update did not end in time.",
    "vm_ended": "A VM ended, or resumed without Caesura, during the operation.",
    "resume_failed": "A VM could not be resumed as planned.",
    "memory_changed": "Memory was not the same after the pause, or the guest rebooted.",
    "memory_unproven": "Nothing showed that memory is the same, and the policy requires that.",
    "pause_over_budget": "A pause was longer than its budget.",
    "leave_failed": "The host could not start the other kernel; its VMs were resumed under the one that runs.",
    "kernel_unexpected": "The host runs another kernel than the update was to start.",
    "memory_lost": "A VM's memory did not survive the change of the host's kernel.",
    "internal_error": "A fault of Caesura itself; the host's log has it.",
    "guard_refused": "The pause guard did not accept the deadline, so nothing was paused.",
    "guard_acted": "The pause guard resumed a VM in place of the host updater.",
    "guard_died": "The pause guard died during the operation.",
    "updater_died": "The host updater died during the operation.",
    "host_rebooted": "The host was restarted during the operation.",
    "report_lost": "A host did not report in time how its operation ended.",
    "result_missing": "A host's report says nothing about one of its VMs.",
    "unexplained": "A host or coordinator of an older version gave the reason only as text.",
    "clock_unsynced": "A guest's clock is off by more than the bound, or could not be corrected.",
    "clock_unknown": "There is no verdict on a guest's clock.",
}

Code = Annotated[
    str, Meta(pattern=r"^[a-z][a-z0-9_]{0,39}\Z", description="A reason code; a later version may know more.")
]
"""As sent in a message: open, so that an old reader can read a new writer."""

KNOWN: frozenset[str] = frozenset(get_args(ReasonCode))

TRANSIENT: frozenset[ReasonCode] = frozenset(
    (
        "host_offline",
        "host_unknown",
        "inventory_incomplete",
        "host_behind",
        "host_stopping",
        "guard_absent",
        "agent_offline",
        "agent_silent",
        "command_late",
        "guard_died",
        "updater_died",
        "host_rebooted",
    )
)
"""A component was unavailable, but nothing was found to be wrong: a rollout halted only for these may be resumed automatically."""


class Reason(msgspec.Struct, frozen=True):
    """One obstacle or failure: a code for programs, a sentence for people."""

    code: ReasonCode
    text: str

    def __str__(self) -> str:
        return self.text


def codes_of(reasons: Iterable[Reason]) -> tuple[ReasonCode, ...]:
    """Their codes, each once, in order."""
    return tuple(dict.fromkeys(each.code for each in reasons))
