"""The life of QEMU VMs: started, adopted, discovered, refused by name, stopped; real QEMU, no guest system."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from caesura_host_updater.drivers.port import DriverError, FreezeFailed, NotPossible
from caesura_host_updater.drivers.qemu.async_qmp import (
    AsyncQmp,
    QmpCommandRefused,
    QmpEvent,
    QmpFailed,
    QmpUnreachable,
    listener_of,
)
from caesura_host_updater.drivers.qemu.definition import Adopt, Definition, Nic
from caesura_host_updater.drivers.qemu.guest import Guest
from caesura_host_updater.drivers.qemu.process_records import VmProcessRecord
from caesura_host_updater.drivers.qemu.supervisor import VmSupervisor
from caesura_host_updater.inventory.host_config import parse_host_file, with_discovered
from caesura_testing.patience import patient

SMALL = Definition(memory_mib=16, machine="pc-q35-7.2")


@asynccontextmanager
async def somebody_elses(
    rig: Any, tools: Any, folder: Path, *words: str, machine: str = "pc-q35-7.2", ram: str = "shared"
) -> AsyncIterator[Any]:
    """A QEMU that no host updater started, with sockets in a folder."""
    file = rig.place(folder) / "ram"
    memory = {
        "shared": [f"memory-backend-file,id=ram,mem-path={file},size=16M,share=on"],
        "private": [f"memory-backend-file,id=ram,mem-path={file},size=16M"],
        "memfd": ["memory-backend-memfd,id=ram,size=16M,share=on"],
    }.get(ram)
    argv = [rig.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-m", "16", "-accel", "tcg"]
    argv += ["-machine", machine + (",memory-backend=ram" if memory else "")]
    argv += ["-object", memory[0]] if memory else []
    for name in ("qmp", "guard"):
        argv += ["-qmp", f"unix:{folder}/{name},server=on,wait=off"]
    process = rig.start([*argv, *words], folder / "log")
    try:
        await tools.until(lambda: listens(folder / "guard") or process.poll() is not None, "its sockets")
        assert process.poll() is None, (folder / "log").read_text()
        yield process
    finally:
        process.kill()
        process.wait()


def listens(path: Path) -> bool:
    """Whether somebody listens there."""
    with suppress(OSError):
        return listener_of(str(path)) > 0
    return False


def adopt(folder: Path) -> Adopt:
    """Where its sockets are."""
    return Adopt(qmp=str(folder / "qmp"), guard_qmp=str(folder / "guard"))


def kill(pid: int) -> None:
    """End what somebody else started and a swap replaced."""
    os.kill(pid, signal.SIGKILL)


async def test_start_and_stop(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    assert driver.process_of("a").startswith("QEMU 7.2.")
    assert driver.process_of("a").endswith(f"(pid {pid})")
    (ram_file,) = rig.ram_files("a")
    ram_folder = ram_file.parent
    assert ram_folder.stat().st_mode & 0o777 == 0o700
    ram = ram_file.stat()
    assert (ram.st_mode & 0o777, ram.st_size) == (0o600, 16 << 20)
    assert ram.st_blocks * 512 >= 16 << 20, "reserved at the start"
    assert (rig.folder / "run" / "a").stat().st_mode & 0o777 == 0o700
    await driver.close(stop_vms=True)
    rig.driver = None
    assert not tools.runs(pid)
    assert not ram_folder.exists()
    assert driver.states() == {"a": "stopped"}


async def test_qemu_inherits_no_secret_of_the_services_starter(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_SECRET_KEY", "hunter2")
    driver = await rig.open({"a": SMALL})
    environ = Path(f"/proc/{tools.pid_of(driver, 'a')}/environ").read_bytes()  # noqa: ASYNC240
    assert b"PATH=" in environ
    assert b"hunter2" not in environ
    await driver.prepare("a", "op", "replace", "")
    assert "hunter2" not in str(driver.resume_plan("a")), "it would be written into the guard's intent"
    await driver.release("a")


async def test_guest_that_shuts_itself_down(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL, "b": SMALL})
    with suppress(QmpFailed):  # it may be gone before it answers whatever else it was asked
        await driver._guests["a"].qmp.execute("quit")
    async with asyncio.timeout(patient(10)):
        while driver.states()["a"] != "stopped":
            await driver.changed()
    assert driver.states() == {"a": "stopped", "b": "running"}
    assert driver.ping() == "not running: a (its process has ended)"
    with pytest.raises(FreezeFailed, match="is not running"):
        await driver.freeze("a", tools.soon())
    with pytest.raises(DriverError, match="its process has ended"):
        await driver.prepare("a", "op-1", "swap", "")
    # The next life starts it again, and what its RAM file held is not kept.
    driver = await rig.open({"a": SMALL, "b": SMALL})
    assert (driver.states(), driver.ping()) == ({"a": "running", "b": "running"}, "")


async def test_vm_that_was_ending_when_the_next_life_found_it_is_started(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await rig.open({"a": SMALL})
    before = tools.pid_of(driver, "a")
    os.kill(before, signal.SIGSTOP)  # it does not answer any more, and its process is still there
    wait = VmSupervisor._end_of

    async def killed_meanwhile(run: VmProcessRecord) -> None:
        os.kill(run.pid, signal.SIGKILL)
        await wait(run)

    monkeypatch.setattr(VmSupervisor, "_end_of", staticmethod(killed_meanwhile))
    driver = await rig.open({"a": SMALL})
    assert (driver.states(), driver.ping()) == ({"a": "running"}, "")
    assert tools.pid_of(driver, "a") != before


async def test_vm_that_had_ended_before_it_was_attached_is_started(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await rig.open({"a": SMALL})
    before = tools.pid_of(driver, "a")
    attach = Guest.attach

    async def killed_before(guest: Guest, run: VmProcessRecord, *more: Any) -> None:
        if run.pid == before:
            os.kill(before, signal.SIGKILL)
            os.waitpid(before, 0)  # noqa: ASYNC222 - it is as good as dead
        await attach(guest, run, *more)

    monkeypatch.setattr(Guest, "attach", killed_before)
    driver = await rig.open({"a": SMALL})
    assert (driver.states(), driver.ping()) == ({"a": "running"}, "")


async def test_guest_that_said_its_end_is_stopped_until_it_is_seen_to_run(rig: Any) -> None:
    driver = await rig.open({"a": SMALL})
    guest = driver._guests["a"]
    guest._on_event(QmpEvent("SHUTDOWN", {}, time.monotonic()))
    await guest.qmp.close()  # as QEMU does some time before its process is gone
    assert driver.states() == {"a": "stopped"}
    with pytest.raises(DriverError, match="its process has ended"):
        await driver.prepare("a", "op-1", "swap", "")
    # It runs after all: found out by looking again, as for every VM that tells nothing.
    async with asyncio.timeout(patient(10)):
        while driver.states()["a"] != "running":
            await driver.changed()
    assert driver.ping() == ""


async def test_vm_that_cannot_be_started_is_named_and_the_others_run(rig: Any) -> None:
    bad = Definition(memory_mib=16, machine="pc-q35-99.9")
    driver = await rig.open(
        {
            "a": SMALL,
            "bad": bad,
            "bridged": Definition(memory_mib=16, machine="pc-q35-7.2", nic=(Nic(bridge="no-such-br"),)),
        }
    )
    assert driver.states() == {"a": "running", "bad": "stopped", "bridged": "stopped"}
    assert "bad (/usr/bin/qemu-system-x86_64 did not start: unsupported machine type" in driver.ping()
    assert "bridged" in driver.ping()
    assert "no-such-br" in driver.ping() or "network script" in driver.ping()
    assert driver.capabilities("bad").missing["swap"].startswith("/usr/bin/qemu")
    assert rig.ram_files("bad") == []


@pytest.mark.parametrize(
    ("binary", "why"), [("/bin/true", "ended without a word"), ("no-such-qemu", "there is no program")]
)
async def test_start_with_a_binary_that_is_no_qemu(rig: Any, binary: str, why: str) -> None:
    driver = await rig.open({"a": SMALL}, binary=binary)
    assert driver.states() == {"a": "stopped"}
    assert why in driver.ping()


async def test_full_dev_shm(rig: Any, small_disk: Path) -> None:
    driver = await rig.open({"a": SMALL}, ram_dir=str(small_disk))
    assert driver.states() == {"a": "stopped"}
    assert f"its RAM of 16 MiB does not fit into {small_disk}: 8 MiB are free" in driver.ping()
    assert rig.ram_files("a") == []


async def test_folder_whose_sockets_would_have_too_long_names(rig: Any) -> None:
    driver = await rig.open({"a": SMALL}, run_dir=str(rig.folder / ("long-" * 20)))
    assert "more than 107 bytes: give a shorter [qemu] run_dir" in driver.ping()


async def test_what_earlier_lives_left_is_swept(rig: Any, tools: Any) -> None:
    """A process without a record and without a VM's sockets, and a RAM file without a guest."""
    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    folder = rig.ram_files("a")[0].parent
    (rig.folder / "state" / "vms" / "a.qemu.json").unlink()
    for each in (rig.folder / "run" / "a").iterdir():
        each.unlink()
    (folder / "removed.ram").write_bytes(b"x")
    driver = await rig.open({"a": SMALL})
    assert driver.states() == {"a": "running"}
    assert tools.pid_of(driver, "a") != pid
    await rig.only(tools.pid_of(driver, "a"))
    assert [path.name for path in folder.iterdir()] == ["a.ram"]


