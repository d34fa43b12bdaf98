"""Whether a host's wall clock may be its guests' reference."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caesura.contract.messages import ClockSyncAnswered, ClockSyncRequested
from caesura_host_updater.clocks import reference_clock
from caesura_host_updater.clocks.reference_clock import ReferenceClock, is_synchronized
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.inventory.vm_spec import VmSpec
from caesura_host_updater.operation.crash_recovery import CrashRecovery
from caesura_host_updater.service import HostUpdater
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.kernel_change import Arrival, KernelChange
from caesura_vmcontrol.kernel_change import HostClock as Source
from caesura_vmcontrol.procfs import boot_id


class Ntp:
    """What the kernel says."""

    synchronized = False

    def __call__(self) -> bool:
        return self.synchronized


async def loaded(folder: Path, ntp: Ntp) -> ReferenceClock:
    """As a start of the service has it."""
    clock = ReferenceClock(folder, ntp)
    await clock.load()
    return clock


async def distrusted(folder: Path) -> None:
    """A run that distrusted its clock, and ended."""
    clock = await loaded(folder, Ntp())
    clock.distrust(1.0)
    await clock.close()


async def test_what_was_found_at_the_start_is_not_forgotten_for_what_is_on_the_disk(tmp_path: Path) -> None:
    """The VMs are resumed before anything of the disk is waited for."""
    clock = ReferenceClock(tmp_path, Ntp())
    clock.distrust(2.0)
    assert "2 s off" in clock.error()
    await clock.load()
    assert "2 s off" in clock.error()


async def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(reference_clock, "write_durably", lambda *_: answers.wait())
    clock = ReferenceClock(tmp_path, Ntp())
    clock.distrust(1.0)
    assert "1 s off" in clock.error()
    answers.set()
    await clock.close()


async def test_a_clock_is_trusted_unless_somebody_says_otherwise(tmp_path: Path) -> None:
    assert (await loaded(tmp_path, Ntp())).error() == "", (
        "a host without NTP is its guests' reference as ever"
    )


async def test_until_ntp_has_set_it_and_over_restarts_of_the_service(tmp_path: Path) -> None:
    ntp = Ntp()
    one = await loaded(tmp_path, ntp)
    one.distrust(1.0)
    assert "1 s off" in one.error()
    await one.close()
    other = await loaded(tmp_path, ntp)
    assert "1 s off" in other.error()
    ntp.synchronized = True
    assert other.error() == ""
    ntp.synchronized = False
    assert other.error() == "", "what happens to the clock afterwards is not of the change of the kernel"
    await other.close()
    assert (await loaded(tmp_path, ntp)).error() == ""


async def test_not_in_another_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await distrusted(tmp_path)
    monkeypatch.setattr(reference_clock, "boot_id", lambda: "another")
    assert (await loaded(tmp_path, Ntp())).error() == ""


async def test_a_damaged_file_is_none(tmp_path: Path) -> None:
    await distrusted(tmp_path)
    (tmp_path / "host-clock.json").write_bytes(b"{")
    assert (await loaded(tmp_path, Ntp())).error() == ""


def test_the_kernel_is_asked_and_nothing_is_set() -> None:
    """``adjtimex`` returns TIME_ERROR (5) for a clock that nobody keeps."""
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(256))
    assert is_synchronized() == (0 <= state < 5)


@pytest.mark.parametrize(("source", "said"), [("rtc", [1.0]), ("tsc", [])])
async def test_an_arrival_says_whether_the_time_was_carried_over(source: Any, said: list[float]) -> None:
    arrival = Arrival(boot_id(), "6.1", "unit", Source(source, 0.2, 1.0), 5.0)
    held = Intent(
        "op", "former", 0.0, 1.0, (), kernel_change=KernelChange("6.1", "/carve-out", arrival=arrival)
    )
    found: list[float] = []
    nothing: Any = SimpleNamespace()
    one = CrashRecovery(
        "host-1",
        driver=nothing,
        guard=nothing,
        journal=nothing,
        fact_factory=nothing,
        finalizer=nothing,
        pauses=nothing,
        has_clock=lambda _: True,
        resumed={},
        clock_unsure=found.append,
    )
    one._note_clock(held)
    one._note_clock(held)
    assert found == said
    former = replace(arrival, boot_id="former")
    one._note_clock(replace(held, kernel_change=KernelChange("6.1", "/carve-out", arrival=former)))
    assert found == said


async def test_no_agent_is_told_a_time_that_may_be_wrong(updater_with: Callable[..., HostUpdater]) -> None:
    class Nothing:
        on_lost: Any = None

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    told: list[ClockSyncAnswered] = []

    async def send(message: ClockSyncAnswered, **_: object) -> None:
        told.append(message)

    given: Any = Nothing()
    file = HostFile(host="host-1", vm=(VmSpec(name="a", set="web", update_domain=0),))
    updater = updater_with(file, given, driver=given, metrics=given)
    updater.post = SimpleNamespace(send=send)  # type: ignore[assignment]
    question = ClockSyncRequested(vm="a", exchange="e-1", t1_ns=1)
    received: Any = None
    ntp = Ntp()
    updater._host_clock._synchronized = ntp
    updater._host_clock.distrust(1.0)
    await updater._on_clock_request(question, received)
    assert told == []
    ntp.synchronized = True
    await updater._on_clock_request(question, received)
    assert [each.vm for each in told] == ["a"]
