"""The state of guest clocks: the last verdict on each VM, and the bound that applied. Pure.

The host judges a clock after a resume. The agent continues to check by itself, so an error left by a pause may be corrected
without another pause, and an exporter that has been restarted is notified of errors that remain.
"""

from __future__ import annotations

import msgspec

from caesura.contract import messages as m


class Verdict(msgspec.Struct, frozen=True):
    """The last verdict on a VM's clock. Errors are guest minus host, seconds; None where they were not measured."""

    synced: bool
    before_s: float | None
    after_s: float | None
    bound_s: float | None = None
    """The allowed error, by the policy of the rollout that paused it; None if unknown."""

    @property
    def good(self) -> bool:
        """Whether there is nothing left to correct."""
        off = self.after_s is not None and self.bound_s is not None and abs(self.after_s) > self.bound_s
        return self.synced and not off


class GuestClocks:
    """Maps a VM to its verdict."""

    def __init__(self) -> None:
        self._verdicts: dict[str, Verdict] = {}
        self._refused: set[str] = set()
        """VMs whose agent refused to step the clock at its last check."""

    def refused(self, vm: str) -> bool:
        """Whether the VM's clock is further off than its agent steps it outside a resume."""
        return vm in self._refused

    def get(self, vm: str) -> Verdict | None:
        """The last verdict, if there is one."""
        return self._verdicts.get(vm)

    def forget_vm(self, vm: str) -> None:
        """The VM no longer exists."""
        self._verdicts.pop(vm, None)
        self._refused.discard(vm)

    def judged(self, message: m.VmClockSynced, bound_s: float | None) -> None:
        """A host judged a clock after a resume."""
        self._verdicts[message.vm] = Verdict(
            message.synced, message.error_before_s, message.error_after_s, bound_s
        )

    def checked(self, message: m.AgentClockSynced) -> None:
        """An agent measured its clock. A good verdict of the host is kept: it is about the sync after the pause."""
        if message.refused_step_s is not None:
            self._refused.add(message.vm)
        elif message.exchanges:
            self._refused.discard(message.vm)
        if message.trigger == "resume" or not message.exchanges:
            return  # the host's verdict follows; or there was no answer, and nothing was measured
        known = self._verdicts.get(message.vm)
        if known is not None and not known.good:
            self._verdicts[message.vm] = msgspec.structs.replace(
                known, synced=message.synced, after_s=message.error_after_s
            )
        elif known is None and not message.synced:
            self._verdicts[message.vm] = Verdict(False, message.error_before_s, message.error_after_s)