async def test_ram_file_that_was_deleted(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    (ram,) = rig.ram_files("a")
    ram.rename(ram.with_suffix(".kept"))
    for method in ("swap", "replace"):
        with pytest.raises(DriverError, match="is not there any more"):
            await driver.prepare("a", "op-1", method, "")
    with pytest.raises(DriverError, match="cannot be read"):
        await driver.memory_digest("a", tools.soon())
    ram.write_bytes(bytes(16 << 20))
    with pytest.raises(DriverError, match="deleted under it and made again"):
        await driver.prepare("a", "op-1", "swap", "")
    ram.write_bytes(b"short")
    with pytest.raises(DriverError, match="has 5 bytes"):
        await driver.prepare("a", "op-1", "swap", "")
    with pytest.raises(DriverError, match="it has 5 bytes and the guest's RAM 16777216"):
        await driver.memory_digest("a", tools.soon())
    # The next life sees it at once, before anybody asks for a swap.
    driver = await rig.open({"a": SMALL})
    assert "has 5 bytes" in driver.capabilities("a").missing["swap"]
    assert driver.capabilities("a").methods == ("live", "freeze", "reboot")
    ram.with_suffix(".kept").rename(ram)
    assert driver.states() == {"a": "running"}


async def test_adopt(rig: Any, tools: Any) -> None:
    """A VM that somebody else starts: frozen, swapped, replaced, and left running at the end."""
    place = rig.folder / "theirs"
    async with somebody_elses(rig, tools, place, machine="q35") as process:
        driver = await rig.open({"a": adopt(place)})
        assert driver.states() == {"a": "running"}
        assert tools.pid_of(driver, "a") == process.pid
        assert driver.capabilities("a").methods == ("live", "swap", "freeze", "replace")
        assert driver.capabilities("a").clock == "none"
        with pytest.raises(NotPossible, match="no guest agent"):
            await driver.sync_clock("a")
        await driver.freeze("a", tools.soon())
        assert driver.states() == {"a": "paused"}
        assert await driver.resume("a", 5) == "running"
        await driver.prepare("a", "op-1", "swap", "")
        await driver.hand_over("a", tools.soon())
        await driver.release("a")
        assert not tools.runs(process.pid)
        second = tools.pid_of(driver, "a")
        machine = driver._guests["a"].run.argv
        assert "pc-q35-7.2,memory-backend=ram" in machine, "the alias was resolved"
        driver = await rig.open({"a": adopt(place)})
        assert tools.pid_of(driver, "a") == second
        await driver.prepare("a", "op-2", "replace", "")
        await driver.checkpoint("a", tools.soon())
        assert await driver.resume("a", 10) == "running"
        await driver.release("a")
        third = tools.pid_of(driver, "a")
        assert third not in (second, process.pid)
        await driver.close(stop_vms=True)
        rig.driver = None
        assert tools.runs(third), "what was not started here is not stopped here"
        kill(third)
        await tools.until(lambda: not tools.runs(third), "its end")


@pytest.mark.parametrize(
    ("ram", "words", "methods", "why"),
    [
        ("private", (), ("live", "freeze"), "mapped privately: memory-backend-file lacks share=on"),
        ("memfd", (), ("live", "freeze"), "its RAM is a memfd"),
        ("none", (), ("live", "freeze"), "private memory of the process"),
        ("shared", ("-snapshot",), ("live", "freeze"), "-snapshot keeps its disk writes"),
        ("shared", ("-gdb", "tcp:127.0.0.1:0"), ("live", "freeze", "replace"), "gdb server"),
    ],
)
async def test_adopt_what_cannot_be_swapped(
    rig: Any, tools: Any, ram: str, words: tuple[str, ...], methods: tuple[str, ...], why: str
) -> None:
    place = rig.folder / "theirs"
    async with somebody_elses(rig, tools, place, *words, ram=ram):
        driver = await rig.open({"a": adopt(place)})
        assert driver.capabilities("a").methods == methods
        assert why in driver.capabilities("a").missing["swap"]
        with pytest.raises(DriverError) as caught:
            await driver.prepare("a", "op-1", "swap", "")
        assert why in caught.value.why
        assert driver.states() == {"a": "running"}


async def test_adopt_without_a_socket_for_the_guard(rig: Any, tools: Any) -> None:
    place = rig.folder / "theirs"
    async with somebody_elses(rig, tools, place):
        driver = await rig.open({"a": Adopt(qmp=str(place / "qmp"))})
        assert driver.states() == {"a": "running"}
        assert driver.capabilities("a").methods == ("live",)
        with pytest.raises(FreezeFailed, match="guard_qmp"):
            await driver.freeze("a", tools.soon())
        with pytest.raises(DriverError, match="pause guard"):
            driver.resume_plan("a")


async def test_two_vms_cannot_be_one_process(rig: Any, tools: Any) -> None:
    place = rig.folder / "theirs"
    async with somebody_elses(rig, tools, place):
        one = Adopt(qmp=str(place / "qmp"), guard_qmp=str(place / "guard"))
        other = Adopt(qmp=str(place / "guard"), guard_qmp=str(place / "qmp"))
        driver = await rig.open({"a": one, "b": other})
        assert sorted(driver.states().values()) == ["running", "stopped"]
        assert "which is VM " in driver.ping()


async def test_qmp_socket_that_is_busy(rig: Any, tools: Any) -> None:
    """Such as libvirt's monitor: one client at a time, so we cannot know what the VM does."""
    place = rig.folder / "theirs"
    async with somebody_elses(rig, tools, place):
        client = await AsyncQmp.connect(str(place / "qmp"), 5)
        driver = await rig.open({"a": adopt(place)})
        assert "somebody else is connected to it" in driver.ping()
        assert driver.capabilities("a").methods == ("live",)
        await client.close()
        async with asyncio.timeout(patient(20)):
            # QEMU first takes up, and drops, who gave up waiting: the next look may come too early.
            while driver.states() != {"a": "running"}:
                await driver._supervisor.find(driver._guests["a"])


@contextmanager
def speaker(path: Path, line: bytes) -> Iterator[None]:
    """Somebody who says one line to everybody."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(8)

    def serve() -> None:
        with suppress(OSError):  # the end
            while True:
                with listener.accept()[0] as client:
                    client.sendall(line)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


async def test_qmp_socket_of_somebody_who_is_no_qemu(rig: Any) -> None:
    place = rig.place("theirs")
    version = {"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": ""}
    greeting = json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\n"
    with speaker(place / "qmp", greeting):
        driver = await rig.open({"a": adopt(place), "b": adopt(rig.folder / "nowhere")})
        assert driver.states() == {"a": "stopped", "b": "stopped"}
        assert f"a ({place}/qmp is served by somebody else: process {os.getpid()} (" in driver.ping()
        assert f"b ({rig.folder}/nowhere/qmp: No such file or directory)" in driver.ping()
        assert driver.capabilities("a").methods == ("live",)


async def test_discovered_vms(rig: Any, tools: Any) -> None:
    place = rig.folder / "guests"
    text = f'host = "h"\ndriver = "qemu"\n[qemu]\ndiscover = "{place}"\n[[vm]]\nname = "named"\nset = "s"\nupdate_domain = 1\n'
    async with AsyncExitStack() as theirs:
        for name in ("named", "found", "bad.name"):
            await theirs.enter_async_context(somebody_elses(rig, tools, place / name))
        file, passed = with_discovered(parse_host_file(text, "host.toml"))
        assert [(vm.name, vm.set_name) for vm in file.vm] == [("named", "s"), ("found", "_found")]
        assert list(passed) == [str(place / "bad.name")]
        driver = await rig.open({vm.name: None for vm in file.vm}, discover=str(place))
        assert driver.states() == {"named": "running", "found": "running"}
        assert driver.capabilities("found").methods == ("live", "swap", "freeze", "replace")


async def test_process_that_hangs(rig: Any, tools: Any) -> None:
    """Stopped by a signal it answers nobody: a freeze says so in time, and a resume lets it go."""
    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    os.kill(pid, signal.SIGSTOP)
    await tools.until(lambda: driver.states() == {"a": "paused"}, "the signal")
    began = time.monotonic()
    with pytest.raises(FreezeFailed, match="does not answer 'stop'"):
        await driver.freeze("a", time.monotonic() + 0.3)
    with pytest.raises(DriverError, match="does not answer"):
        await driver.prepare("a", "op-1", "freeze", "")
    assert time.monotonic() - began < patient(5)
    assert await driver.resume("a", 5) == "running"
    # The `stop` that was given up comes late, and is undone: nothing of it is left.
    await asyncio.sleep(0.1)  # the thing measured: it does not freeze by itself
    assert driver.states() == {"a": "running"}


async def test_resumed_by_somebody_else(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.freeze("a", tools.soon())
    guard = await AsyncQmp.connect(str(rig.folder / "run" / "a" / "guard"), 5)
    with pytest.raises(QmpCommandRefused, match="no-such"):
        await guard.execute("no-such-command")
    await guard.execute("cont")
    await guard.close()
    await tools.until(lambda: driver.states()["a"] == "running", "the event")


async def test_connecting_to_nobody(rig: Any) -> None:
    garbage = b'{"hello": "there"}\n'
    with speaker(rig.folder / "long", garbage), pytest.raises(QmpUnreachable, match="does not speak QMP"):
        await AsyncQmp.connect(str(rig.folder / "long"), 5)
    with speaker(rig.folder / "short", b""), pytest.raises(QmpUnreachable, match="does not speak QMP"):
        await AsyncQmp.connect(str(rig.folder / "short"), 5)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(rig.folder / "silent"))
        silent.listen(8)
        with pytest.raises(QmpUnreachable, match=r"no QMP greeting within 0\.1 s"):
            await AsyncQmp.connect(str(rig.folder / "silent"), 0.1)
    with pytest.raises(QmpUnreachable, match="No such file"):
        await AsyncQmp.connect(str(rig.folder / "nobody"), 0.1)
