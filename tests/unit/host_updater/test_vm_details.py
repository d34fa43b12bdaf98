"""The table [vm.details] of the host file, and its way to the bus."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.contract.messages import VmDetails, VmInterface
from caesura_host_updater.inventory.host_config import HostFileError, parse_host_file
from caesura_host_updater.inventory.vm_spec import VmSpec
from caesura_host_updater.vm_details import VmDetailsPublisher
from caesura_testing.collector import eventually

HOST = """
host = "host-1"
[[vm]]
name = "web-1"
[[vm.process]]
argv = ["sleep", "1"]
[vm.details]
"""

WHOLE = """
size = "Standard_D2s_v5"
zone = "1"
tags = { team = "shop" }
scale_set = "shop"
computer_name = "web-1.example"
user_data = "#cloud-config\\n"
[vm.details.image]
publisher = "Debian"
offer = "debian-12"
[[vm.details.interface]]
mac = "00:0d:3a:f8:06:ec"
ipv4 = "10.0.0.4/24"
[[vm.details.public_key]]
key = "ssh-ed25519 AAAA"
"""


def parsed(text: str) -> tuple[VmSpec, ...]:
    return parse_host_file(HOST + text, "host.toml").vm


def test_what_the_operator_writes_is_what_is_published() -> None:
    details = parsed(WHOLE)[0].details
    assert details is not None
    message = details.message("web-1", "host-1")
    assert (message.vm, message.host, message.size, message.zone) == (
        "web-1",
        "host-1",
        "Standard_D2s_v5",
        "1",
    )
    assert message.user_data == "I2Nsb3VkLWNvbmZpZwo="
    assert message.interfaces == (VmInterface(mac="00:0d:3a:f8:06:ec", ipv4="10.0.0.4/24"),)
    assert message.image.offer == "debian-12"
    assert [each.key for each in message.public_keys] == ["ssh-ed25519 AAAA"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("syze = 1", "syze"),
        ("[vm.details.image]\nofer = 'x'", "ofer"),
        ("[[vm.details.interface]]\nipv4 = '10.0.0.4'", "without its prefix"),
        ("[[vm.details.interface]]\nipv4 = '10.0.0.400/24'", "wrong address"),
        ("[[vm.details.interface]]\nipv6 = 'x'", "wrong address"),
        ("[[vm.details.interface]]\nmac = 'x'", "mac"),
        ("os_type = 'BeOS'", "os_type"),
        ("user_data_base64 = '***'", "not Base64"),
        ("user_data = 'a'\nuser_data_base64 = 'YQ=='", "both"),
        ("tags = { 'a:b' = 'c' }", "colon"),
        (f"user_data = '{'x' * 60_000}'", "user_data"),
    ],
)
def test_a_mistake_is_named(text: str, words: str) -> None:
    with pytest.raises(HostFileError, match=words):
        parsed(text)


class Scene:
    """What a broker retains of a host's details."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.seen: dict[str, VmDetails] = {}
        ear = MemoryBus(self.broker, filters=["caesura/v1/host/+/vm/+/details"])
        self.post = MessageClient(ear, "/caesura/test")
        self.post.subscribe(VmDetails, self._on)
        self.post.on_tombstone(VmDetails, self._gone)

    async def _on(self, message: VmDetails, _: Any) -> None:
        self.seen[message.vm] = message

    async def _gone(self, parameters: Any) -> None:
        self.seen.pop(parameters["vm"], None)


async def test_it_is_published_and_removed_with_its_table() -> None:
    scene = Scene()
    before = VmDetails(vm="gone", host="host-1", size="old")
    own = MemoryBus(scene.broker, filters=["caesura/v1/host/host-1/vm/+/details"])
    client = MessageClient(own, "/caesura/host/host-1")
    publisher = VmDetailsPublisher("host-1", parsed(WHOLE), client)

    async def earlier(message: VmDetails, _: Any) -> None:
        publisher.published_earlier(message)

    client.subscribe(VmDetails, earlier)

    async def connected() -> None:
        publisher.connected()

    tasks = [asyncio.ensure_future(scene.post.bus.run(scene.post.deliver))]
    assert await scene.post.bus.wait_connected(5.0)
    await scene.post.send(before, host="host-1", vm="gone")
    await scene.post.send(VmDetails(vm="web-1", host="host-1", size="old"), host="host-1", vm="web-1")
    await eventually(lambda: len(scene.seen) == 2)
    tasks += [
        asyncio.ensure_future(own.run(client.deliver, connected)),
        asyncio.ensure_future(publisher.run()),
    ]
    await eventually(lambda: list(scene.seen) == ["web-1"] and scene.seen["web-1"].size == "Standard_D2s_v5")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
