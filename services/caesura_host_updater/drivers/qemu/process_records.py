"""What one life of the host updater leaves to the next about a VM: which process runs it, and what was prepared."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import msgspec

from caesura_vmcontrol.boots import in_this_boot, of_another_boot
from caesura_vmcontrol.durable_files import sync_folder, write_durably
from caesura_vmcontrol.markers import OPERATIONS
from caesura_vmcontrol.plan_errors import BadPlan
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.qemu_plans import ReplacePlan, SwapPlan
from caesura_vmcontrol.resume_plans import plan_from_json, plan_to_json

_PLAN = "plan.json"
TRIAL = "trial"
"""In the place of an operation in the mark of a process that never runs a guest."""


class VmProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The process that runs a VM.

    ``argv``: as if it were the first process of the VM, see ``successor.settled``. ``ours``: started by a host
    updater, which stops it and removes its RAM file; else somebody else's, adopted.
    """

    pid: int
    start_ticks: int
    boot_id: str
    argv: tuple[str, ...]
    qmp: str
    guard: str
    agent: str
    ours: bool
    ram_file: str = ""


class Records:
    """The folder of run files and of what operations prepared. Writes are small and replace a file whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run_file(self, vm: str) -> Path:
        """The VM's run file."""
        return self.folder / f"{vm}.qemu.json"

    def log(self, vm: str) -> Path:
        """What its process says."""
        return self.folder / f"{vm}.qemu.log"

    def next_log(self, vm: str) -> Path:
        """What the process that shall follow says."""
        return self.folder / f"{vm}.next.log"

    def trial_log(self, vm: str) -> Path:
        """What a trial process says."""
        return self.folder / f"{vm}.trial.log"

    def serial_log(self, vm: str) -> Path:
        """What the guest says on its serial line."""
        return self.folder / f"{vm}.serial.log"

    def read(self, vm: str) -> VmProcessRecord | None:
        """The run file; None: there is none that can be read."""
        try:
            return msgspec.json.decode(self.run_file(vm).read_bytes(), type=VmProcessRecord)
        except (OSError, msgspec.DecodeError):
            return None

    def runs(self) -> dict[str, VmProcessRecord]:
        """All run files, by VM."""
        names = [path.name.removesuffix(".qemu.json") for path in self.folder.glob("*.qemu.json")]
        return {name: run for name in names if (run := self.read(name)) is not None}

    def write(self, vm: str, run: VmProcessRecord) -> None:
        """Write the run file. Raises OSError."""
        part = self.folder / f"{vm}.qemu.part"
        part.write_bytes(msgspec.json.encode(run))
        part.replace(self.run_file(vm))

    def forget(self, vm: str) -> None:
        """The VM is stopped for good."""
        for path in (self.run_file(vm), self.log(vm), self.next_log(vm), self.trial_log(vm)):
            path.unlink(missing_ok=True)

    # -- operations -----------------------------------------------------------------------------------------

    def operation(self, vm: str, operation: str) -> Path:
        """What was prepared for one operation on a VM."""
        return self.folder / f"{vm}{OPERATIONS}" / operation

    def begin(self, folder: Path, plan: SwapPlan | ReplacePlan) -> None:
        """Write down what was prepared: a later run finds its way out, after a change of the kernel too. Raises OSError."""
        data = json.dumps({**plan_to_json(plan), "boot_id": boot_id()}).encode()
        if isinstance(plan, ReplacePlan) and plan.across is not None:
            write_durably(str(folder), _PLAN, data)
            for each in (folder.parent, self.folder):
                sync_folder(str(each))
        else:
            (folder / _PLAN).write_bytes(data)

    def unfinished(self, vm: str) -> list[tuple[Path, SwapPlan | ReplacePlan | None]]:
        """What a previous run prepared and did not release; None: it never came to a plan, or its guests ended with the host.

        The old process of one that was begun in another boot, for a change of the kernel, is nobody.
        """
        found = []
        for folder in sorted((self.folder / f"{vm}{OPERATIONS}").glob("*")):
            plan = None
            with suppress(OSError, ValueError, BadPlan):
                raw = json.loads((folder / _PLAN).read_text())
                read = plan_from_json(raw)
                if isinstance(read, SwapPlan | ReplacePlan) and (
                    raw.get("boot_id") == boot_id() or of_another_boot(read)
                ):
                    plan = in_this_boot(read)
            found.append((folder, plan))
        return found

    def end(self, folder: Path) -> None:
        """The operation is over and was disarmed."""
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()
