"""The swap: a guest goes from one QEMU to the next, or stays where it was, whatever happens to the next."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from caesura_host_updater.drivers.port import DriverError, SwapFailed
from caesura_host_updater.drivers.qemu.definition import Definition, Disk, Nic
from caesura_host_updater.drivers.qemu.handover import SWAP_CAPABILITIES, set_capabilities
from caesura_host_updater.drivers.qemu.memory_comparison import Compared, NoView, View, Views
from caesura_host_updater.drivers.sampling import sampled_offsets
from caesura_testing.patience import patient
from caesura_vmcontrol.claims import note

SMALL = Definition(memory_mib=16, machine="pc-q35-7.2", vcpus=2, nic=(Nic(),))


async def swap(driver: Any, vm: str = "a", operation: str = "op-1", binary: str = "") -> Any:
    """Prepare, hand over, release."""
    await driver.prepare(vm, operation, "swap", binary)
    handed = await driver.hand_over(vm, time.monotonic() + 10)
    await driver.release(vm)
    return handed


def policies(pid: int) -> set[int]:
    """How its threads are scheduled."""
    return {os.sched_getscheduler(int(path.name)) for path in Path(f"/proc/{pid}/task").iterdir()}


async def test_swap_there_and_on(rig: Any, tools: Any) -> None:
    """Three processes one after the other; the sockets keep their names, and there is never another process."""
    driver = await rig.open({"a": SMALL})
    assert driver.capabilities("a").methods == ("live", "swap", "freeze", "replace", "reboot")
    first = tools.pid_of(driver, "a")
    names = {path.name for path in (rig.folder / "run" / "a").iterdir()}
    for number in range(2):
        before = tools.pid_of(driver, "a")
        handed = await swap(driver, operation=f"op-{number}")
        assert handed.called_at <= handed.frozen_at <= handed.resumed_at <= time.monotonic()
        assert handed.resumed_at - handed.frozen_at < 0.5
        assert handed.detail.startswith("QEMU 7.2.")
        assert handed.sampled is True, handed.sampled_note
        await rig.only(tools.pid_of(driver, "a"))
        assert tools.pid_of(driver, "a") != before
        assert policies(tools.pid_of(driver, "a")) == policies(os.getpid()) == {os.SCHED_OTHER}
    assert driver.states() == {"a": "running"}
    assert tools.pid_of(driver, "a") != first
    assert {path.name for path in (rig.folder / "run" / "a").iterdir()} == names | {"next"}
    assert not list((rig.folder / "run" / "a" / "next").iterdir())
    assert not (rig.folder / "state" / "vms" / "a.operations").exists()
    await driver.freeze("a", tools.soon())
    assert await driver.resume("a", 5) == "running"
    pid = tools.pid_of(driver, "a")
    driver = await rig.open({"a": SMALL})
    assert tools.pid_of(driver, "a") == pid, "the next life finds the process that has the guest"
    await swap(driver, operation="op-9")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ('words += ["-device", "virtio-rng-pci"]', "has device virtio-rng-pci 2"),
        (
            'words[words.index("virtio-rng-pci")-1:words.index("virtio-rng-pci")+1] = []',
            "lacks device virtio-rng-pci 1",
        ),
        ('words[words.index("virtio-rng-pci")] += ",addr=0x10"', "device at PCI 00:02.0"),
        (
            'words = [w.replace("16M", "32M") for w in words]',
            "backing store size 0x1000000 does not match",
        ),
        ('words[words.index("-smp")+1] = "1"', "has 2 vCPUs and the new process 1"),
        ('words[words.index("-machine")+1] = "pc-q35-7.1,memory-backend=ram"', "is a pc-q35-7.2 and"),
        ('words[words.index("-machine")+1] = "pc-q35-99.9,memory-backend=ram"', "unsupported machine type"),
        ('words += ["-device", "no-such-device"]', "'no-such-device' is not a valid device model name"),
    ],
)
async def test_new_process_that_is_not_the_same_is_refused_before_the_pause(
    rig: Any, tools: Any, change: str, why: str
) -> None:
    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    with pytest.raises(DriverError) as caught:
        await driver.prepare("a", "op-1", "swap", rig.wrapper(change))
    assert why in caught.value.why
    assert driver.states() == {"a": "running"}
    await rig.only(pid)
    assert not (rig.folder / "state" / "vms" / "a.operations").exists()
    await swap(driver, operation="op-2")


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 0", "is not QEMU: asked for its version it says 'nothing'"),
        ("echo GNU bash, version 5", "is not QEMU: asked for its version it says 'GNU bash, version 5'"),
        ('[ "$1" = --version ] && exec qemu-system-x86_64 --version; exit 3', "it ended without a word"),
        ('[ "$1" = --version ] && exec qemu-system-x86_64 --version; echo no room >&2; exit 1', "no room"),
        (
            '[ "$1" = --version ] && exec qemu-system-x86_64 --version; exec sleep 60',
            "does not answer within 1 s",
        ),
    ],
)
async def test_binary_that_is_no_qemu(rig: Any, tools: Any, script: str, why: str) -> None:
    driver = await rig.open({"a": SMALL}, start_timeout_s=1.0)
    for method in ("swap", "replace"):
        with pytest.raises(DriverError) as caught:
            await driver.prepare("a", f"op-{method}", method, rig.script(script))
        assert why in caught.value.why
    with pytest.raises(DriverError, match="is not a program"):
        await driver.prepare("a", "op-9", "swap", "/no/such/qemu")
    assert driver.states() == {"a": "running"}
    await rig.only(tools.pid_of(driver, "a"))


async def failed(rig: Any, tools: Any, driver: Any, operation: str = "op-1") -> str:
    """A hand-over that must fail: the reason. The old process runs the guest alone and can be handed over later."""
    pid = tools.pid_of(driver, "a")
    with pytest.raises(SwapFailed) as caught:
        await driver.hand_over("a", tools.soon())
    assert await driver.resume("a", 5) == "running"
    assert tools.pid_of(driver, "a") == pid
    assert driver.states() == {"a": "running"}
    await rig.only(pid)
    await driver.release("a")
    assert not (rig.folder / "state" / "vms" / "a.operations").exists()
    await swap(driver, operation=f"{operation}-again")
    return str(caught.value.why)


async def test_new_process_that_refuses_the_state(rig: Any, tools: Any) -> None:
    """The same devices on a board that lacks a timer: QEMU notices when it loads the state."""
    driver = await rig.open({"a": SMALL})
    timer = 'words = [w.replace("pc-q35-7.2,", "pc-q35-7.2,hpet=off,") for w in words]'
    await driver.prepare("a", "op-1", "swap", rig.wrapper(timer))
    why = await failed(rig, tools, driver)
    assert "the new QEMU said: " in why
    assert "load of migration failed" in why


async def test_new_process_that_dies_before(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    os.kill(tools.next_pid(driver, "a"), signal.SIGKILL)
    await failed(rig, tools, driver)


async def test_new_process_that_dies_during(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    new = tools.next_pid(driver, "a")
    guest = driver._guests["a"]
    heard = guest.qmp.on_event

    def kill_at_stop(event: Any) -> None:
        heard(event)
        if event.name == "STOP":
            guest.qmp.on_event = heard
            os.kill(new, signal.SIGKILL)

    guest.qmp.on_event = kill_at_stop
    await failed(rig, tools, driver)


async def test_new_process_that_dies_when_it_has_everything(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    qmp = driver._guests["a"].prepared.qmp
    new, status = tools.next_pid(driver, "a"), qmp.status

    async def die(*_: Any) -> str:
        assert await status() == "paused"
        os.kill(new, signal.SIGKILL)
        await tools.until(lambda: not tools.runs(new), "its death")
        raise OSError("it died")

    qmp.status = die
    await failed(rig, tools, driver)


async def test_new_process_that_dies_when_it_is_told_to_run(rig: Any, tools: Any) -> None:
    """It is claimed, and yet the guest can go back: the dead process is shown to have run nothing."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    qmp = driver._guests["a"].prepared.qmp
    new, execute = tools.next_pid(driver, "a"), qmp.execute

    async def die(command: str, *arguments: Any, **named: Any) -> Any:
        if command == "cont":
            os.kill(new, signal.SIGKILL)
        return await execute(command, *arguments, **named)

    qmp.execute = die
    await failed(rig, tools, driver)


