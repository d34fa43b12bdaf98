"""One host's password, on a broker as it is shipped: the coordinator goes on leading, for everybody else."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caesura.bus.local_broker import LocalBroker
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import PublishRefused
from caesura.contract import messages as m
from caesura.contract.access import Principal, access_rules
from caesura.runtime.identity import new_id
from caesura.runtime.settings import Secret
from caesura_coordinator.service import Coordinator
from caesura_testing.broker import mosquitto_installed, shipped_mosquitto
from caesura_testing.collector import eventually, running
from caesura_testing.coordinators import leading_coordinator

_FLEET = (Principal("coordinator"), Principal("host", "h1"), Principal("ctl", "ops"))
_PASSWORDS = {each.username: f"password of {each.username}" for each in _FLEET}

pytestmark = pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")


def options(broker: LocalBroker, user: str, **more: Any) -> BrokerOptions:
    return BrokerOptions(
        url=broker.url, username=user, password=Secret(_PASSWORDS[user]), protocol="5", client_id=user, **more
    )


def coordinator(broker: LocalBroker, folder: Path) -> AbstractAsyncContextManager[Coordinator]:
    return leading_coordinator(options(broker, "coordinator", clean=False), folder)


async def test_a_host_cannot_send_the_coordinator_away(tmp_path: Path) -> None:
    async with shipped_mosquitto("broker", tmp_path, users=_PASSWORDS, acl=access_rules(_FLEET)) as broker:
        thief = MessageClient(MqttBus(options(broker, "host_h1")), "/caesura/host/h1")
        operator = MqttBus(
            options(broker, "ctl_ops"),
            filters=["caesura/v1/fleet/ctl/ops/answer", "caesura/v1/fleet/coordinator"],
        )
        asking = MessageClient(operator, "/caesura/ctl/ops")
        answers: list[m.RequestAnswered] = []

        async def keep(answer: m.RequestAnswered, _: object) -> None:
            answers.append(answer)

        asking.subscribe(m.RequestAnswered, keep)
        inventory = m.HostInventory(
            host="h1", driver="process", epoch=1, coordinator="x", vms=(), guard="ready"
        )
        async with (
            coordinator(broker, tmp_path) as made,
            running(thief.bus),
            running(operator, asking.deliver),
        ):
            for epoch in (made.authority.epoch + 1, made.authority.epoch + 500, m.EPOCH_MOST):
                await thief.send(msgspec.structs.replace(inventory, epoch=epoch), host="h1")
                await eventually(lambda epoch=epoch: made.fleet.epochs() == [epoch])  # type: ignore[misc]
                with pytest.raises(PublishRefused):
                    await thief.send(m.CoordinatorPresence(coordinator="x", epoch=epoch, online=True))
                assert made.is_leader
            request = new_id()
            await asking.send(m.RolloutRequested(request=request, update="patch"), client="ops")
            await eventually(lambda: [each.request for each in answers] == [request])
            assert made.authority.epoch == 1
        async with coordinator(broker, tmp_path) as again:
            assert again.authority.epoch == 2, "what is impossible lifts no claim"
