"""What drivers share whose VMs a platform starts and stops."""

from __future__ import annotations

import asyncio

import pytest

from caesura_host_updater.drivers.found_vms import SingleLook, VmsOfOperation
from caesura_host_updater.drivers.libvirt.resume_paths import is_same_life
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan

_UUID = "783136f9-2b12-4ee3-8a40-5eee38a7cccd"


def plan(number: int, pid: int = 0) -> LibvirtPlan:
    return LibvirtPlan("web-1", "/s", "qemu:///system", _UUID, number, pid, 7 if pid else 0)


async def test_there_are_never_two_looks_at_a_time() -> None:
    begun, go = 0, asyncio.Event()

    async def look() -> None:
        nonlocal begun
        begun += 1
        await go.wait()

    silences: list[str] = []
    single = SingleLook(look, 0.01, lambda: silences.append("silent"))
    await single.take()
    await single.take()
    assert (begun, silences) == (1, ["silent", "silent"]), "it hangs, and nobody waits for it longer"
    go.set()
    await single.take()
    assert begun == 1, "the one that was under way"
    await single.take()
    assert (begun, len(silences)) == (2, 2)


async def test_a_look_that_fails_is_told_to_whoever_takes_it() -> None:
    async def look() -> None:
        raise ZeroDivisionError("a bug")

    single = SingleLook(look, 5.0, lambda: None)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await single.take()


def test_a_vm_stays_one_of_its_operation_until_that_is_over() -> None:
    held: VmsOfOperation[LibvirtPlan] = VmsOfOperation(is_same_life)
    assert not held.remove("web-1")
    held.add("web-1")
    assert "web-1" in held
    assert list(held) == ["web-1"]
    assert not held.was_started_again("web-1", plan(2)), "nothing was paused"
    assert held.remove("web-1")
    assert "web-1" not in held


def test_another_process_is_another_life() -> None:
    held: VmsOfOperation[LibvirtPlan] = VmsOfOperation(is_same_life)
    held.pausing("web-1", plan(1, 4711))
    assert not held.was_started_again("web-1", plan(1, 4711))
    assert not held.was_started_again("web-1", None), "it has ended"
    assert held.was_started_again("web-1", plan(1, 4712)), "its id was given again"
    assert held.was_started_again("web-1", plan(2, 4712))
    assert not held.was_started_again("web-1", plan(1)), "its process is not seen now, and its id is the same"
    assert held.was_started_again("web-1", plan(2))
    held.remove("web-1")
    assert not held.was_started_again("web-1", plan(2, 4712)), "a new operation begins with what runs then"
