"""The demo's fleet as real guests: layout, host files, updates, and what is read from the guests. Pure except for the reads."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, Literal

import msgspec

from caesura_demo.layout import Broker, DemoVm, Layout

GuestMethod = Literal["freeze", "swap", "replace"]
UPDATES: dict[GuestMethod, str] = {
    "freeze": "host-patch",
    "swap": "new-qemu-beside-the-old",
    "replace": "new-qemu-instead-of-the-old",
}
GUESTS = 9
"""The demo's guests by default."""
MOST_VMS = 18
_GUEST_SEES_HOST = "10.0.2.2"
"""How a guest on QEMU's user network reaches the host's loopback (QEMU documentation, "Network emulation")."""
_ASK_S = 5.0
_WORKLOADS = ("heartbeat", "approve")


class GuestImage(msgspec.Struct, frozen=True):
    """Kernel and initramfs of ``caesura guest build``."""

    kernel: str
    initrd: str


class GuestStatus(msgspec.Struct, frozen=True):
    """A guest's report about itself."""

    vm: str
    approved: tuple[str, ...]
    beats: bool
    """Whether it runs now: two beats were received."""
    steps_back: int
    """How often it saw its CLOCK_MONOTONIC go back."""


def guest_host_file(
    layout: Layout,
    host: str,
    *,
    broker: Broker,
    folder: str,
    ram_dir: str,
    image: GuestImage,
    memory_mib: int,
    accel: str,
) -> dict[str, Any]:
    """The host file of one host, as a table for TOML."""
    return {
        "host": host,
        "driver": "qemu",
        "qemu": {
            "accel": accel,
            "run_dir": run_dir(folder, host),
            "ram_dir": ram_dir,
            "start_timeout_s": 60.0,
        },
        "vm": [
            _vm_table(vm, broker=broker, folder=folder, image=image, memory_mib=memory_mib)
            for vm in layout.on(host)
        ],
    }


def run_dir(folder: str, host: str) -> str:
    """The folder of the sockets of a host's guests."""
    return f"{folder}/{host}.run"


def _vm_table(
    vm: DemoVm, *, broker: Broker, folder: str, image: GuestImage, memory_mib: int
) -> dict[str, Any]:
    words = {
        "caesura.run": ",".join(_WORKLOADS),
        "caesura.heartbeat_ms": "100",
        "caesura.url": vm.metadata_url.replace("127.0.0.1", _GUEST_SEES_HOST),
        "CAESURA_VM_AGENT_VM": vm.name,
        "CAESURA_VM_AGENT_SET": vm.set,
        "CAESURA_VM_AGENT_UPDATE_DOMAIN": str(vm.update_domain),
        "CAESURA_VM_AGENT_BROKER_URL": broker.url.replace("127.0.0.1", _GUEST_SEES_HOST),
        "CAESURA_VM_AGENT_BROKER_PROTOCOL": broker.protocol,
        "CAESURA_VM_AGENT_LOG_LEVEL": "warning",
    }
    append = [
        "console=ttyS0",
        "quiet",
        "rdinit=/init",
        "panic=-1",
        *(f"{key}={value}" for key, value in words.items()),
    ]
    folder = f"{run_dir(folder, vm.host)}/{vm.name}"
    extra = ["-device", "virtio-serial-pci,id=demo"]
    for name in _WORKLOADS:
        extra += ["-chardev", f"socket,id=demo-{name},path={folder}/{name},server=on,wait=off"]
        extra += ["-device", f"virtserialport,bus=demo.0,chardev=demo-{name},name=org.caesura.{name}.0"]
    return {
        "name": vm.name,
        "set": vm.set,
        "update_domain": vm.update_domain,
        "fault_domain": vm.fault_domain,
        "qemu": {
            "memory_mib": memory_mib,
            "machine": "pc-q35-7.2",
            "kernel": image.kernel,
            "initrd": image.initrd,
            "append": " ".join(append),
            "nic": [{}],
            "extra": extra,
        },
    }


def guest_update_file(method: GuestMethod, *, folder: str, seconds: float) -> dict[str, Any]:
    """The update that is applied by this method; each takes its time and writes down which host it changed."""
    what = {
        "freeze": ("host", "", "Represents a patch of the host, during which its guests are paused."),
        "swap": ("vm", "beside", "Represents a new QEMU: each guest is handed over to a new process."),
        "replace": (
            "host",
            "instead",
            "Represents a new QEMU and its libraries, installed while no QEMU runs.",
        ),
    }
    scope, vmm, description = what[method]
    record = f"{folder}/patched-{method}"
    return {
        "name": UPDATES[method],
        "version": "1.0.1",
        "impact": "pause",
        "scope": scope,
        **({"vmm": vmm} if vmm else {}),
        "expected_s": seconds,
        "timeout_s": seconds + 4.0,
        "description": description,
        "argv": [sys.executable, "-m", "caesura_demo.patch", str(seconds), record],
    }


async def read_guest(folder: Path, vm: DemoVm) -> GuestStatus:
    """Query a guest through its virtio-serial ports; no answer counts as a failure."""
    place = Path(run_dir(str(folder), vm.host)) / vm.name
    approved: tuple[str, ...] = ()
    lines: list[list[bytes]] = []
    try:
        async with asyncio.timeout(_ASK_S):
            approved = tuple(json.loads(await _ask(place / "approve", b"status\n"))["approved"])
            lines = await _listen(place / "heartbeat", 2)
    except (OSError, TimeoutError, ValueError, KeyError):
        pass
    steps_back = max((int(line[4]) for line in lines), default=0)
    return GuestStatus(vm.name, approved, len(lines) == 2, steps_back)


async def _ask(path: Path, request: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(request)
        return await reader.readline()
    finally:
        writer.close()


async def _listen(path: Path, count: int) -> list[list[bytes]]:
    """This many complete lines of the heartbeat: count, two clocks, boot id, steps back."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    found: list[list[bytes]] = []
    try:
        while len(found) < count and (line := await reader.readline()):
            words = line.split()
            if len(words) == 5 and len(words[3]) == 36:
                found.append(words)
        return found
    finally:
        writer.close()
