"""What a coordinator that stands by remembers of the bus: no more than it will need when it leads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec

from caesura.contract.examples import examples
from caesura.contract.messages import RolloutState
from caesura_coordinator.reconciler import Reconciler
from caesura_coordinator.retention import KEPT


async def test_a_standby_keeps_running_rollouts_and_the_last_ones_that_ended() -> None:
    anything: Any = SimpleNamespace(is_leader=False, claimed=False)
    made = Reconciler(
        anything, anything, anything, source="", fleet_now=lambda: anything, now=lambda: anything
    )
    example = next(each.message for each in examples() if isinstance(each.message, RolloutState))

    async def arrives(name: str, status: str) -> None:
        await made.on_rollout(msgspec.structs.replace(example, rollout=name, status=status), anything)

    for number in range(3):
        await arrives(f"running-{number}", "running")
    for number in range(KEPT + 100):
        await arrives(f"ended-{number}", "completed")
    await arrives("running-0", "aborted")
    kept = set(made._pending_rollouts)
    assert {"running-0", "running-1", "running-2", f"ended-{KEPT + 99}"} <= kept
    assert len(kept) == KEPT + 2
    await made.on_rollout_removed({"rollout": "running-1"})
    assert "running-1" not in made._pending_rollouts
