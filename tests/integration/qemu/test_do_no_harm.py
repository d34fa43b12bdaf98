"""What was changed in a running machine, and what another process cannot have: refused by name before anything pauses.

Each test here lost a guest, its disk, or its operator's word once; see ``docs/reliability.md``.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caesura_host_updater.drivers.port import DriverError, FreezeFailed, NotRunningYet
from caesura_host_updater.drivers.qemu.async_qmp import AsyncQmp
from caesura_host_updater.drivers.qemu.definition import Adopt, Definition, Disk
from caesura_host_updater.drivers.qemu.observer import read_snapshot
from caesura_host_updater.drivers.qemu.snapshot import VmSnapshot
from caesura_vmcontrol import claims
from caesura_vmcontrol.procfs import process_table
from caesura_vmcontrol.qemu_plans import QemuPlan, Vmm
from caesura_vmcontrol.vm_control import condition, resume_vm

SMALL = Definition(memory_mib=16, machine="pc-q35-7.2")
PORT = ("-gdb", "tcp:127.0.0.1:0")
"""Something that only one process can have, so that a replace cannot try the very next process beside the old one."""
BOTH_WAYS = pytest.mark.parametrize(
    ("method", "extra"), [("swap", ()), ("replace", ()), ("replace", PORT)], ids=["swap", "replace", "port"]
)


def with_disk(rig: Any, extra: tuple[str, ...] = ()) -> Definition:
    """A guest with a disk ``disk0`` and a CD, and room to plug another disk and another vCPU."""
    (rig.folder / "cd.iso").write_bytes(bytes(1 << 20))
    more = (
        *("-device", "pcie-root-port,id=plug1", "-smp", "1,maxcpus=2,sockets=2"),
        *("-drive", f"file={rig.folder}/cd.iso,format=raw,if=none,id=cd,media=cdrom"),
        *("-device", "ide-cd,drive=cd,id=cd0", "-object", "throttle-group,id=group1,x-iops-total=100"),
    )
    return msgspec.structs.replace(SMALL, disk=(Disk(file=str(rig.disk("d.qcow2"))),), extra=(*more, *extra))


def read(path: str) -> str:
    """A file's text."""
    return Path(path).read_text()


def write(path: str, text: str) -> None:
    """A file with another text."""
    Path(path).write_text(text)


def qmp(driver: Any, vm: str = "a") -> AsyncQmp:
    """The driver's own connection."""
    found: AsyncQmp = driver._guests[vm].qmp
    return found


async def disk_node(driver: Any) -> Any:
    """What QEMU says of the medium of ``disk0``."""
    blocks = await qmp(driver).execute("query-block")
    return next(block["inserted"] for block in blocks if block["device"] == "disk0")


async def snapshot(driver: Any, rig: Any) -> None:
    """From now on the guest writes to an overlay."""
    await qmp(driver).execute(
        "blockdev-snapshot-sync", device="disk0", snapshot_file=str(rig.folder / "ov.qcow2"), format="qcow2"
    )


async def plugged_disk(driver: Any, rig: Any) -> None:
    """A disk that no command line names."""
    file = {"driver": "file", "filename": str(rig.disk("hot.qcow2"))}
    await qmp(driver).execute("blockdev-add", driver="qcow2", node_name="hot", file=file)
    await qmp(driver).execute("device_add", driver="virtio-blk-pci", drive="hot", id="hotdisk", bus="plug1")


