"""A VM of the rehearsal: its place, its metadata API, and the program on it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from caesura_rehearse.results.observations import ProgramRecord, describe_exit
from caesura_rehearse.simulation.faults import RequestFaults
from caesura_rehearse.targets.target import Program, Target, reads_terminal


class Slot(msgspec.Struct, kw_only=True):
    """A VM of the rehearsal."""

    vm: str
    set: str
    update_domain: int
    url: str
    faults: RequestFaults
    """Of the requests of its clients."""
    port: int = 0
    """For its program to listen on; nobody else is given it."""
    target: Target | None = None
    exited: float | None = None
    """When its program ended by itself."""
    ending: bool = False
    """Whether it is being ended by order."""

    @property
    def runs(self) -> bool:
        """Whether there is something on it that runs."""
        return self.target is not None and not self.target.ended.is_set()

    @property
    def variables(self) -> dict[str, str]:
        """Of its program's environment, beside those that say where its metadata is."""
        return {"CAESURA_PORT": str(self.port), "CAESURA_UPDATE_DOMAIN": str(self.update_domain)}

    def record(self) -> ProgramRecord | None:
        """What became of its program so far; None: it never had one."""
        target = self.target
        if target is None:
            return None
        record = ProgramRecord(vm=self.vm, what=target.what, exited=self.exited, exit_code=target.exit_code)
        if isinstance(target, Program):
            record.starts, record.left = target.starts, target.left
            record.terminal_taken = reads_terminal()
        return record


def nothing_left(slots: Sequence[Slot]) -> bool:
    """Whether they had programs, and none of these runs any more."""
    return any(slot.target is not None for slot in slots) and not any(slot.runs for slot in slots)


def ended_early(slots: Sequence[Slot], when: str = "before it could be paused") -> str:
    """That programs have ended, for people; the VMs are named where there are several."""
    named = len(slots) > 1
    ended = [
        slot.target.what
        + (f" of {slot.vm}" if named else "")
        + f" ended ({describe_exit(slot.target.exit_code)})"
        for slot in slots
        if slot.target is not None and not slot.runs
    ]
    return f"{', '.join(ended)} {when}"
