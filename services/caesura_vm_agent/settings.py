"""Settings of the VM agent, read from ``CAESURA_VM_AGENT_*``."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from caesura.contract.names import NAME_PATTERN, own_set
from caesura.runtime.settings import ServiceSettings
from caesura_vm_agent.ntp import SyncPolicy


class VmAgentSettings(ServiceSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One agent, in one VM."""

    vm: Annotated[
        str, Meta(pattern=NAME_PATTERN, description="Name of this VM, as its host's inventory has it.")
    ]
    set: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9_-]{0,63}\Z",
            description="Availability set of this VM; empty for a VM outside any set.",
        ),
    ] = ""
    update_domain: Annotated[
        int, Meta(ge=0, le=19, description="Update domain of this VM; hooks see it.")
    ] = 0
    host: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9_-]{0,63}\Z",
            description="Host of this VM, if it never changes: no other is listened to. Empty: the one that the coordinator has on record.",
        ),
    ] = ""
    prepare_hook: Annotated[
        tuple[str, ...],
        Meta(
            description='Command to run before a freeze, as a JSON list: `["/usr/local/bin/drain", "--now"]`.'
        ),
    ] = ()
    prepare_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds the prepare hook may take; longer means not ready.")
    ] = 60.0
    recover_hook: Annotated[
        tuple[str, ...], Meta(description="Command to run after a resume, as a JSON list.")
    ] = ()
    recover_timeout_s: Annotated[float, Meta(gt=0, description="Seconds the recover hook may take.")] = 60.0
    clock: Annotated[
        Literal["system", "simulated"],
        Meta(
            description="`system`: CLOCK_REALTIME, needs CAP_SYS_TIME. `simulated`: for a VM that is only a process."
        ),
    ] = "system"
    sync_exchanges: Annotated[
        int, Meta(ge=1, le=64, description="Clock-sync exchanges of one measurement; the best one counts.")
    ] = 8
    sync_answer_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds to wait for one clock-sync answer.")
    ] = 0.5
    sync_bound_s: Annotated[
        float,
        Meta(gt=0, description="Seconds: error plus uncertainty within which the clock counts as synced."),
    ] = 0.1
    sync_interval_s: Annotated[float, Meta(gt=0, description="Seconds between periodic clock checks.")] = 60.0
    sync_periodic_threshold_s: Annotated[
        float, Meta(gt=0, description="Seconds: a periodic check steps the clock only above this.")
    ] = 0.05
    sync_step_most_s: Annotated[
        float,
        Meta(
            gt=0,
            description="Seconds: a clock that is off by more is stepped after a resume only, and else flagged as unsynced. "
            "Above the longest pause, since a check may fall due before the resume is announced.",
        ),
    ] = 60.0
    announce_interval_s: Annotated[
        float,
        Meta(gt=0, description="Seconds between repetitions of an answer while its event is scheduled."),
    ] = 3.0

    canary_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=2**30,
            description="Bytes of guest memory that the agent holds and rewrites, to find pages that a pause lost or made older; 0: none.",
        ),
    ] = 4 * 1024 * 1024

    @property
    def set_name(self) -> str:
        """The set whose document this agent reads."""
        return self.set or own_set(self.vm)

    @property
    def sync_policy(self) -> SyncPolicy:
        """How the clock is measured and stepped."""
        return SyncPolicy(
            exchanges=self.sync_exchanges,
            answer_timeout_s=self.sync_answer_timeout_s,
            bound_s=self.sync_bound_s,
            periodic_threshold_s=self.sync_periodic_threshold_s,
            step_most_s=self.sync_step_most_s,
        )
