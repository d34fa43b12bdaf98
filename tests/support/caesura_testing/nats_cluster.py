"""Three NATS servers with JetStream on loopback, with the shipped configuration or with one user for the bus conformance suite."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from caesura.bus.local_broker import free_port
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.runtime.settings import Secret
from caesura_testing.broker_nodes import BrokerCluster, BrokerNode
from caesura_testing.collector import Collector, eventually, running
from caesura_testing.patience import patient

_SHIPPED = Path(__file__).resolve().parents[3] / "deploy" / "nats" / "nats-server.conf"
_NODES = 3
_FORM_S = patient(60.0)
READY_USER, READY_PASSWORD = "readiness", "readiness"
_READY = (
    f'  {{ user: "{READY_USER}", password: "{READY_PASSWORD}", allowed_connection_types: ["MQTT"], '
    'permissions: { publish: { allow: ["readiness.>"] }, subscribe: { allow: ["readiness.>", "$MQTT.sub.>"] } } }\n]'
)


def nats_server() -> str:
    """The program; empty where it is not installed."""
    return shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin:/usr/local/sbin") or ""


class NatsCluster(BrokerCluster):
    """Three nodes; enter it with ``async with``.

    Args:
        folder: a temporary folder of the test.
        users: the text of ``users.conf``, such as ``caesura acl --format nats`` makes.
        passwords: those of the users.
    """

    protocol = "auto"

    def __init__(self, folder: Path, users: str, passwords: Mapping[str, str]) -> None:
        cluster_ports = [free_port() for _ in range(_NODES)]
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in cluster_ports)
        (folder / "users.conf").write_text(users.rstrip().removesuffix("]") + _READY + "\n")
        (folder / "passwords.conf").write_text(
            "".join(f'password_{user}: "{password}"\n' for user, password in passwords.items())
        )
        self.nodes: list[BrokerNode] = []
        self.client_ports = [free_port() for _ in range(_NODES)]
        """Of NATS's own protocol."""
        for number, cluster_port in enumerate(cluster_ports, 1):
            port = free_port()
            config = folder / f"nats-{number}.conf"
            config.write_text(
                _here(
                    _SHIPPED.read_text(),
                    {
                        r"server_name: .*": f"server_name: broker-{number}",
                        r'listen: "127\.0\.0\.1:4222"': f'listen: "127.0.0.1:{self.client_ports[number - 1]}"',
                        r"http: .*": "",
                        r'listen: "0\.0\.0\.0:6222"': f'listen: "127.0.0.1:{cluster_port}"',
                        r'listen: "0\.0\.0\.0:8883"': f'listen: "127.0.0.1:{port}"',
                        r"/var/lib/nats": f"{folder}/nats-{number}",
                        r"routes: .*": f"routes: [ {routes} ]",
                        r"tls \{.*\}": "",
                    },
                )
            )
            self.nodes.append(BrokerNode(f"nats-{number}", [nats_server(), "-c", str(config)], folder, port))

    async def start(self) -> None:
        """Start the nodes that do not run, and wait until each serves."""
        started = [node for node in self.nodes if not node.runs]
        for node in started:
            node.start()
        for node in started:
            await self.serves(node)

    async def serves(self, node: BrokerNode) -> None:
        """Wait until a client of this node gets what it retained: MQTT works only once there is a leader.

        Raises:
            AssertionError, TimeoutError: it does not, with the end of its log.
        """
        got = Collector()
        topic = f"readiness/{node.name}"
        bus = MqttBus(
            BrokerOptions(
                url=node.url,
                client_id=topic.replace("/", "-"),
                username=READY_USER,
                password=Secret(READY_PASSWORD),
                protocol="3.1.1",
                reconnect_min_s=0.1,
                reconnect_max_s=0.5,
            ),
            filters=[topic],
        )
        try:
            async with running(bus, got.receive, timeout_s=_FORM_S):
                await bus.publish(topic, b"1", retain=True, timeout_s=_FORM_S)
                await eventually(lambda: bool(got.deliveries), _FORM_S)
        except AssertionError as error:
            raise AssertionError(f"{error}; {node.log.read_text()[-2000:]}") from error


def _here(shipped: str, changes: Mapping[str, str]) -> str:
    """The shipped configuration with this machine's folders and ports, without TLS.

    Raises:
        ValueError: a line that should be changed is not there.
    """
    for old, new in changes.items():
        shipped, found = re.subn(old, lambda _, new=new: new, shipped)  # type: ignore[misc]
        if not found:
            raise ValueError(f"deploy/nats/nats-server.conf has no line like {old}")
    return shipped
