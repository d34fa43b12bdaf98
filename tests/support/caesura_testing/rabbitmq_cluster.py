"""Three RabbitMQ servers on loopback with the shipped configuration, run from a temporary folder: nothing of the system's own is used."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caesura.bus.local_broker import free_port
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.runtime.settings import Secret
from caesura_testing.broker_nodes import BrokerCluster, BrokerNode
from caesura_testing.collector import Collector, running
from caesura_testing.patience import patient

_SHIPPED = Path(__file__).resolve().parents[3] / "deploy" / "rabbitmq"
_NODES = 3
_FORM_S = patient(120.0)
_READY = "readiness"


def rabbitmq_server() -> str:
    """The program; empty where it is not installed. Debian's wrapper in /usr/sbin would change to another user."""
    found = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))
    return str(found[-1]) if found else ""


class RabbitmqCluster(BrokerCluster):
    """Three nodes; enter it with ``async with``.

    Args:
        folder: a temporary folder of the test.
        definitions: such as ``caesura acl --format rabbitmq`` makes.
        passwords: those of the users.
    """

    protocol = "auto"

    def __init__(self, folder: Path, definitions: str, passwords: Mapping[str, str]) -> None:
        (folder / "definitions.json").write_text(json.dumps(_with_users(json.loads(definitions), passwords)))
        cookie = folder / ".erlang.cookie"
        cookie.write_text("of these tests")
        cookie.chmod(0o400)
        (folder / "plugins").write_text("[rabbitmq_mqtt].")
        # Names of nodes are known to one epmd, which has a port of its own here.
        names = [f"caesura{free_port()}@localhost" for _ in range(_NODES)]
        epmd = free_port()
        self._epmd = BrokerNode(
            "epmd",
            [_epmd()],
            folder,
            epmd,
            {"ERL_EPMD_PORT": str(epmd), "ERL_EPMD_ADDRESS": "127.0.0.1", "PATH": os.environ["PATH"]},
        )
        self.nodes: list[BrokerNode] = []
        self._formed = False
        for number, name in enumerate(names, 1):
            home = folder / f"rabbitmq-{number}"
            home.mkdir()
            port = free_port()
            (home / "rabbitmq.conf").write_text(_config(names, port, folder))
            environ = {
                "PATH": os.environ["PATH"],
                "LANG": "C.UTF-8",
                "HOME": str(folder),
                "ERL_EPMD_PORT": str(epmd),
                "ERL_EPMD_ADDRESS": "127.0.0.1",
                "RABBITMQ_NODENAME": name,
                "RABBITMQ_DIST_PORT": str(free_port()),
                "RABBITMQ_MNESIA_BASE": str(home),
                "RABBITMQ_MNESIA_DIR": f"{home}/mnesia",
                "RABBITMQ_LOG_BASE": str(home),
                "RABBITMQ_LOGS": "-",
                "RABBITMQ_CONF_ENV_FILE": "/dev/null",
                "RABBITMQ_CONFIG_FILE": f"{home}/rabbitmq.conf",
                "RABBITMQ_ADVANCED_CONFIG_FILE": str(_SHIPPED / "advanced.config"),
                "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
                "RABBITMQ_PID_FILE": f"{home}/pid",
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
            }
            self.nodes.append(
                BrokerNode(f"rabbitmq-{number}", [rabbitmq_server()], folder, port, environ, group=True)
            )

    async def start(self) -> None:
        """Start the nodes that do not run, and wait until each serves."""
        if not self._epmd.runs:
            self._epmd.start()
        started = [node for node in self.nodes if not node.runs]
        for node in started:
            node.start()
            if not self._formed:
                # Nodes that join at the same moment may stay outside of what keeps client ids ("cluster_change_not_permitted"), and
                # accept no MQTT client until they are restarted.
                await self.serves(node)
        self._formed = True
        for node in started:
            await self.serves(node)

    async def close(self) -> None:
        """End everything that was started."""
        await super().close()
        await self._epmd.kill()

    async def serves(self, node: BrokerNode) -> None:
        """Wait until a client of this node receives what it published.

        Raises:
            AssertionError: it does not, with the end of its log.
        """
        got = Collector()
        bus = MqttBus(
            BrokerOptions(
                url=node.url,
                client_id=f"readiness-{node.name}",
                username=_READY,
                password=Secret(_READY),
                protocol="3.1.1",
                reconnect_min_s=0.2,
                reconnect_max_s=1.0,
            ),
            filters=[f"readiness/{node.name}"],
        )
        try:
            async with running(bus, got.receive, timeout_s=_FORM_S):
                await bus.publish(f"readiness/{node.name}", b"1", timeout_s=_FORM_S)
                await got.until_payload(b"1")
        except AssertionError as error:
            raise AssertionError(f"{error}; {node.log.read_text(errors='replace')[-2000:]}") from error


def _config(names: list[str], port: int, folder: Path) -> str:
    """The shipped configuration with this machine's folders and ports, without TLS.

    Raises:
        ValueError: a line that should be changed is not there.
    """
    lines = (_SHIPPED / "rabbitmq.conf").read_text().splitlines()
    changes = {
        **{f"cluster_formation.classic_config.nodes.{number}": name for number, name in enumerate(names, 1)},
        "mqtt.listeners.tcp": "",
        "mqtt.listeners.ssl.default": "",
        "ssl_options.cacertfile": "",
        "ssl_options.certfile": "",
        "ssl_options.keyfile": "",
    }
    found = []
    for line in lines:
        key = line.partition(" = ")[0]
        if key not in changes:
            found.append(line)
        elif value := changes.pop(key):
            found.append(f"{key} = {value}")
    if any(changes):
        raise ValueError(f"deploy/rabbitmq/rabbitmq.conf has no line {', '.join(changes)}")
    return "\n".join(
        [
            *found,
            f"mqtt.listeners.tcp.1 = 127.0.0.1:{port}",
            f"load_definitions = {folder}/definitions.json",
            "",
        ]
    )


def _with_users(definitions: dict[str, Any], passwords: Mapping[str, str]) -> dict[str, Any]:
    ready = {"user": _READY, "vhost": "/"}
    permissions = dict.fromkeys(
        ("configure", "write", "read"), "^(mqtt-subscription-readiness-.*|amq\\.topic)$"
    )
    topics = dict.fromkeys(("write", "read"), "^readiness\\..*$")
    return {
        "vhosts": [{"name": "/"}],
        "users": [
            {
                "name": user,
                "password_hash": _hashed(password),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": "",
            }
            for user, password in {**passwords, _READY: _READY}.items()
        ],
        "permissions": [*definitions["permissions"], {**ready, **permissions}],
        "topic_permissions": [
            *definitions["topic_permissions"],
            {**ready, "exchange": "amq.topic", **topics},
        ],
    }


def _hashed(password: str) -> str:
    salt = b"salt"
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def _epmd() -> str:
    found = sorted(Path("/usr/lib/erlang").glob("erts-*/bin/epmd"))
    return str(found[-1]) if found else "/usr/bin/epmd"