async def test_new_process_that_hangs(rig: Any, tools: Any) -> None:
    """A QEMU that sends its state to one that hangs hangs too: a limit of ours, not an answer of theirs, ends it."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    os.kill(tools.next_pid(driver, "a"), signal.SIGSTOP)
    began = time.monotonic()
    why = await failed(rig, tools, driver)
    assert "in time" in why
    assert time.monotonic() - began < patient(8)


async def test_old_process_that_dies_during(rig: Any, tools: Any) -> None:
    """Nobody has everything: the guest is gone, and nothing else of it runs."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    os.kill(tools.pid_of(driver, "a"), signal.SIGKILL)
    with pytest.raises(SwapFailed):
        await driver.hand_over("a", tools.soon())
    assert await driver.resume("a", 5) == "gone"
    await driver.release("a")
    assert driver.states() == {"a": "stopped"}
    await tools.until(lambda: rig.processes() == [], "the end of the new process")
    assert not list((rig.folder / "state" / "vms").glob("a.qemu.json"))


async def test_too_late_to_begin(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    with pytest.raises(SwapFailed, match="too late"):
        await driver.hand_over("a", time.monotonic() - 0.1)
    assert driver.states() == {"a": "running"}
    await failed_release(rig, tools, driver)


async def test_guest_that_stands_still_already(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    await driver.freeze("a", tools.soon())
    with pytest.raises(SwapFailed, match="is paused before anything was done"):
        await driver.hand_over("a", tools.soon())
    assert await driver.resume("a", 5) == "running"
    with pytest.raises(DriverError, match="op-1 has not been released"):
        await driver.prepare("a", "op-2", "swap", "")
    await failed_release(rig, tools, driver)


@pytest.mark.parametrize("noticed", [True, False])
async def test_guard_that_finishes_the_swap_while_the_updater_looks_on(
    noticed: bool, rig: Any, tools: Any
) -> None:
    """The old process is dead, the new one has everything: the guard gives it the guest, and we follow.

    Not noticed: its connection is seen to end before its process is.
    """
    from caesura_vmcontrol.vm_control import resume_vm  # noqa: PLC0415

    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    guest = driver._guests["a"]
    old, new = tools.pid_of(driver, "a"), tools.next_pid(driver, "a")
    with guest.prepared.qmp.watch() as told:
        await set_capabilities(guest.qmp, SWAP_CAPABILITIES)
        await guest.qmp.execute("migrate", uri=f"unix:{rig.folder}/run/a/mig")
        await told.first(lambda event: event.data.get("status") == "completed")
    guest.prepared.begun = True
    if not noticed:
        guest.expect_end()
    os.kill(old, signal.SIGKILL)
    await tools.until(lambda: not tools.runs(old), "its death")
    await tools.until(lambda: guest.qmp is None or guest.qmp.closed, "the end of its connection")
    if noticed:
        await tools.until(lambda: guest.run is None, "the end of its process to be noticed")
    await asyncio.to_thread(resume_vm, driver.resume_plan("a"))
    assert driver.states() == {"a": "paused"}
    assert await driver.resume("a", 5) == "running"
    assert tools.pid_of(driver, "a") == new
    await driver.release("a")
    await rig.only(new)
    await swap(driver, operation="op-2")


async def failed_release(rig: Any, tools: Any, driver: Any) -> None:
    """Released without a hand-over: the new process is ended, the old one never noticed."""
    pid = tools.pid_of(driver, "a")
    await driver.release("a")
    await rig.only(pid)
    assert driver.states() == {"a": "running"}


async def test_decided_otherwise_meanwhile(rig: Any, tools: Any) -> None:
    """The guard gives the guest to the old process while we hand it over: there it stays."""
    from caesura_vmcontrol.claims import claim  # noqa: PLC0415

    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    claim(driver._guests["a"].prepared.plan.claims, 1, "old")
    assert "decided otherwise" in await failed(rig, tools, driver)


async def test_disk_that_somebody_else_locks(rig: Any, tools: Any) -> None:
    """The new process cannot have the disk: it has run nothing, so the guest goes back when the lock is free."""
    image = rig.disk("disk.qcow2")
    disk = Definition(memory_mib=16, machine="pc-q35-7.2", disk=(Disk(file=str(image)),))
    driver = await rig.open({"a": disk})
    await driver.prepare("a", "op-1", "swap", "")
    qmp = driver._guests["a"].prepared.qmp
    status = qmp.status

    async def lock(*_: Any) -> str:
        told: str = await status()
        lock_disk(image, 0.5)
        return told

    qmp.status = lock
    why = await failed(rig, tools, driver)
    assert 'Failed to get "write" lock' in why
    await driver.close(stop_vms=True)
    rig.driver = None
    assert "No errors were found" in rig.check_disk(image)


def lock_disk(image: Path, seconds: float) -> None:
    """What a QEMU does that lets nobody else write (byte 201: RAW_LOCK_SHARED_BASE + write), for a while."""
    handle = os.open(image, os.O_RDWR)
    fcntl.lockf(handle, fcntl.LOCK_SH, 1, 201)
    asyncio.get_running_loop().call_later(seconds, os.close, handle)


async def test_updater_that_dies_after_preparing(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    await driver.prepare("a", "op-1", "swap", "")
    driver = await rig.open({"a": SMALL})
    assert driver.states() == {"a": "running"}
    assert tools.pid_of(driver, "a") == pid
    await rig.only(pid)
    assert not (rig.folder / "state" / "vms" / "a.operations").exists()
    await swap(driver)


async def test_updater_that_dies_before_it_can_write_that_it_handed_over(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    before = rig.run_file("a")
    await driver.prepare("a", "op-1", "swap", "")
    await driver.hand_over("a", tools.soon())
    pid = tools.pid_of(driver, "a")
    (rig.folder / "state" / "vms" / "a.qemu.json").write_text(before)
    driver = await rig.open({"a": SMALL})
    assert driver.states() == {"a": "running"}
    assert tools.pid_of(driver, "a") == pid
    await rig.only(pid)
    await swap(driver, operation="op-2")


async def test_updater_that_dies_in_the_middle(rig: Any, tools: Any) -> None:
    """Both processes stand still and nobody has decided: found as paused, and resumed in the old one."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    guest = driver._guests["a"]
    pid = tools.pid_of(driver, "a")
    note(guest.prepared.plan.claims, "begun")
    with guest.prepared.qmp.watch() as told:
        await set_capabilities(guest.qmp, SWAP_CAPABILITIES)
        await guest.qmp.execute("migrate", uri=f"unix:{rig.folder}/run/a/mig")
        await told.first(lambda event: event.data.get("status") == "completed")
    driver = await rig.open({"a": SMALL})
    assert driver.states() == {"a": "paused"}
    assert await driver.resume("a", 5) == "running"
    await driver.release("a")
    assert tools.pid_of(driver, "a") == pid
    await rig.only(pid)


# -- the guest's memory in both processes (I3) --------------------------------------------------------------

_OTHER_RAM = """
    import shutil
    at = next(number for number, word in enumerate(words) if "mem-path=" in word)
    path = words[at].partition("mem-path=")[2].partition(",")[0]
    {do}
"""


@pytest.mark.parametrize(
    "do",
    [
        "shutil.copyfile(path, path + '.other'); words[at] = words[at].replace(path, path + '.other')",
        "shutil.copyfile(path, path + '.other'); os.rename(path + '.other', path)",
    ],
    ids=["another file", "the same name"],
)
async def test_a_new_process_with_other_memory_never_gets_the_guest(rig: Any, tools: Any, do: str) -> None:
    """The guest would run on in an old copy of its memory, and the swap would be said to have been done."""
    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    binary = rig.wrapper(_OTHER_RAM.format(do=do).strip())
    with driver._guests["a"].qmp.watch() as events, pytest.raises(DriverError, match="other memory than the"):
        await swap(driver, binary=binary)
    assert "STOP" not in {event.name for event in events.events}, "found out before the pause"
    assert await driver.resume("a", 5) == "running"
    await driver.release("a")
    await rig.only(pid)
    for path in Path(rig.ram_files("a")[0]).parent.glob("*.other"):
        path.unlink()


async def test_a_page_that_differs_in_the_pause_leaves_the_guest_where_it_was(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    await driver.prepare("a", "op-1", "swap", "")
    new = tools.next_pid(driver, "a")
    read = View.read

    def damaged(view: View) -> memoryview:
        pages = read(view)
        if view.pid == new:
            pages[-1] ^= 1
        return pages

    # After the first look, which is before the pause.
    compare = Views.compare

    def late(views: Views) -> Compared:
        monkeypatch.setattr(View, "read", damaged)
        return compare(views)

    monkeypatch.setattr(Views, "compare", late)
    with pytest.raises(SwapFailed, match="other memory than the guest: the page at") as caught:
        await driver.hand_over("a", time.monotonic() + 10)
    assert "differs between the old and the new process" in caught.value.differs
    assert caught.value.frozen_at is not None
    assert caught.value.resumed_at is not None
    assert driver.states() == {"a": "running"}
    await driver.release("a")
    await rig.only(pid)
    monkeypatch.undo()
    assert (await swap(driver, operation="op-2")).sampled is True


@pytest.mark.parametrize("trouble", ["not permitted", "slow"])
async def test_what_cannot_be_compared_holds_no_guest_up_and_is_said(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """A proof that cannot be made costs the guest nothing: whether it is enough is for the rollout's policy."""
    driver = await rig.open({"a": SMALL})
    held = threading.Event()
    if trouble == "slow":

        def slow(_: Views) -> Compared:
            held.wait(60)  # RAM that was swapped out to a disk which does not answer
            return Compared(True, "too late")

        monkeypatch.setattr(Views, "compare", slow)
    else:

        def refused(*_: object) -> View:
            raise NoView("reading the memory of process 7 is not permitted")

        monkeypatch.setattr(View, "of", refused)
    handed = await swap(driver)
    held.set()
    assert handed.sampled is None
    assert ("took longer than" if trouble == "slow" else "not permitted") in handed.sampled_note
    await rig.only(tools.pid_of(driver, "a"))


async def test_a_page_that_changes_while_no_process_has_the_guest_is_found(rig: Any, tools: Any) -> None:
    """Replace and freeze: RAM above the limit was never digested at all."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "replace", "")
    await driver.checkpoint("a", tools.soon())
    before = await driver.sampled_digest("a", "op-1/a")
    assert await driver.sampled_digest("a", "op-1/a") == before
    (ram,) = rig.ram_files("a")
    chosen = sampled_offsets("op-1/a", ram.stat().st_size)
    with ram.open("r+b") as file:
        file.seek(chosen[100] + 9)
        byte = file.read(1)
        file.seek(chosen[100] + 9)
        file.write(bytes([byte[0] ^ 0x10]))
        file.flush()
        assert await driver.sampled_digest("a", "op-1/a") != before
        file.seek(chosen[100] + 9)
        file.write(byte)
    assert await driver.sampled_digest("a", "op-1/a") == before
    assert await driver.resume("a", 10) == "running"
    await driver.release("a")
