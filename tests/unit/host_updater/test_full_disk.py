"""A full disk while an operation is under way: commands that come meanwhile do not end it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caesura.contract.messages import StartOperation
from caesura.delivery.sqlite_outbox import OutboxTable
from caesura.runtime.errors import StoreError
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.journal import Journal, JournalThread
from caesura_host_updater.operation.current_operation import CurrentOperation
from caesura_host_updater.service import HostUpdater


def _full(*_: object) -> None:
    raise StoreError("disk full")


async def test_a_command_under_a_new_epoch_that_cannot_be_written_down_does_not_end_what_is_under_way(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    freeze_one: Callable[..., StartOperation],
    updater_with: Callable[..., HostUpdater],
    hand: Callable[..., Any],
) -> None:
    """The coordinator was restarted and repeats the command of the pause that lasts."""
    monkeypatch.setattr(CurrentOperation, "operation", "op")
    monkeypatch.setattr(Journal, "obey", _full)
    journal = JournalThread()
    await journal.open(str(tmp_path / "journal.sqlite"))

    async def no_states() -> dict[str, str]:
        return {}

    idle = SimpleNamespace(
        capabilities=None,
        read_states=no_states,
        finished=lambda *_: None,
        name="idle",
        detail=str,
        on_lost=None,
        pause_risk=lambda _: "",
    )
    updater = updater_with(HostFile(host="host-1"), journal, driver=idle, metrics=idle)
    await hand(updater, freeze_one(epoch=2, coordinator="c2"))
    assert [each.payload for each in await journal.outbox(OutboxTable.load)] == [], (
        "no report: it has not ended"
    )
    assert await journal.do(lambda j: j.find("op")) is None
    await journal.close()
