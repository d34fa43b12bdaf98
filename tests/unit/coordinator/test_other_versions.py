"""Clients and hosts of other versions: each gets an answer that it can place, and the store is neither guessed at nor lost."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.port import Delivery
from caesura.contract import messages as m
from caesura.contract.codec import decode
from caesura.runtime.errors import ConfigError, NewerStore, StoreError
from caesura_coordinator.service import Coordinator, subscriptions
from caesura_coordinator.store import CoordinatorStore
from caesura_testing.collector import eventually


class Desk:
    """A coordinator that leads, and a client that sends any JSON."""

    def __init__(self, bus: MemoryBus) -> None:
        self.bus = bus
        self.answers: list[m.RequestAnswered] = []

    async def receive(self, delivery: Delivery) -> None:
        message = decode(delivery.topic, delivery.payload).message
        if isinstance(message, m.RequestAnswered):
            self.answers.append(message)

    async def ask(self, data: dict[str, Any]) -> None:
        event = {
            "specversion": "1.0",
            "id": "1",
            "source": "/c",
            "type": m.RolloutRequested.TYPE,
            "time": datetime.now(UTC).isoformat(),
            "data": data,
        }
        await self.bus.publish("caesura/v1/ctl/ops/start", json.dumps(event).encode(), qos=1)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="desk", filters=["caesura/v1/fleet/ctl/#"])
    made = Desk(bus)
    store = CoordinatorStore(str(tmp_path / "c.sqlite"))
    coordinator = Coordinator(
        MemoryBus(broker, client_id="c", filters=subscriptions()), store, instance="c", settle_s=0.05
    )
    tasks = [asyncio.ensure_future(start()) for start in coordinator.tasks().values()]
    tasks.append(asyncio.ensure_future(bus.run(made.receive)))
    await bus.wait_connected(5)
    await eventually(lambda: coordinator.is_leader)
    yield made
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    store.database.close()


async def test_a_request_of_a_newer_client_is_answered_under_its_own_id(desk: Desk) -> None:
    """With any other id the client would say that the coordinator is silent."""
    asked = {"request": "r-1", "update": "patch", "policy": {"on_unsynced": "ask"}}
    with capture_logs() as logs:
        for _ in range(3):  # clients repeat a request until it is answered
            await desk.ask(asked)
        await eventually(lambda: len(desk.answers) == 3)
    for answer in desk.answers:
        assert (answer.request, answer.accepted, answer.codes) == ("r-1", False, ("message_invalid",))
        assert "$.policy.on_unsynced" in answer.reason
        assert "newer version" in answer.reason
    assert [line["event"] for line in logs] == ["bus.message_refused"]


@pytest.mark.parametrize("data", [{}, {"request": 7}, {"request": "not an id"}, {"request": "x" * 65}])
async def test_a_request_without_an_id_is_answered_all_the_same(desk: Desk, data: dict[str, Any]) -> None:
    await desk.ask({"update": "patch", **data})
    await eventually(lambda: bool(desk.answers))
    assert [each.request for each in desk.answers] == ["unreadable"]


def test_a_store_of_a_newer_version_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    CoordinatorStore(str(path)).database.close()
    with sqlite3.connect(path) as file:
        file.execute("PRAGMA user_version=99")
    file.close()
    before = path.read_bytes()
    with pytest.raises(NewerStore, match=r"schema version 99.*run the newer version") as refused:
        CoordinatorStore(str(path))
    assert refused.value.exit_code == ConfigError.exit_code, "its unit is not started again and again"
    assert path.read_bytes() == before


def test_a_record_of_a_newer_version_in_the_store_is_not_called_damaged_only(tmp_path: Path) -> None:
    store = CoordinatorStore(str(tmp_path / "c.sqlite"))
    body = {"set": "web", "incarnation": 3, "events": [{"event_type": "Hover"}]}
    store.database.run("INSERT INTO document VALUES ('web', ?)", json.dumps(body).encode())
    with pytest.raises(StoreError, match=r"document of set web .* cannot be read: .*newer Caesura"):
        store.documents()
    store.database.close()