async def throttle(driver: Any, rig: Any) -> None:
    """A limit that an operator set by hand."""
    limits = dict.fromkeys(("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    answer = await qmp(driver)._client.execute(
        "block_set_io_throttle", {"device": "disk0", "bps": 1_000_000, **limits}
    )
    assert answer == {}


async def throttle_group(driver: Any, rig: Any) -> None:
    """The same for a group that several disks share."""
    await qmp(driver).execute("qom-set", path="/objects/group1", property="limits", value={"iops-total": 7})


async def backup(driver: Any, rig: Any) -> None:
    """A job that is under way for long."""
    await qmp(driver).execute(
        "drive-backup", device="disk0", target=str(rig.folder / "b"), sync="full", speed=1
    )


async def bitmap(driver: Any, rig: Any) -> None:
    """A bitmap that lives in the process only."""
    await qmp(driver).execute("block-dirty-bitmap-add", node="disk0", name="b0")


async def export(driver: Any, rig: Any) -> None:
    """An NBD export."""
    address = {"type": "unix", "data": {"path": str(rig.folder / "nbd")}}
    await qmp(driver).execute("nbd-server-start", addr=address)
    node = (await disk_node(driver))["node-name"]
    await qmp(driver).execute("block-export-add", type="nbd", id="e0", node_name=node)


async def thread(driver: Any, rig: Any) -> None:
    """An object that was made at run time."""
    await qmp(driver).execute("object-add", qom_type="iothread", id="io9")


async def character_device(driver: Any, rig: Any) -> None:
    """The same for a character device."""
    await qmp(driver).execute("chardev-add", id="c9", backend={"type": "null", "data": {}})


async def another_medium(driver: Any, rig: Any) -> None:
    """Another CD."""
    (rig.folder / "other.iso").write_bytes(bytes(1 << 20))
    await qmp(driver).execute(
        "blockdev-change-medium", id="cd0", filename=str(rig.folder / "other.iso"), format="raw"
    )


async def no_medium(driver: Any, rig: Any) -> None:
    """No CD any more."""
    await qmp(driver).execute("eject", id="cd0", force=True)


async def another_vcpu(driver: Any, rig: Any) -> None:
    """A hot-plugged one."""
    place = {"socket-id": 1, "core-id": 0, "thread-id": 0}
    told = {"driver": "qemu64-x86_64-cpu", "id": "cpu1", **place}
    assert await qmp(driver)._client.execute("device_add", told) == {}


CHANGES = [
    (
        another_medium,
        r"disk cd is raw .*other\.iso \(read-only\) and raw .*cd\.iso \(read-only\) in the new process",
    ),
    (no_medium, r"disk cd is empty and raw .*cd\.iso \(read-only\) in the new process"),
    (another_vcpu, r"the guest has 2 vCPUs and the new process 1"),
    (
        snapshot,
        r"disk disk0 is qcow2 /tmp/cq-.*/ov\.qcow2 over qcow2 .*/d\.qcow2 and qcow2 .*d\.qcow2 in the new",
    ),
    (plugged_disk, r"the new process lacks device hotdisk \(virtio-blk-pci\)"),
    (
        throttle,
        r"I/O setting of disk disk0 is bps 1000000, group disk0 and no limits in the new process: set",
    ),
    (
        throttle_group,
        r"object group1 is throttle-group with iops-total 7.* and throttle-group with iops-total 100",
    ),
    (backup, r"job '.*' \(backup\) is running: wait for its end"),
    (bitmap, r"dirty bitmap 'b0' of .* lives in this process only"),
    (export, r"block export 'e0' \(nbd\)"),
    (thread, r"the new process lacks object io9 \(iothread\)"),
    (character_device, r"the new process lacks character device 'c9'"),
]


@BOTH_WAYS
@pytest.mark.parametrize(("change", "why"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
async def test_what_was_changed_at_run_time_is_refused(
    rig: Any, tools: Any, method: Any, extra: tuple[str, ...], change: Any, why: str
) -> None:
    """By the host when it is commanded, and before that by the plan."""
    driver = await rig.open({"a": with_disk(rig, extra)})
    pid = tools.pid_of(driver, "a")
    await change(driver, rig)
    with pytest.raises(DriverError, match=why):
        await driver.prepare("a", "op-1", method, "")
    await driver._assessor.assess(driver._guests["a"])
    assert method not in driver.capabilities("a").methods
    assert "freeze" in driver.capabilities("a").methods
    assert re.search(why, driver.capabilities("a").missing[method])
    assert tools.pid_of(driver, "a") == pid
    assert driver.states() == {"a": "running"}
    await rig.only(pid)


async def test_what_was_undone_is_refused_no_longer(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": with_disk(rig)})
    await bitmap(driver, rig)
    await driver._assessor.assess(driver._guests["a"])
    assert "swap" in driver.capabilities("a").missing
    await qmp(driver).execute("block-dirty-bitmap-remove", node="disk0", name="b0")
    await driver._assessor.assess(driver._guests["a"])
    assert driver.capabilities("a").methods == ("live", "swap", "freeze", "replace", "reboot")
    await driver.prepare("a", "op-1", "swap", "")
    await driver.hand_over("a", tools.soon())
    await driver.release("a")


async def test_a_trial_that_could_not_be_made_is_made_again(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full tmpfs or a busy host must not forbid swaps for good."""
    monkeypatch.setattr("caesura_host_updater.drivers.qemu.assessor._FAILED_S", 0.0)
    binary = rig.wrapper("pass")
    driver = await rig.open({"a": SMALL}, binary=binary)
    guest = driver._guests["a"]
    await driver._assessor.assess(guest)
    good = read(binary)
    write(binary, "#!/bin/sh\necho no room >&2\nexit 1\n")
    await driver._assessor.assess(guest)
    assert "a new process cannot be started beside it: " in driver.capabilities("a").missing["swap"]
    assert "no room" in driver.capabilities("a").missing["swap"]
    write(binary, good)
    await driver._assessor.assess(guest)
    assert "swap" in driver.capabilities("a").methods


async def test_a_trial_that_dies_says_how(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is refused by a crash of QEMU must not sound like a connection that was lost."""

    async def dying(qmp: AsyncQmp) -> VmSnapshot:
        os.kill(qmp.listener, signal.SIGSEGV)
        return await read_snapshot(qmp)

    monkeypatch.setattr("caesura_host_updater.drivers.qemu.trial.read_snapshot", dying)
    driver = await rig.open({"a": SMALL})
    await driver._assessor.assess(driver._guests["a"])
    assert "it was ended by SIGSEGV" in driver.capabilities("a").missing["swap"]


async def test_it_is_looked_at_without_being_asked(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot announces itself to nobody."""
    monkeypatch.setattr("caesura_host_updater.drivers.qemu.assessor._EVERY_S", 0.05)
    driver = await rig.open({"a": with_disk(rig)})
    await snapshot(driver, rig)
    await tools.until(lambda: "ov.qcow2" in driver.capabilities("a").missing.get("swap", ""), "the look")


@pytest.mark.parametrize("method", ["swap", "replace"])
async def test_what_changes_between_the_comparison_and_the_pause_is_refused_too(
    rig: Any, tools: Any, method: Any
) -> None:
    driver = await rig.open({"a": with_disk(rig)})
    pid = tools.pid_of(driver, "a")
    await driver.prepare("a", "op-1", method, "")
    await snapshot(driver, rig)
    with pytest.raises(
        DriverError, match=r"changed since it was compared: disk disk0 is qcow2 .*ov\.qcow2 over"
    ):
        await (driver.hand_over if method == "swap" else driver.checkpoint)("a", tools.soon())
    assert driver.states() == {"a": "running"}
    assert await driver.resume("a", 5) == "running"
    await driver.release("a")
    await rig.only(pid)


async def test_a_persistent_bitmap_goes_along(rig: Any, tools: Any) -> None:
    """QEMU keeps it in the image: so it is no obstacle, and is there afterwards."""
    driver = await rig.open({"a": with_disk(rig)})
    await qmp(driver).execute("block-dirty-bitmap-add", node="disk0", name="b0", persistent=True)
    await driver.prepare("a", "op-1", "swap", "")
    await driver.hand_over("a", tools.soon())
    await driver.release("a")
    assert [bitmap["name"] for bitmap in (await disk_node(driver))["dirty-bitmaps"]] == ["b0"]


@BOTH_WAYS
@pytest.mark.parametrize("how", ["moved", "removed"])
async def test_a_disk_file_that_is_another_one_by_now(
    rig: Any, tools: Any, method: Any, extra: tuple[str, ...], how: str
) -> None:
    """The command line names it still; a new process would open what has that name now."""
    driver = await rig.open({"a": with_disk(rig, extra)})
    file = rig.folder / "d.qcow2"
    file.rename(rig.folder / "elsewhere.qcow2")
    if how == "moved":
        rig.disk("d.qcow2")
    with pytest.raises(DriverError, match=rf"disk file {file} is not (the file that|there any more)"):
        await driver.prepare("a", "op-1", method, "")
    assert driver.states() == {"a": "running"}


async def test_a_device_that_qemu_cannot_migrate(rig: Any, tools: Any) -> None:
    drive = f"file={rig.disk('n.qcow2')},if=none,id=n"
    extra = ("-drive", drive, "-device", "nvme,serial=1,drive=n")
    driver = await rig.open({"a": msgspec.structs.replace(SMALL, extra=extra)})
    await driver._assessor.assess(driver._guests["a"])
    for method in ("swap", "replace"):
        assert "nvme" in driver.capabilities("a").missing[method]
        with pytest.raises(DriverError, match="nvme"):
            await driver.prepare("a", "op-1", method, "")


# -- helpers that end with their only client --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["swap", "replace"])
async def test_a_helper_that_ends_with_its_only_client(rig: Any, tools: Any, method: Any) -> None:
    """As swtpm does with ``--terminate``: there was a pause, and 200 tries in 200 s found nobody at the socket."""
    path = rig.folder / "helper"
    helper = start_helper(path)
    await tools.until(path.exists, "the helper")
    extra = ("-chardev", f"socket,id=helper,path={path}", "-serial", "chardev:helper")
    driver = await rig.open({"a": msgspec.structs.replace(SMALL, extra=extra)})
    pid = tools.pid_of(driver, "a")
    assert "is a client of" in driver.capabilities("a").missing[method]
    with pytest.raises(DriverError, match=f"-chardev helper is a client of {path}: a helper such as swtpm"):
        await driver.prepare("a", "op-1", method, "")
    await driver.freeze("a", tools.soon())
    assert await driver.resume("a", 5) == "running"
    await rig.only(pid)
    assert helper.poll() is None
    await driver.close(stop_vms=True)
    rig.driver = None
    helper.wait(timeout=30)


def start_helper(path: Path) -> subprocess.Popen[bytes]:
    """One client, then the end."""
    code = (
        "import socket,sys\ns=socket.socket(socket.AF_UNIX);s.bind(sys.argv[1]);s.listen()\n"
        "c=s.accept()[0];s.close()\nwhile c.recv(1024): pass\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(path)])


@pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")
async def test_a_real_tpm(rig: Any, tools: Any) -> None:
    place = rig.place("tpm")
    argv = [
        "swtpm",
        "socket",
        "--tpm2",
        "--tpmstate",
        f"dir={place}",
        "--ctrl",
        f"type=unixio,path={place}/sock",
    ]
    tpm = rig.start([*argv, "--terminate"], place / "log")
    await tools.until((place / "sock").exists, "swtpm")
    extra = ("-chardev", f"socket,id=chrtpm,path={place}/sock", "-tpmdev", "emulator,id=tpm0,chardev=chrtpm")
    extra = (*extra, "-device", "tpm-crb,tpmdev=tpm0")  # type: ignore[assignment]
    driver = await rig.open({"a": msgspec.structs.replace(SMALL, extra=extra)})
    with pytest.raises(DriverError, match=r"chrtpm is a client of .*: a helper such as swtpm"):
        await driver.prepare("a", "op-1", "replace", "")
    await driver.close(stop_vms=True)
    rig.driver = None
    tpm.wait(timeout=30)


# -- somebody else's guest --------------------------------------------------------------------------------------


async def test_a_guest_that_is_migrated_away_while_it_is_frozen_is_not_resumed_here(
    rig: Any, tools: Any
) -> None:
    """It got our ``cont`` once, and ran twice. Neither the driver nor the guard may."""
    driver = await rig.open({"a": SMALL, "b": SMALL})
    plans = {vm: driver.resume_plan(vm) for vm in ("a", "b")}
    for vm in ("a", "b"):
        await driver.freeze(vm, tools.soon())
        await migrate_away(driver, vm, rig.folder / vm)
    assert await driver.resume("a", 5) == "left"
    assert driver.why_left("a") == "it was migrated away: QEMU says postmigrate"
    resume_vm(plans["b"])
    assert condition(plans["b"]) == "gone"
    for vm in ("a", "b"):
        assert await qmp(driver, vm).status() == "postmigrate"
    assert driver.states()["a"] == "stopped"
    assert "a (it was migrated away: QEMU says postmigrate)" in driver.ping()
    driver = await rig.open({"a": SMALL, "b": SMALL})
    assert driver.states() == {"a": "stopped", "b": "stopped"}, "nor is it resumed by the next life"


async def migrate_away(driver: Any, vm: str, file: Path) -> None:
    """What an operator's tool does."""
    off = [{"capability": "return-path", "state": False}]  # a file never answers
    await qmp(driver, vm).execute("migrate-set-capabilities", capabilities=off)
    await qmp(driver, vm).execute("migrate", uri=f"exec:cat>{file}")
    async with asyncio.timeout(30):
        while (await qmp(driver, vm).execute("query-migrate"))["status"] != "completed":  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("method", ["swap", "replace"])
async def test_a_guest_that_was_migrated_away_between_two_steps_is_not_resumed_here(
    rig: Any, tools: Any, method: Any
) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", method, "")
    plan = driver.resume_plan("a")
    await migrate_away(driver, "a", rig.folder / "a")
    with pytest.raises(DriverError):
        await (driver.hand_over if method == "swap" else driver.checkpoint)("a", tools.soon())
    assert await driver.resume("a", 5) == "left"
    resume_vm(plan)
    assert condition(plan) == "gone"
    assert await qmp(driver).status() == "postmigrate"
    await driver.release("a")


async def test_devices_behind_root_ports_are_no_difference_after_the_firmware_ran(
    rig: Any, tools: Any
) -> None:
    """As libvirt places them: their buses are numbered by the guest, and a new process's guest never runs."""
    extra = ("-device", "pcie-root-port,id=rp1,chassis=1", "-device", "virtio-balloon-pci,bus=rp1,id=behind")
    driver = await rig.open({"a": msgspec.structs.replace(SMALL, extra=extra)})

    async def numbered() -> bool:
        buses = await qmp(driver).execute("query-pci")
        bridges = [each["pci_bridge"] for each in buses[0]["devices"] if "pci_bridge" in each]
        return any(bridge.get("devices") for bridge in bridges)

    async with asyncio.timeout(60):
        while not await numbered():  # noqa: ASYNC110 - the firmware tells nobody
            await asyncio.sleep(0.05)
    await driver._assessor.assess(driver._guests["a"])
    assert driver.capabilities("a").methods == ("live", "swap", "freeze", "replace", "reboot")
    await driver.prepare("a", "op-1", "swap", "")
    await driver.hand_over("a", tools.soon())
    await driver.release("a")


async def test_nothing_is_prepared_while_a_migration_is_under_way(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(rig.folder / "away"))
    listener.listen()
    await qmp(driver).execute("migrate-set-parameters", max_bandwidth=1)
    await qmp(driver).execute("migrate", uri=f"unix:{rig.folder}/away")
    for method in ("freeze", "swap", "replace"):
        with pytest.raises(DriverError, match=r"a migration of it is (setup|active): wait for its end"):
            await driver.prepare("a", "op-1", method, "")
    await qmp(driver).execute("migrate_cancel")
    listener.close()


async def test_an_operators_own_pause_is_his(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    await qmp(driver).execute("stop")
    with pytest.raises(FreezeFailed, match="was paused by somebody else before anything was done"):
        await driver.freeze("a", tools.soon())
    assert await driver.resume("a", 5) == "left"
    assert await qmp(driver).status() == "paused"
    await qmp(driver).execute("cont")
    assert await driver.resume("a", 5) == "running"
    await driver.freeze("a", tools.soon())
    assert await driver.resume("a", 5) == "running"


async def test_a_guest_that_its_storage_paused_is_named_and_not_resumed(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU says io-error: whoever mends the storage resumes it. Here every read of the boot disk fails."""
    monkeypatch.setattr("caesura_host_updater.drivers.qemu.supervisor._LOOK_S", 0.05)
    broken = "driver=blkdebug,image.driver=null-co,image.size=1048576"
    fault = "inject-error.0.event=none,inject-error.0.errno=5,rerror=stop,werror=stop"
    extra = ("-drive", f"if=none,id=e,{broken},{fault}", "-device", "virtio-blk-pci,drive=e,bootindex=0")
    driver = await rig.open({"a": msgspec.structs.replace(SMALL, extra=extra)})
    plan = driver.resume_plan("a")
    await tools.until(lambda: "QEMU paused it for an I/O error" in driver.ping(), "the look", 60)
    assert driver.states() == {"a": "paused"}
    with pytest.raises(FreezeFailed, match="I/O error"):
        await driver.freeze("a", tools.soon())
    assert await driver.resume("a", 5) == "left"
    resume_vm(plan)
    assert condition(plan) == "gone"
    assert await qmp(driver).status() == "io-error"


async def test_the_guard_leaves_what_no_stop_of_ours_leads_to(rig: Any, tools: Any) -> None:
    """A guest that waits for an incoming migration is not started by us."""
    place = rig.place("v")
    argv = [
        rig.qemu,
        "-nodefaults",
        "-display",
        "none",
        "-machine",
        "pc-q35-7.2",
        "-m",
        "16",
        "-accel",
        "tcg",
    ]
    process = rig.start([*argv, "-S", "-qmp", f"unix:{place}/qmp,server=on,wait=off"], place / "log")
    await tools.until((place / "qmp").exists, "its socket")
    table = process_table()
    plan = QemuPlan("v", Vmm(process.pid, table[process.pid].start_ticks, f"{place}/qmp"))
    resume_vm(plan)
    assert condition(plan) == "gone"
    client = await AsyncQmp.connect(f"{place}/qmp", 10)
    assert await client.status() == "prelaunch"
    await client.close()
    process.kill()
    process.wait()


# -- a way out that cannot succeed -----------------------------------------------------------------------------


def zombies() -> list[int]:
    """Our dead children that nobody has collected."""
    table = process_table()
    return [pid for pid, process in table.items() if process.ppid == os.getpid() and process.state == "Z"]


async def test_tries_that_fail_for_ever(rig: Any, tools: Any) -> None:
    """1,800 zombies after 17 minutes once. Now: said aloud with what to do, ever fewer tries, and it comes back."""
    others = set(zombies())
    binary = rig.wrapper("pass")
    driver = await rig.open({"a": SMALL}, binary=binary)
    await driver.prepare("a", "op-1", "replace", "")
    plan = driver.resume_plan("a")
    await driver.checkpoint("a", tools.soon())
    good = read(binary)
    write(binary, "#!/bin/sh\necho a library is missing >&2\nexit 1\n")
    object.__setattr__(plan, "argv", plan.argv[:1])
    said = ""
    async with asyncio.timeout(120):
        while "cannot be resumed" not in said:
            try:
                await driver.resume("a", 0.2)
            except NotRunningYet as error:
                said = error.why
    assert "a library is missing" in said
    assert plan.state_file in said
    assert f"`rm {plan.state_file}`" in said
    assert "a (cannot be resumed: every try of a new process fails" in driver.ping()
    assert driver.states() == {"a": "paused"}
    before = claims.tries(plan.claims)
    with suppress(NotRunningYet):
        await driver.resume("a", 1.0)
    assert claims.tries(plan.claims) <= before + 4, "a try each 5 ms would be 200"
    await tools.until(lambda: not set(zombies()) - others, "the last try to be reaped")
    write(binary, good)
    async with asyncio.timeout(120):
        while True:
            with suppress(NotRunningYet):
                assert await driver.resume("a", 1.0) == "running"
                break
    await driver.release("a")
    assert driver.ping() == ""
    await rig.only(tools.pid_of(driver, "a"))


async def test_a_guest_that_is_given_up_by_hand(rig: Any, tools: Any) -> None:
    binary = rig.wrapper("pass")
    driver = await rig.open({"a": SMALL}, binary=binary)
    await driver.prepare("a", "op-1", "replace", "")
    plan = driver.resume_plan("a")
    await driver.checkpoint("a", tools.soon())
    write(binary, "#!/bin/sh\nexit 1\n")
    object.__setattr__(plan, "argv", plan.argv[:1])
    with pytest.raises(NotRunningYet):
        await driver.resume("a", 0.5)
    os.unlink(plan.state_file)  # noqa: PTH108 - as an operator does
    async with asyncio.timeout(60):
        while True:
            with suppress(NotRunningYet):
                assert await driver.resume("a", 1.0) == "gone"
                break
    await driver.release("a")


# -- guests that were changed silently -------------------------------------------------------------------------


async def test_nothing_of_the_guest_changes_that_it_could_notice(rig: Any, tools: Any) -> None:
    log = rig.folder / "serial.txt"
    extra = ("-device", "vmgenid,guid=auto", "-serial", f"file:{log}")
    driver = await rig.open({"a": msgspec.structs.replace(SMALL, extra=extra)})
    log.write_text("what the guest said before\n")
    before = await qmp(driver).execute("query-vm-generation-id")
    for number, method in enumerate(("swap", "replace", "swap")):
        await driver.prepare("a", f"op-{number}", method, "")
        await (driver.hand_over if method == "swap" else driver.checkpoint)("a", tools.soon())
        assert await driver.resume("a", 10) == "running"
        await driver.release("a")
        assert await qmp(driver).execute("query-vm-generation-id") == before
        assert log.read_text().startswith("what the guest said before\n")


async def test_memory_that_is_reserved_at_the_start_is_not_touched_by_the_next_process(
    rig: Any, tools: Any
) -> None:
    place = rig.place("v")
    ram = place / "ram"
    process = foreign(
        rig, place, ram=f"memory-backend-file,id=ram,mem-path={ram},size=16M,share=on,prealloc=on"
    )
    await tools.until((place / "guard").exists, "its sockets")
    driver = await rig.open({"a": Adopt(qmp=f"{place}/qmp", guard_qmp=f"{place}/guard")})
    await driver.prepare("a", "op-1", "swap", "")
    words = read(f"/proc/{tools.next_pid(driver, 'a')}/cmdline")
    assert "mem-path" in words
    assert "prealloc" not in words
    await driver.release("a")
    process.kill()
    process.wait()


def foreign(
    rig: Any, place: Path, *words: str, ram: str = "", sockets: tuple[str, ...] = ("qmp", "guard")
) -> Any:
    """A QEMU that no host updater started."""
    argv = [rig.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-m", "16", "-accel", "tcg"]
    argv += ["-machine", "pc-q35-7.2,memory-backend=ram", "-cpu", "qemu64"]
    argv += ["-object", ram or f"memory-backend-file,id=ram,mem-path={place}/ram,size=16M,share=on"]
    for name in sockets:
        argv += ["-qmp", f"unix:{place}/{name},server=on,wait=off"]
    return rig.start([*argv, *words], place / "log")


# -- untrue reasons ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["swap", "replace"])
async def test_memory_beside_the_guests_ram_is_no_obstacle(rig: Any, tools: Any, method: Any) -> None:
    """Firmware in flash (every UEFI guest) and a display: "the guest's RAM is not shared", it said in the pause."""
    flash = rig.folder / "flash.raw"
    flash.write_bytes(
        b"\xeb\xfe" * (2 << 20)
    )  # `jmp .`: the emulator aborts at one of eighty random programs
    extra = ("-drive", f"if=pflash,format=raw,file={flash}", "-device", "VGA")
    driver = await rig.open({"a": msgspec.structs.replace(SMALL, extra=extra)})
    await driver._assessor.assess(driver._guests["a"])
    assert driver.capabilities("a").methods == ("live", "swap", "freeze", "replace", "reboot")
    await driver.prepare("a", "op-1", method, "")
    await (driver.hand_over if method == "swap" else driver.checkpoint)("a", tools.soon())
    assert await driver.resume("a", 10) == "running"
    await driver.release("a")


async def test_a_command_line_as_libvirt_and_proxmox_write_it(rig: Any, tools: Any) -> None:
    """JSON, the RAM as the memory of a NUMA node, a file that is reserved at the start."""
    place = rig.place("v")
    rig.disk("v/d.qcow2")
    ram = f'{{"qom-type":"memory-backend-file","id":"m0","mem-path":"{place}/ram","size":16777216,"share":true}}'
    disk = f'{{"driver":"qcow2","node-name":"d","file":{{"driver":"file","filename":"{place}/d.qcow2"}}}}'
    argv = [rig.qemu, "-nodefaults", "-display", "none", "-m", "16", "-accel", "tcg", "-cpu", "qemu64"]
    argv += ["-machine", "pc-q35-7.2", "-object", ram, "-numa", "node,memdev=m0", "-blockdev", disk]
    argv += ["-device", '{"driver":"virtio-blk-pci","drive":"d","id":"virtio0"}']
    argv += ["-netdev", '{"type":"user","id":"n0"}', "-device", '{"driver":"virtio-net-pci","netdev":"n0"}']
    for name in ("qmp", "guard"):
        argv += ["-qmp", f"unix:{place}/{name},server=on,wait=off"]
    process = rig.start(argv, place / "log")
    await tools.until((place / "guard").exists, "its sockets")
    driver = await rig.open({"a": Adopt(qmp=f"{place}/qmp", guard_qmp=f"{place}/guard")})
    for number, method in enumerate(("swap", "replace")):
        await driver.prepare("a", f"op-{number}", method, "")
        await (driver.hand_over if method == "swap" else driver.checkpoint)("a", tools.soon())
        assert await driver.resume("a", 10) == "running"
        await driver.release("a")
    process.wait()
    os.kill(tools.pid_of(driver, "a"), signal.SIGKILL)
    await tools.until(lambda: driver.states() == {"a": "stopped"}, "its end")


@pytest.mark.skipif(not Path("/usr/share/OVMF/OVMF_CODE.fd").exists(), reason="ovmf is not installed")
async def test_a_uefi_guest(rig: Any, tools: Any) -> None:
    variables = rig.folder / "vars.fd"
    shutil.copy("/usr/share/OVMF/OVMF_VARS.fd", variables)
    extra = ("-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE.fd")
    extra = (*extra, "-drive", f"if=pflash,format=raw,file={variables}")  # type: ignore[assignment]
    driver = await rig.open({"a": msgspec.structs.replace(SMALL, memory_mib=128, extra=extra)})
    for number, method in enumerate(("swap", "replace")):
        await driver.prepare("a", f"op-{number}", method, "")
        await (driver.hand_over if method == "swap" else driver.checkpoint)("a", tools.soon())
        assert await driver.resume("a", 10) == "running"
        await driver.release("a")


async def test_a_host_updater_in_another_mount_namespace(rig: Any, tools: Any) -> None:
    """systemd's ``ProtectSystem=strict`` makes one: VMs that are fine were refused after a restart."""
    if os.geteuid() != 0:
        pytest.skip("a mount namespace needs root")
    place = rig.place("v")
    argv = [rig.qemu, "-nodefaults", "-display", "none", "-m", "16", "-accel", "tcg", "-cpu", "qemu64"]
    argv += ["-machine", "pc-q35-7.2,memory-backend=ram"]
    argv += ["-object", f"memory-backend-file,id=ram,mem-path={place}/ram,size=16M,share=on"]
    for name in ("qmp", "guard"):
        argv += ["-qmp", f"unix:{place}/{name},server=on,wait=off"]
    process = rig.start(["unshare", "--mount", *argv], place / "log")
    await tools.until((place / "guard").exists, "its sockets")
    assert os.readlink(f"/proc/{process.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")  # noqa: PTH115
    driver = await rig.open({"a": Adopt(qmp=f"{place}/qmp", guard_qmp=f"{place}/guard")})
    assert driver.capabilities("a").methods == ("live", "swap", "freeze", "replace")
    await driver.prepare("a", "op-1", "swap", "")
    await driver.hand_over("a", tools.soon())
    await driver.release("a")
    process.wait()
    os.kill(tools.pid_of(driver, "a"), signal.SIGKILL)


async def test_a_process_that_has_other_files_under_the_same_names(rig: Any, tools: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("a mount namespace needs root")
    place = rig.place("v")
    hidden = rig.place("hidden")
    (hidden / "d.raw").write_bytes(bytes(1 << 20))
    (place / "d.raw").write_bytes(bytes(1 << 20))
    words = f"mount --bind {hidden}/d.raw {place}/d.raw; exec "
    argv = [rig.qemu, "-nodefaults", "-display", "none", "-m", "16", "-accel", "tcg", "-cpu", "qemu64"]
    argv += ["-machine", "pc-q35-7.2,memory-backend=ram"]
    argv += ["-object", f"memory-backend-file,id=ram,mem-path={place}/ram,size=16M,share=on"]
    argv += ["-drive", f"file={place}/d.raw,format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d"]
    for name in ("qmp", "guard"):
        argv += ["-qmp", f"unix:{place}/{name},server=on,wait=off"]
    process = rig.start(["unshare", "--mount", "sh", "-c", words + " ".join(argv)], place / "log")
    await tools.until((place / "guard").exists, "its sockets")
    driver = await rig.open({"a": Adopt(qmp=f"{place}/qmp", guard_qmp=f"{place}/guard")})
    assert (
        f"{place}/d.raw is another file for its process than for us"
        in driver.capabilities("a").missing["swap"]
    )
    with pytest.raises(DriverError, match="another file for its process"):
        await driver.prepare("a", "op-1", "replace", "")
    process.kill()
    process.wait()


# -- other people's sockets --------------------------------------------------------------------------------------


async def test_the_only_qmp_socket_of_a_vm_is_not_kept(rig: Any, tools: Any) -> None:
    """Nothing can be done with one socket alone, and whoever else uses it got no greeting."""
    place = rig.place("v")
    process = foreign(rig, place, sockets=("qmp",))
    await tools.until((place / "qmp").exists, "its socket")
    driver = await rig.open({"a": Adopt(qmp=f"{place}/qmp")})
    assert driver.states() == {"a": "running"}
    assert "no second QMP socket" in driver.capabilities("a").missing["freeze"]
    client = await AsyncQmp.connect(f"{place}/qmp", 10)
    await client.execute("stop")
    await client.close()
    await tools.until(lambda: driver.states() == {"a": "paused"}, "the next look", 60)
    for method in ("freeze", "swap", "replace"):
        with pytest.raises(DriverError, match="no second QMP socket"):
            await driver.prepare("a", "op-1", method, "")
    with pytest.raises(FreezeFailed, match="no second QMP socket"):
        await driver.freeze("a", tools.soon())
    process.kill()
    process.wait()
    await tools.until(lambda: driver.states() == {"a": "stopped"}, "its end")
