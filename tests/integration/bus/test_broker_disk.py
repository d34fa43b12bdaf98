"""One password must not wear out the broker's disk: what it writes follows time, not messages."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import pytest

from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.contract.access import Principal, access_rules
from caesura.contract.topics import PREFIX
from caesura.runtime.settings import Secret
from caesura_testing.broker import mosquitto_installed, shipped_mosquitto
from caesura_testing.collector import Collector, eventually, running

_VM = Principal("vm", "web-1", "web")
_PRESENCE = f"{PREFIX}/vm/web-1/presence"
_PASSWORD = "secret"  # noqa: S105 - of a broker that lives for a test
_CHANGES = 2_000
_PAYLOAD_BYTES = 50_000


def written_bytes(pid: int | None) -> int:
    """What a process has written so far (``wchar``, proc(5))."""
    lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


@pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")
@pytest.mark.parametrize("shipped", ["broker", "compose"])
async def test_a_flood_of_changes_is_not_a_flood_to_the_disk_and_the_last_one_is_on_it(
    shipped: Literal["broker", "compose"], tmp_path: Path
) -> None:
    broker = shipped_mosquitto(shipped, tmp_path, users={_VM.username: _PASSWORD}, acl=access_rules([_VM]))
    async with broker:
        options = BrokerOptions(url=broker.url, username=_VM.username, password=Secret(_PASSWORD))
        agent = MqttBus(options)
        async with running(agent):
            await agent.publish(_PRESENCE, bytes(_PAYLOAD_BYTES), retain=True)
            before = written_bytes(broker.pid)
            body = bytes(_PAYLOAD_BYTES - 4)
            for first in range(0, _CHANGES, 100):
                await asyncio.gather(
                    *(
                        agent.publish(_PRESENCE, number.to_bytes(4) + body, retain=True)
                        for number in range(first, first + 100)
                    )
                )
            # Each change on its own would be 100 MB, of a database that holds this one message.
            assert written_bytes(broker.pid) - before < _CHANGES * _PAYLOAD_BYTES / 4
            last = (_CHANGES - 1).to_bytes(4) + body
            store = tmp_path / "mosquitto.db"
            await eventually(lambda: store.exists() and last[:64] in store.read_bytes())
            await broker.kill()
        await broker.start()
        got = Collector()
        # A VM may not read its own presence: who may is asked with the rules of an exporter.
        (tmp_path / "acl").write_text(f"user {_VM.username}\ntopic read {_PRESENCE}\n")
        await broker.restart()
        async with running(MqttBus(options, filters=[_PRESENCE]), got.receive):
            await got.until_payload(last)
