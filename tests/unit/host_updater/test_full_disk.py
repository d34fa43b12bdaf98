"""A full disk while an operation is under way: commands that come meanwhile do not end it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.port import Delivery
from caesura.contract.codec import encode
from caesura.contract.messages import FreezeCommanded, FreezeTarget
from caesura.contract.topics import channel_of
from caesura.runtime.errors import StoreError
from caesura_host_updater.hostfile import HostFile
from caesura_host_updater.journal import Journal, JournalThread
from caesura_host_updater.service import HostUpdater
from caesura_host_updater.settings import HostUpdaterSettings


def _full(*_: object) -> None:
    raise StoreError("disk full")


async def test_a_command_under_a_new_epoch_that_cannot_be_written_down_does_not_end_what_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator was restarted and repeats the command of the pause that lasts."""
    monkeypatch.setattr(HostUpdater, "operation", "op")
    monkeypatch.setattr(Journal, "obey", _full)
    journal = JournalThread()
    await journal.open(str(tmp_path / "journal.sqlite"))
    idle: Any = SimpleNamespace(
        capabilities=None, states=dict, finished=lambda *_: None, name="idle", detail=str
    )
    updater = HostUpdater(
        HostUpdaterSettings(host_file="h.toml", updates_dir=str(tmp_path), state_dir=str(tmp_path)),
        HostFile(host="host-1"),
        bus=MemoryBus(MemoryBroker(), client_id="h", filters=[]),
        driver=idle,
        guardian=idle,
        journal=journal,
        metrics=idle,
        instance="i",
        environ={},
    )
    command = FreezeCommanded(
        operation="op",
        epoch=2,
        coordinator="c2",
        host="host-1",
        rollout="r",
        wave=0,
        method="freeze",
        targets=(FreezeTarget(vm="a", set="web", update_domain=0),),
        budget_s=10.0,
        hold_s=1.0,
        not_after=datetime.now(UTC) + timedelta(seconds=30),
    )
    await updater.post.deliver(
        Delivery(
            channel_of(FreezeCommanded).topic(host="host-1"),
            encode(command, source="/c2", event_id="e", time=datetime.now(UTC)),
        )
    )
    assert [each.body for each in await journal.do(Journal.letters)] == [], "no report: it has not ended"
    assert await journal.do(lambda j: j.find("op")) is None
    await journal.close()
