"""The whole suite on a broker with passwords and the generated access rules: it works, and nobody can do more."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Delivery, PublishRefused
from caesura.contract.access import Principal, access_rules
from caesura.contract.topics import PREFIX
from caesura.runtime.settings import Secret
from caesura_ctl.session import connect
from caesura_ctl.settings import CtlSettings
from caesura_testing.broker import mosquitto, mosquitto_installed
from caesura_testing.patience import patient
from caesura_testing.sandbox import Sandbox, Vm

_USERS = (
    Principal("coordinator"),
    Principal("host", "host-1"),
    Principal("vm", "web-1", "web"),
    Principal("vm", "web-2", "db"),
    Principal("metadata", "fleet"),
    Principal("ctl", "e2e"),
)


@pytest.fixture
def passwords(tmp_path: Path) -> Mapping[str, Path]:
    folder = tmp_path / "secrets"
    folder.mkdir()
    found = {}
    for user in _USERS:
        found[user.username] = folder / user.username
        found[user.username].touch(mode=0o600)
        found[user.username].write_text(f"password of {user.username}\n")
    return found


async def test_a_rollout_under_least_rights(
    passwords: Mapping[str, Path], tmp_path: Path, new_stage: Any
) -> None:
    if not mosquitto_installed():
        pytest.skip("mosquitto is not installed (on Debian: apt-get install mosquitto)")
    users = {name: path.read_text().strip() for name, path in passwords.items()}

    def login(user: str) -> dict[str, str]:
        return {"broker_username": user, "broker_password_file": str(passwords[user])}

    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(mosquitto(tmp_path, users=users, acl=access_rules(_USERS)))
        sandbox = await stack.enter_async_context(Sandbox(broker))
        settings = CtlSettings(
            broker_url=broker.url,
            broker_username="ctl_e2e",
            broker_password=Secret(users["ctl_e2e"]),
            client="e2e",
        )
        session = await stack.enter_async_context(connect(settings))
        stage = new_stage(sandbox, session)
        sandbox.coordinator(**login("coordinator"))
        sandbox.update("patch", ["sleep", "1"])
        sandbox.host(
            "host-1", Vm(name="web-1", set="web", agent_settings=login("vm_web-1")), **login("host_host-1")
        )
        await stage.up("host-1")
        state = await stage.ended(await stage.roll())
        assert state.status == "completed", state.reason
        assert [each.vm for each in sandbox.watch.pauses] == ["web-1"]

        # A VM of another set: it can neither speak for others nor hear them.
        heard: list[str] = []

        async def listen(delivery: Delivery) -> None:
            heard.append(delivery.topic)

        spy = MqttBus(
            BrokerOptions(
                url=broker.url,
                username="vm_web-2",
                password=Secret(users["vm_web-2"]),
                client_id="x",
                protocol="5",
            ),
            filters=["#", f"{PREFIX}/fleet/set/web/document"],
        )
        running = asyncio.create_task(spy.run(listen))
        assert await spy.wait_connected(patient(5))
        for topic in (
            f"{PREFIX}/fleet/host/host-1/operation/start",
            f"{PREFIX}/vm/web-1/ready",
            f"{PREFIX}/host/host-1/inventory",
            f"{PREFIX}/metadata/fleet/approval",
            f"{PREFIX}/ctl/e2e/start",
        ):
            with pytest.raises(PublishRefused):
                await spy.publish(topic, b"{}")
        await spy.publish(f"{PREFIX}/vm/web-2/hook", b"{}")
        again = await stage.ended(await stage.roll())
        assert again.status == "completed", again.reason
        await spy.close()
        await running
        assert heard == [], "a VM of set db heard of set web"
