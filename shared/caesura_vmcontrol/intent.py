"""What the guard remembers on disk: one file, written whole and fsynced, removed when the operation was acknowledged."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH105, PTH108, PTH123

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

from caesura_vmcontrol import kernel_change
from caesura_vmcontrol.durable_files import sync_folder, write_durably
from caesura_vmcontrol.kernel_change import KernelChange
from caesura_vmcontrol.resume_plans import ResumePlan, plan_from_json, plan_to_json
from caesura_vmcontrol.sealed_files import is_sealed, seal, unseal

_FILE = "guard-intent.json"
FORMAT = 1
FORMAT_ACROSS_BOOTS = 2
"""Only where the host's kernel is replaced: a guard that does not know it must not clear it away as another boot's."""


class UnreadableIntent(ValueError):
    """The intent file is not ours; it is kept aside so that nothing is lost."""


@dataclass
class Intervention:
    """What the guard did to one VM. Instants are seconds on CLOCK_MONOTONIC."""

    was_frozen: bool
    """Whether it was paused when the guard looked."""
    frozen_after: float | None = None
    """It was last seen running at this instant, if the guard saw it running before it was paused."""
    running_at: float | None = None
    """When the kernel showed that it runs (or that it is gone)."""
    end: str = ""
    """``running`` or ``gone``; empty while neither."""
    owner: str = ""
    """Swap and replace: which process runs the guest, ``old`` or the claim ``new:...``; else empty."""


@dataclass
class GuardAction:
    """That the guard acted: why, when, and with what result."""

    why: str
    at: float
    vms: dict[str, Intervention] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether every VM runs or is gone."""
        return all(intervention.end for intervention in self.vms.values())


@dataclass
class Intent:
    """One armed operation. ``deadline`` and ``armed_at``: seconds on the CLOCK_MONOTONIC of boot ``boot_id``."""

    operation: str
    boot_id: str
    armed_at: float
    deadline: float
    plans: tuple[ResumePlan, ...]
    fired: GuardAction | None = None
    kernel_change: KernelChange | None = None
    """The host's kernel is replaced in the pause; another boot completes the operation."""

    def to_json(self) -> dict[str, Any]:
        """The intent as it is on disk and is sent to the updater."""
        fired = self.fired
        change = self.kernel_change
        across = {} if change is None else {"kernel_change": kernel_change.to_json(change)}
        return {
            **across,
            "format": FORMAT if change is None else FORMAT_ACROSS_BOOTS,
            "operation": self.operation,
            "boot_id": self.boot_id,
            "armed_at": self.armed_at,
            "deadline": self.deadline,
            "plans": [plan_to_json(plan) for plan in self.plans],
            "fired": None
            if fired is None
            else {
                "why": fired.why,
                "at": fired.at,
                "vms": {vm: vars(intervention) for vm, intervention in fired.vms.items()},
            },
        }

    @classmethod
    def from_json(cls, data: Any) -> Intent:
        """Read an intent. Raises UnreadableIntent."""
        try:
            if data["format"] not in (FORMAT, FORMAT_ACROSS_BOOTS):
                raise UnreadableIntent(
                    f"intent of format {data['format']}, this guard knows {FORMAT} and {FORMAT_ACROSS_BOOTS}"
                )
            change = data["kernel_change"] if data["format"] == FORMAT_ACROSS_BOOTS else None
            action = data["fired"]
            fired = None
            if action is not None:
                interventions = {
                    vm: Intervention(**intervention) for vm, intervention in action["vms"].items()
                }
                fired = GuardAction(action["why"], float(action["at"]), interventions)
            return cls(
                str(data["operation"]),
                str(data["boot_id"]),
                float(data["armed_at"]),
                float(data["deadline"]),
                tuple(plan_from_json(plan) for plan in data["plans"]),
                fired,
                None if change is None else kernel_change.from_json(change),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnreadableIntent(f"the guard's intent cannot be read: {error}") from error


class IntentFile:
    """The one intent on disk.

    Raises:
        OSError: the disk refused (full, read-only): the caller must not act on the intent.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._path = f"{folder}/{_FILE}"

    def load(self) -> Intent | None:
        """The intent of a previous run, or None. Raises UnreadableIntent after putting the file aside."""
        try:
            return self.read()
        except UnreadableIntent:
            os.replace(self._path, f"{self._path}.unreadable")
            raise

    def read(self) -> Intent | None:
        """As ``load``, and an unreadable file stays where it is. Raises UnreadableIntent."""
        try:
            with open(self._path, "rb") as file:
                raw = file.read()
            # Before there were checksums it was plain JSON.
            return Intent.from_json(unseal(raw) if is_sealed(raw) else json.loads(raw))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UnreadableIntent(str(error)) from error

    def store(self, intent: Intent) -> None:
        """Write and fsync; when this has returned, the intent survives anything short of losing the disk."""
        write_durably(self._folder, _FILE, seal(intent.to_json()))

    def clear(self) -> None:
        """Remove the intent."""
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            return
        sync_folder(self._folder)
