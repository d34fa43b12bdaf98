"""Whole rollouts on three nodes of NATS and of RabbitMQ, with users and access rules as shipped, while nodes are killed, hang and are restarted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import options_from
from caesura.contract.access import Principal, VmPlacement, nats_users, rabbitmq_definitions
from caesura.contract.codec import Received
from caesura.contract.envelope import Message
from caesura.contract.topics import CHANNELS, PREFIX
from caesura.runtime.settings import Secret
from caesura_ctl.fleet_view import FleetView
from caesura_ctl.session import connect
from caesura_ctl.settings import CtlSettings
from caesura_metrics_exporter.settings import MetricsExporterSettings
from caesura_testing.broker_nodes import BrokerNode
from caesura_testing.cluster_harness import password_of, started
from caesura_testing.nats_cluster import NatsCluster, nats_server
from caesura_testing.patience import patient
from caesura_testing.rabbitmq_cluster import RabbitmqCluster, rabbitmq_server
from caesura_testing.sandbox import Sandbox, Vm

Cluster = NatsCluster | RabbitmqCluster

_USERS = (
    Principal("coordinator"),
    Principal("exporter"),
    *(
        Principal("host", f"host-{n}", vms=(f"web-{n}",), places=(VmPlacement(f"web-{n}", "web", n - 1),))
        for n in (1, 2)
    ),
    *(Principal("vm", f"web-{n}", "web") for n in (1, 2)),
    Principal("metadata", "fleet", vms=("web-1", "web-2")),
    Principal("ctl", "e2e"),
)
# What RabbitMQ retained is of one node only.
_RETAINED: dict[str, Literal["trusted", "ignored"]] = {"nats": "trusted", "rabbitmq": "ignored"}


@pytest.fixture(scope="module", params=[pytest.param("nats", marks=pytest.mark.nats), "rabbitmq"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if not (nats_server() if name == "nats" else rabbitmq_server()):
        pytest.skip(f"{name} is not installed")
    return name


@pytest.fixture(scope="module")
def cluster(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp(engine)
    passwords = {each.username: password_of(each) for each in _USERS}
    cluster: Cluster = (
        NatsCluster(folder, nats_users(_USERS), passwords)
        if engine == "nats"
        else RabbitmqCluster(folder, rabbitmq_definitions(_USERS), passwords)
    )
    with started(cluster):
        yield cluster


@pytest.fixture
def login(tmp_path: Path, engine: str) -> Callable[[str], dict[str, str]]:
    """The settings of a user, without prefix."""

    def of(user: str) -> dict[str, str]:
        path = tmp_path / user
        path.touch(mode=0o600)
        path.write_text(f"password of {user}\n")
        return {
            "broker_username": user,
            "broker_password_file": str(path),
            "broker_protocol": "3.1.1",
            "broker_retained": _RETAINED[engine],
        }

    return of


@pytest.fixture
async def stage(
    cluster: Cluster, engine: str, login: Callable[[str], dict[str, str]], new_stage: Any
) -> AsyncIterator[Any]:
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(Sandbox(cluster))  # type: ignore[arg-type]
        settings = CtlSettings(
            broker_url=cluster.url,
            broker_username="ctl_e2e",
            broker_password=Secret("password of ctl_e2e"),
            broker_protocol="3.1.1",
            broker_retained=_RETAINED[engine],
            client="e2e",
        )
        session = await stack.enter_async_context(connect(settings, connect_s=patient(10)))
        made = new_stage(sandbox, session)
        sandbox.coordinator(**login("coordinator"))
        sandbox.update("patch", ["sleep", "4"], expected_s=4.0)
        for number in (1, 2):
            name = f"web-{number}"
            vm = Vm(name=name, set="web", update_domain=number - 1, agent_settings=login(f"vm_{name}"))
            sandbox.host(f"host-{number}", vm, **login(f"host_host-{number}"))
        await made.up("host-1", "host-2")
        yield made


@asynccontextmanager
async def reader_of(cluster: Cluster) -> AsyncIterator[FleetView]:
    """A consumer with the rights and a session of an exporter: no fact may be missing in the end."""
    fleet_view = FleetView()

    async def fold(message: Message, _: Received) -> None:
        fleet_view.fold(message)

    settings = MetricsExporterSettings(
        broker_url=cluster.url,
        broker_username="exporter",
        broker_password=Secret("password of exporter"),
        broker_protocol="3.1.1",
    )
    bus = MqttBus(
        options_from(settings, client_id="caesura-metrics-exporter", clean=False), filters=[f"{PREFIX}/#"]
    )
    post = MessageClient(bus, "/reader")
    for channel in CHANNELS:
        post.subscribe(channel.message, fold)
    running = asyncio.create_task(bus.run(post.deliver))
    assert await bus.wait_connected(patient(15))
    yield fleet_view
    await bus.close()
    await running


async def completed(stage: Any, seen: FleetView, rollout: str) -> None:
    """The rollout ended well, in order, and every fact of it reached everybody."""
    state = await stage.ended(rollout, timeout_s=120.0)
    assert state.status == "completed", state.reason
    stage.assert_order()

    def told() -> bool:
        facts = [each for each in seen.events.values() if each[0].rollout == rollout]
        return len(facts) == 2 and all(each[-1].status == "completed" for each in facts)

    await stage.sandbox.until(told, 60, "every fact arrives after all")
    for facts in seen.events.values():
        assert [each.status for each in facts] == ["scheduled", "started", "completed"]
        incarnations = [each.incarnation for each in facts]
        assert incarnations == sorted(set(incarnations))


def node_of(stage: Any, cluster: Cluster, host: str) -> BrokerNode:
    """The node that a host is connected to."""
    connected = [each["broker"] for each in stage.sandbox.events(host) if each["event"] == "bus.connected"]
    return next(node for node in cluster.nodes if connected[-1].endswith(f":{node.port}"))


@pytest.mark.parametrize("number", [1, 2])
async def test_the_node_of_a_host_is_killed_in_its_wave(stage: Any, cluster: Cluster, number: int) -> None:
    """It does not come back before the end of the rollout: what the host reports goes to another node."""
    async with reader_of(cluster) as seen:
        rollout = await stage.roll(verify_timeout_s=90.0)
        await stage.frozen(f"web-{number}", timeout_s=60.0)
        await node_of(stage, cluster, f"host-{number}").kill()
        await completed(stage, seen, rollout)
    assert stage.sandbox.watch.longest_s() < 15.0
    await cluster.start()


async def test_all_nodes_are_restarted_one_after_the_other_in_a_rollout(stage: Any, cluster: Cluster) -> None:
    async with reader_of(cluster) as seen:
        rollout = await stage.roll(verify_timeout_s=90.0, soak_s=5.0)
        await stage.frozen("web-1")
        for node in cluster.nodes:
            await node.stop()
            await cluster.start()
        await completed(stage, seen, rollout)


async def test_a_node_that_hangs_in_a_wave_is_left(stage: Any, cluster: Cluster) -> None:
    async with reader_of(cluster) as seen:
        rollout = await stage.roll(verify_timeout_s=90.0)
        await stage.frozen("web-1")
        cluster.nodes[2].hang()
        try:
            await completed(stage, seen, rollout)
        finally:
            cluster.nodes[2].wake()
