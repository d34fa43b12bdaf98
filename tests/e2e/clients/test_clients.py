"""Clients of Azure's metadata, unmodified, against the real publisher at the address that they have built in.

The lane ``clients`` runs this in a network namespace of its own whose loopback has 169.254.169.254.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest

from caesura.bus.local_broker import LocalBroker, find_mosquitto
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.contract.messages import (
    HostInventory,
    ScheduledEvent,
    SetDocument,
    VmApproved,
    VmDetails,
    VmInterface,
    VmRecord,
)
from caesura_testing.collector import eventually
from caesura_testing.patience import patient

_HERE = Path(__file__).parent
_ADDRESS = "169.254.169.254"
_ID = "c7061bac-afdc-4513-b24b-aa5f13a16123"
_AGENT = Path("/usr/lib/ocf/resource.d/heartbeat/azure-events-az")
_PYTHON = Path(os.environ.get("CAESURA_TEST_CLIENTS", ".lanes/clients/venv")).absolute() / "bin/python"


def _has_the_address() -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((_ADDRESS, 0))
        except OSError:
            return False
    return True


pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not _has_the_address(), reason=f"loopback does not have {_ADDRESS}: run ./check clients"
    ),
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
]


class Vm:
    """The VM that the clients run in: its coordinator and its host are played here."""

    def __init__(self, post: MessageClient, approvals: list[VmApproved], folder: Path) -> None:
        self._post = post
        self.approvals = approvals
        self.folder = folder

    async def introduce(self) -> None:
        """Say who and where it is."""
        record = VmRecord(vm="web-1", set="web", update_domain=1, state="running")
        await self._post.send(
            HostInventory(host="host-1", driver="process", epoch=1, vms=(record,)), host="host-1"
        )
        details = VmDetails(
            vm="web-1",
            host="host-1",
            size="Standard_D2s_v5",
            scale_set="shop",
            interfaces=(VmInterface(ipv4="10.0.0.4/24", mac="00:0d:3a:f8:06:ec"),),
        )
        await self._post.send(details, host="host-1", vm="web-1")
        await self.show(1)

    async def show(
        self,
        incarnation: int,
        status: Literal["scheduled", "started"] | None = None,
        event_type: Any = "Freeze",
    ) -> None:
        """Show this document, and wait until the clients see it."""
        events: tuple[ScheduledEvent, ...] = ()
        if status is not None:
            event = ScheduledEvent(
                event_id=_ID,
                event_type=event_type,
                status=status,
                resources=("web-1",),
                not_before=datetime.now(UTC) + timedelta(hours=1),
                duration_s=9,
            )
            events = (event,)
        await self._post.send(SetDocument(set="web", incarnation=incarnation, events=events), set="web")

        async def shown() -> bool:
            out = await self.run(
                "curl",
                "-sS",
                "-H",
                "Metadata:true",
                f"http://{_ADDRESS}/metadata/scheduledevents?api-version=2020-07-01",
            )
            return bool(json.loads(out).get("DocumentIncarnation") == incarnation)

        await until(shown)

    async def run(self, *command: str | Path, **environ: str) -> str:
        """The output of a client; it must end well."""
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, "NO_PROXY": "*", "no_proxy": "*", **environ},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), patient(30))
        assert process.returncode == 0, err.decode()
        return out.decode()

    async def said(self, *command: str | Path) -> Any:
        """The JSON that a client prints last."""
        return json.loads((await self.run(*command)).splitlines()[-1])


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(patient(30)):
        while not await condition():  # noqa: ASYNC110 - an HTTP answer has no event to wait for
            await asyncio.sleep(0.02)


@pytest.fixture
async def vm(tmp_path: Path) -> AsyncIterator[Vm]:
    listeners = tmp_path / "listeners.toml"
    listeners.write_text(f'[[listener]]\nvm = "web-1"\nlisten = "{_ADDRESS}:80"\n')
    async with LocalBroker(kind="mosquitto") as broker:
        bus = MqttBus(BrokerOptions(url=broker.url), filters=("caesura/v1/metadata/#",))
        post = MessageClient(bus, "/caesura/fleet")
        approvals: list[VmApproved] = []

        async def approved(message: VmApproved, _: Any) -> None:
            approvals.append(message)

        post.subscribe(VmApproved, approved)
        running = asyncio.ensure_future(bus.run(post.deliver))
        prefix = "CAESURA_METADATA_PUBLISHER_"
        publisher = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "caesura_metadata_publisher",
            env={
                **os.environ,
                f"{prefix}LISTENERS_FILE": str(listeners),
                f"{prefix}HEALTH_LISTEN": "",
                f"{prefix}BROKER_URL": broker.url,
                f"{prefix}LOCATION": "westnowhere",
            },
        )
        try:
            assert await bus.wait_connected(patient(10))
            scene = Vm(post, approvals, tmp_path)

            async def listens() -> bool:
                try:
                    _, writer = await asyncio.open_connection(_ADDRESS, 80)
                except OSError:
                    return False
                writer.close()
                return True

            await until(listens)
            await scene.introduce()
            yield scene
        finally:
            publisher.terminate()
            await publisher.wait()
            await bus.close()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_curl_as_documented(vm: Vm) -> None:
    await vm.show(2, "scheduled")
    base = f"http://{_ADDRESS}/metadata"
    sample = ("curl", "-H", "Metadata:true", f"{base}/scheduledevents?api-version=2020-07-01")
    (event,) = json.loads(await vm.run(*sample))["Events"]
    assert event["EventId"] == _ID
    approve = f'{{"StartRequests": [{{"EventId": "{_ID}"}}]}}'
    await vm.run(
        "curl",
        "-H",
        "Metadata:true",
        "-X",
        "POST",
        "-d",
        approve,
        f"{base}/scheduledevents?api-version=2019-01-01",
    )
    await eventually(lambda: [each.event_id for each in vm.approvals[:1]] == [_ID])
    whole = ("curl", "-s", "-H", "Metadata:true", "--noproxy", "*", f"{base}/instance?api-version=2025-04-07")
    assert json.loads(await vm.run(*whole))["compute"]["vmSize"] == "Standard_D2s_v5"


@pytest.mark.skipif(not _AGENT.exists(), reason="resource-agents is not installed")
async def test_pacemakers_agent_drains_its_node_and_starts_the_event(vm: Vm) -> None:
    tools = vm.folder / "bin"
    tools.mkdir()
    for name in ("crm_attribute", "crm_node", "crm_resource", "crm_simulate"):
        script = tools / name
        script.write_text(f"#!{sys.executable}\n" + (_HERE / "cluster/crm.py").read_text())
        script.chmod(0o755)
    state, node = vm.folder / "cluster.json", socket.gethostname()

    async def monitor() -> dict[str, str]:
        await vm.run(
            _AGENT,
            "monitor",
            PATH=f"{tools}:{os.environ['PATH']}",
            CRM_STATE=str(state),
            CRM_NODE=node,
            OCF_ROOT="/usr/lib/ocf",
            OCF_FUNCTIONS_DIR="/usr/lib/ocf/lib/heartbeat",
            OCF_RESOURCE_INSTANCE="events",
            OCF_RESKEY_eventTypes="Freeze,Reboot",
            OCF_RESKEY_CRM_meta_interval="10",
        )
        return dict(json.loads(state.read_text()))

    known = await monitor()
    assert known["/hostName_web-1"] == node
    await vm.show(2, "scheduled")
    known = await monitor()
    assert known[f"{node}/azure-events-az_curNodeState"] == "STOPPING"
    assert known[f"{node}/#health-azure"] == "-1000000", "its resources move away"
    known = await monitor()
    assert known[f"{node}/azure-events-az_curNodeState"] == "IN_EVENT"
    await eventually(lambda: [each.event_id for each in vm.approvals[:1]] == [_ID])
    await vm.show(3, "started")
    assert (await monitor())[f"{node}/azure-events-az_curNodeState"] == "IN_EVENT"
    await vm.show(4)
    known = await monitor()
    assert known[f"{node}/azure-events-az_curNodeState"] == "AVAILABLE"
    assert known[f"{node}/#health-azure"] == "0"


needs_python = pytest.mark.skipif(not _PYTHON.exists(), reason=f"{_PYTHON} is missing: run ./check clients")
needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (_HERE / "node/node_modules").exists(),
    reason="node, or its packages, are not installed: run ./check clients",
)


@needs_python
async def test_opentelemetry_in_python_knows_the_vm(vm: Vm) -> None:
    found = await vm.said(_PYTHON, _HERE / "python/detector.py")
    assert (found["cloud.platform"], found["cloud.region"], found["host.name"]) == (
        "azure_vm",
        "westnowhere",
        "web-1",
    )
    assert (found["host.type"], found["azure.vm.scaleset.name"]) == ("Standard_D2s_v5", "shop")


@needs_node
async def test_opentelemetry_in_node_knows_the_vm(vm: Vm) -> None:
    found = await vm.said("node", _HERE / "node/detector.mjs")
    assert (found["cloud.region"], found["host.name"], found["host.type"]) == (
        "westnowhere",
        "web-1",
        "Standard_D2s_v5",
    )


@needs_python
async def test_msal_has_no_identity_and_does_not_wait_for_one(vm: Vm) -> None:
    found = await vm.said(_PYTHON, _HERE / "python/msal_token.py")
    assert found["error"] == "invalid_request"


# A 404 is repeated by these two for some 24 s; they must give up at once, so that the next credential of a chain gets its turn.


@needs_python
async def test_azure_identity_in_python_gives_up_at_once(vm: Vm) -> None:
    async with asyncio.timeout(patient(12)):
        found = await vm.said(_PYTHON, _HERE / "python/identity.py")
    assert found["name"] == "CredentialUnavailableError"


@needs_node
async def test_azure_identity_in_node_gives_up_at_once(vm: Vm) -> None:
    async with asyncio.timeout(patient(12)):
        found = await vm.said("node", _HERE / "node/identity.mjs")
    assert found["name"] == "CredentialUnavailableError", found
