"""Following a rollout comes to an end, whatever of it was seen."""

from __future__ import annotations

import asyncio
import io
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from rich.console import Console

from caesura.contract import messages as m
from caesura_ctl import follow as following
from caesura_ctl.commandline import Context
from caesura_ctl.picture import Picture
from caesura_ctl.session import Session
from caesura_ctl.settings import CtlSettings
from caesura_ctl.tables import live_view

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)


class Seen:
    """What ``follow`` needs of a session."""

    def __init__(self) -> None:
        self.picture = Picture()
        self.changed = asyncio.Event()

    def hear(self, message: Any) -> None:
        self.picture.fold(message)
        self.changed.set()


def _state(status: m.RolloutStatus, name: str = "r") -> m.RolloutState:
    wave = m.WaveState(
        wave=0,
        status="completed",
        domains={"web": 0},
        hosts=("h",),
        vms=("w1",),
        events={"web": "E"},
        reason=f"wave of {name}",
    )
    return m.RolloutState(
        rollout=name,
        update="patch",
        status=status,
        policy=m.Policy(),
        sets=("web",),
        waves=(wave,),
        created_at=T0,
    )


async def _follow(seen: Seen) -> m.RolloutState:
    context = Context(CtlSettings(), False, Console(file=io.StringIO(), width=140))
    async with asyncio.timeout(10):
        return await following.follow(cast("Session", seen), context, "r")


async def test_one_that_was_over_before_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_LAST_FACTS_S", 60.0)
    seen = Seen()
    seen.hear(_state("completed"))
    assert (await _follow(seen)).status == "completed"


async def test_one_whose_first_pauses_were_not_seen_ends_soon_after_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "_LAST_FACTS_S", 0.1)
    seen = Seen()
    seen.hear(_state("running"))
    task = asyncio.create_task(_follow(seen))
    await asyncio.sleep(0)
    seen.hear(_state("completed"))
    assert (await task).status == "completed"


async def test_the_last_facts_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_LAST_FACTS_S", 60.0)
    seen = Seen()
    seen.hear(_state("running"))
    task = asyncio.create_task(_follow(seen))
    await asyncio.sleep(0)
    seen.hear(_state("completed"))
    done, _ = await asyncio.wait({task}, timeout=0.5)
    assert not done
    common: dict[str, Any] = {
        "vm": "w1",
        "host": "h",
        "set": "web",
        "update_domain": 0,
        "operation": "o",
        "at": T0,
    }
    seen.hear(m.OperationReported(operation="o", host="h", epoch=1, rollout="r", status="completed", at=T0))
    seen.hear(
        m.VmResumed(
            **common, method="freeze", pause_s=1, budget_s=9, within_budget=True, resumed_by="updater"
        )
    )
    assert (await task).status == "completed"


def test_the_live_view_shows_the_rollout_that_was_asked_for() -> None:
    seen = Picture()
    seen.fold(_state("completed", "r"))
    seen.fold(_state("running", "other"))
    console = Console(file=io.StringIO(), width=140)
    console.print(live_view(seen, T0, "r"))
    assert isinstance(console.file, io.StringIO)
    assert "wave of r" in console.file.getvalue()
    assert "wave of other" not in console.file.getvalue()
