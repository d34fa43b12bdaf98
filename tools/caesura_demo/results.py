"""What a run of the demo has shown: per rollout the rules that held, and the document of ``--json``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from caesura.contract.parts import WholeRollout
from caesura_ctl.session import Session
from caesura_demo.checks import Check, WorkloadStatus
from caesura_demo.layout import Layout


class RolloutResult(msgspec.Struct, frozen=True):
    """One rollout of the demo and its results."""

    rollout: WholeRollout
    checks: list[Check]


def document_of(session: Session, results: Sequence[RolloutResult], urls: dict[str, str]) -> dict[str, Any]:
    """The answer of ``--json``: the last rollout at the top level, since there is usually one, and the list of all."""
    rollouts = []
    for result in results:
        pauses = session.fleet_view.pauses_of(result.rollout.rollout)
        clocks = [session.fleet_view.clocks.get((each.operation, each.vm)) for each in pauses]
        rollouts.append(
            {"rollout": result.rollout, "checks": result.checks, "pauses": pauses, "clocks": clocks}
        )
    held = all(check.held for result in results for check in result.checks)
    return {"held": held, **rollouts[-1], "rollouts": rollouts, "urls": urls}


def verdict_table(checks: Sequence[Check]) -> Table:
    """The rules and whether each held, for people."""
    verdict = Table.grid(padding=(0, 2))
    for check in checks:
        mark = Text("held", style="green") if check.held else Text("BROKEN", style="bold red")
        verdict.add_row(mark, check.rule, Text(check.detail, style="dim"))
    return verdict


def read_workloads(folder: Path, layout: Layout) -> dict[str, WorkloadStatus]:
    """Maps a VM to what its workload wrote last; without those that wrote nothing yet."""
    found = {}
    for vm in layout.vms:
        path = folder / "workloads" / f"{vm.name}.json"
        with suppress(OSError, msgspec.DecodeError):
            found[vm.name] = msgspec.json.decode(path.read_bytes(), type=WorkloadStatus)
    return found


def read_patched(path: Path) -> list[str]:
    """The hosts on which the update ran, in order."""
    return path.read_text(encoding="utf-8").split() if path.exists() else []
