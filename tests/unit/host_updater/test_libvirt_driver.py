"""The libvirt driver where no daemon is needed; with one: tests/integration/libvirt."""

from __future__ import annotations

import asyncio
import math
import os
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from caesura_host_updater.drivers.libvirt import domain_view, restarting
from caesura_host_updater.drivers.libvirt import driver as driver_module
from caesura_host_updater.drivers.libvirt.binding import NoBinding
from caesura_host_updater.drivers.libvirt.definition import (
    FoundDomain,
    LibvirtOptions,
    LibvirtVm,
    vms_of,
)
from caesura_host_updater.drivers.libvirt.domain_view import DomainView, look_at_domains
from caesura_host_updater.drivers.libvirt.driver import LibvirtDriver
from caesura_host_updater.drivers.libvirt.guest_memory import GuestMemory
from caesura_host_updater.drivers.libvirt.restarting import DomainRestarter
from caesura_host_updater.drivers.port import DriverError, FreezeFailed, ShutdownFailed
from caesura_testing.libvirt_answers import UUID as _UUID
from caesura_testing.libvirt_answers import Answer, Daemon, QmpSocket, good, refusal, reply, with_job
from caesura_testing.patience import patient
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.procfs import read_process

_LABEL = '<vm name="web-old" set="web" update-domain="0"/>'
_JOB, _STATE, _RESUME, _SUSPEND, _AUTH_LIST, _LOOKUP = 298, 212, 28, 34, 66, 24


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """With one domain that is paused, web-1."""
    made = Daemon(tmp_path / "s")
    yield made
    made.close()


@pytest.fixture
def qmp(tmp_path: Path) -> Iterator[QmpSocket]:
    made = QmpSocket(tmp_path / "q")
    yield made
    made.close()


class _NothingMigrates:
    """The binding's connection, as far as a resume asks it."""

    @staticmethod
    def was_migrated(_uuid: str, _patience_s: float) -> bool:
        return False

    @staticmethod
    def close() -> None:
        """Nothing is open."""


def _driver(daemon: Daemon, tmp_path: Path) -> LibvirtDriver:
    """Not opened: the daemon has no binding."""
    driver = LibvirtDriver(LibvirtOptions(), (daemon.path,), tmp_path)
    (tmp_path / "vms").mkdir()
    driver._connection = _NothingMigrates()  # type: ignore[assignment]
    return driver


def _view(
    daemon: Daemon,
    label: str = _LABEL,
    *,
    number: int = 7,
    more: tuple[FoundDomain, ...] = (),
    which: str = "all",
) -> DomainView:
    """What a look finds: the domain web-1."""
    domains = [FoundDomain(name="web-1", uuid=_UUID, number=number, label=label), *more]
    vms, passed = vms_of(domains, which)  # type: ignore[arg-type]
    numbers = {each.uuid: each.number for each in domains}
    plans = {
        vm.name: LibvirtPlan(vm.name, daemon.path, "qemu:///system", vm.uuid, numbers[vm.uuid], 0, 0)
        for vm in vms
    }
    memories = {vm.name: GuestMemory() for vm in vms}
    found = {each.uuid: each for each in domains}
    return DomainView("9.0.0", found, {vm.name: vm for vm in vms}, plans, memories, passed)


def test_one_vm_that_shuts_down_for_an_update_hides_no_other_that_ended(tmp_path: Path) -> None:
    driver = LibvirtDriver(LibvirtOptions(), ("/s",), tmp_path)
    driver.vms = {name: LibvirtVm(name=name) for name in ("a", "b")}
    driver._error = ""
    driver._restarter.down = {"a"}
    assert driver.ping() == "not running: b (its domain does not run)"


async def test_a_daemon_is_never_asked_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain whose process is not seen from here, as without root: only the daemon says that it has ended."""
    asked: list[threading.Thread] = []

    def condition(_: LibvirtPlan) -> str:
        asked.append(threading.current_thread())
        return "gone"

    monkeypatch.setattr(restarting, "condition", condition)
    assert await restarting.has_ended(LibvirtPlan("a", "/s", "qemu:///system", _UUID, 1, 0, 0))
    assert asked
    assert asked[0] is not threading.current_thread()


@pytest.mark.parametrize(
    ("label", "which", "others"),
    [
        ('<vm name="web-old" set="web" update-domian="0"/>', "all", ()),
        ('<vm name="renamed" set="web" update-domain="0"/>', "all", ()),
        ("", "all", ()),
        ("", "labelled", ()),
        (_LABEL, "all", ("web-old",)),
    ],
)
async def test_a_domain_that_is_paused_keeps_its_name_and_its_way_out(
    daemon: Daemon, tmp_path: Path, label: str, which: str, others: tuple[str, ...]
) -> None:
    """A label that is edited, removed or misspelt in mid-pause; another domain that takes the name."""
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    assert [vm.name for vm in driver.members()] == ["web-old"]
    driver._held.pausing("web-old", driver.plans["web-old"])
    more = tuple(FoundDomain(name=name, uuid=_UUID.replace("7", "6"), number=9) for name in others)
    for _ in range(2):
        driver._take(_view(daemon, label, more=more, which=which))
        assert [(vm.name, vm.uuid) for vm in driver.members()] == [("web-old", _UUID)]
    daemon.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial, b"\0\0\0\1\0\0\0\1")
        if procedure == _STATE and _RESUME in daemon.called
        else good(procedure, serial, arguments)
    )
    assert await driver.resume("web-old", patient(2)) == "running"
    assert _RESUME in daemon.called
    await driver.release("web-old")
    seen = _view(daemon, label, more=more, which=which)
    driver._take(seen)
    assert {vm.name for vm in driver.members()} == set(seen.vms), "the operation is over"


def test_a_domain_that_was_started_again_and_is_no_vm_any_more_counts_as_ended(
    daemon: Daemon, tmp_path: Path
) -> None:
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    driver._held.pausing("web-old", driver.plans["web-old"])
    driver._take(_view(daemon, "", number=8, which="labelled"))
    assert "started again" in driver.health_error("web-old")
    driver._take(_view(daemon, "", number=-1, which="labelled"))
    assert driver.health_error("web-old") == "its domain does not run"


async def test_a_daemon_that_refuses_the_look_refuses_nobody_the_resume(
    daemon: Daemon, qmp: QmpSocket, tmp_path: Path
) -> None:
    daemon.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial, refusal(80, "authentication unavailable"), status=1)
        if procedure == _AUTH_LIST
        else good(procedure, serial, arguments)
    )
    me = read_process(os.getpid())
    assert me is not None
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    plan = replace(driver.plans["web-old"], pid=me.pid, start_ticks=me.start_ticks, qmp=(qmp.path,))
    driver.plans["web-old"] = plan
    assert await driver.resume("web-old", patient(2)) == "running"
    assert qmp.status == "running"


@pytest.mark.parametrize("listed", [True, False])
async def test_a_domain_that_the_daemon_has_lost_keeps_its_way_out(
    daemon: Daemon, qmp: QmpSocket, tmp_path: Path, listed: bool
) -> None:
    """It is listed as off, or no more; its process lives, and is paused."""
    me = read_process(os.getpid())
    assert me is not None
    driver = _driver(daemon, tmp_path)
    seen = _view(daemon)
    plan = replace(seen.plans["web-old"], pid=me.pid, start_ticks=me.start_ticks, qmp=(qmp.path,))
    driver._take(replace(seen, plans={"web-old": plan}))
    driver._held.pausing("web-old", plan)
    daemon.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial, refusal(42, "Domain not found"), status=1)
        if procedure == _LOOKUP
        else good(procedure, serial, arguments)
    )
    off = {_UUID: FoundDomain(name="web-1", uuid=_UUID, number=-1, label=_LABEL)}
    lost = replace(seen, found=off, plans={}) if listed else DomainView("9.0.0")
    for _ in range(2):
        driver._take(lost)
    assert await driver.resume("web-old", patient(2)) == "running"
    assert qmp.status == "running"


@pytest.mark.parametrize("listed", [_LABEL, '<vm name="renamed" set="web" update-domain="0"/>', ""])
async def test_a_start_finds_a_paused_domain_that_the_daemon_has_lost(
    daemon: Daemon, qmp: QmpSocket, tmp_path: Path, listed: str
) -> None:
    """The host updater is started while the daemon calls it off, or unknown: it was reported as ended, and stayed paused."""
    me = read_process(os.getpid())
    assert me is not None
    lost = replace(_view(daemon).plans["web-old"], pid=me.pid, start_ticks=me.start_ticks, qmp=(qmp.path,))
    daemon.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial, refusal(42, "Domain not found"), status=1)
        if procedure == _LOOKUP
        else good(procedure, serial, arguments)
    )
    driver = _driver(daemon, tmp_path)
    off = {_UUID: FoundDomain(name="web-1", uuid=_UUID, number=-1, label=listed)}
    seen = replace(_view(daemon, listed), found=off, plans={}, memories={}) if listed else DomainView("9.0.0")
    driver._take(seen)
    driver.adopt([lost])
    for _ in range(2):
        assert await driver.read_states() == {"web-old": "paused"}
        assert driver.capabilities("web-old").digests == (), "nobody has looked where its memory is"
        driver._take(seen)
    assert await driver.resume("web-old", patient(2)) == "running"
    await driver.release("web-old")
    driver._take(seen)
    assert {vm.name for vm in driver.members()} == set(seen.vms)


def test_a_start_adopts_no_domain_that_is_known_or_over(daemon: Daemon, tmp_path: Path) -> None:
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    known = driver.plans["web-old"]
    other = replace(known, vm="b", uuid=_UUID.replace("7", "6"))
    over = replace(other, pid=os.getpid(), start_ticks=1)
    assert driver.adopt([replace(known, number=3), over, other]) == []
    assert driver.plans == {"web-old": known}
    assert [vm.name for vm in driver.members()] == ["web-old"]
    driver._failed("no libvirt")
    assert driver.adopt([other]) == ["b"]
    assert driver.plans["b"] == other, "nobody says that it is over"


@pytest.mark.parametrize("others", [(), ("web-old",)])
async def test_a_start_knows_a_paused_domain_by_the_name_that_it_was_paused_under(
    daemon: Daemon, tmp_path: Path, others: tuple[str, ...]
) -> None:
    """Its label was edited in the pause; another domain may have taken its name. Nobody found its marker, and it stayed paused."""
    driver = _driver(daemon, tmp_path)
    paused = _view(daemon).plans["web-old"]
    more = tuple(FoundDomain(name=name, uuid=_UUID.replace("7", "6"), number=9) for name in others)
    renamed = _view(daemon, '<vm name="renamed" set="web" update-domain="0"/>', more=more)
    driver._take(renamed)
    assert driver.adopt([paused]) == ["web-old"]
    for _ in range(2):
        assert (await driver.read_states()) == {"web-old": "paused"}
        assert driver.resume_plan("web-old") == paused
        driver._take(renamed)
    await driver.release("web-old")
    driver._take(renamed)
    assert {vm.name for vm in driver.members()} == {"renamed", *others}


async def test_a_start_knows_two_paused_domains_whose_names_were_exchanged(
    daemon: Daemon, tmp_path: Path
) -> None:
    driver = _driver(daemon, tmp_path)
    other = FoundDomain(name="b", uuid=_UUID.replace("7", "6"), number=9, label='<vm name="a"/>')
    seen = _view(daemon, '<vm name="b"/>', more=(other,))
    driver._take(seen)
    paused = [replace(seen.plans["b"], vm="a"), replace(seen.plans["a"], vm="b")]
    assert driver.adopt(paused) == ["a", "b"]
    assert driver.plans == {plan.vm: plan for plan in paused}
    assert {vm.name: vm.domain_name for vm in driver.members()} == {"a": "web-1", "b": "b"}


def test_a_domain_that_was_renamed_and_started_again_is_not_what_was_paused(
    daemon: Daemon, tmp_path: Path
) -> None:
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    assert driver.adopt([replace(driver.plans["web-old"], vm="a", number=3)]) == []
    assert [vm.name for vm in driver.members()] == ["web-old"]


async def test_who_was_paused_by_somebody_else_after_a_refused_freeze_is_left(
    daemon: Daemon, tmp_path: Path
) -> None:
    """libvirt was taking a snapshot of it, and nothing was done."""
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    busy = with_job(6)

    def running(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _STATE:
            return reply(procedure, serial, b"\0\0\0\1\0\0\0\1")
        return busy(procedure, serial, arguments)

    daemon.answer = running
    with pytest.raises(FreezeFailed, match="snapshot") as raised:
        await driver.freeze("web-old", time.monotonic() + patient(5))
    assert raised.value.untouched
    assert _SUSPEND not in daemon.called
    daemon.answer = good
    assert await driver.resume("web-old", 1) == "left"
    assert "not by Caesura" in driver.why_left("web-old")
    assert _RESUME not in daemon.called


async def test_a_migration_that_began_before_a_refused_freeze_leaves_nothing_to_undo(
    daemon: Daemon, tmp_path: Path
) -> None:
    """Its last moments are a pause of libvirt's."""
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    driver._untouched.add("web-old")
    daemon.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial, b"\0\0\0\3\0\0\0\2")
        if procedure == _STATE
        else good(procedure, serial, arguments)
    )
    assert await driver.resume("web-old", patient(1)) == "left"
    assert driver.why_left("web-old") == "libvirt is migrating it to another host"
    assert "web-old" not in driver._late


async def test_a_pause_of_ours_that_came_late_is_nobody_elses(daemon: Daemon, tmp_path: Path) -> None:
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    driver._late.expect(driver.plans["web-old"])
    with pytest.raises(FreezeFailed, match="an earlier pause of it was not answered") as raised:
        await driver.freeze("web-old", time.monotonic() + patient(5))
    assert not raised.value.untouched
    assert driver.why_left("web-old") == ""
    assert "web-old" in driver._late
    await driver._late.close()


async def test_a_late_pause_that_was_ended_by_the_operation_is_expected_no_longer(
    daemon: Daemon, tmp_path: Path
) -> None:
    """The next one is an operator's."""
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    state = b"\0\0\0\1\0\0\0\1"
    daemon.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial, state)
        if procedure == _STATE and (_RESUME in daemon.called) is was_paused
        else good(procedure, serial, arguments)
    )
    was_paused = False
    driver._late.expect(driver.plans["web-old"])
    assert await driver.resume("web-old", patient(2)) == "running"
    assert "web-old" in driver._late, "it may come yet"
    was_paused = True
    assert await driver.resume("web-old", patient(2)) == "running"
    assert "web-old" not in driver._late
    await driver._late.close()


async def test_who_left_it_paused_is_told_how_to_resume_it(daemon: Daemon, tmp_path: Path) -> None:
    """Without the URI, `virsh` of a person asks that person's own daemon."""
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    with pytest.raises(FreezeFailed, match=f"resume it with `virsh -c qemu:///system resume {_UUID}`"):
        await driver.freeze("web-old", time.monotonic() + patient(5))


async def test_a_binding_that_is_missing_is_told_at_the_start(tmp_path: Path) -> None:
    driver = LibvirtDriver(LibvirtOptions(binding=str(tmp_path)), (str(tmp_path / "none"),), tmp_path)
    with pytest.raises(NoBinding):
        await driver.open()
    await driver.close(stop_vms=False)


class _OneDaemon:
    """The binding's connection, where the daemon listens at the socket whose file is there."""

    closed: ClassVar[list[str]] = []

    def __init__(self, _uri: str, socket: str, _binding: str, _changed: Callable[[], None]) -> None:
        self._socket = socket

    def load(self) -> None:
        """Made up."""

    def version(self) -> str:
        if not Path(self._socket).exists():
            raise OSError(f"no libvirt at {self._socket}")
        return "9.0.0"

    def domains(self) -> list[FoundDomain]:
        self.version()
        return [FoundDomain(name="web-1", uuid=_UUID, number=7)]

    def close(self) -> None:
        self.closed.append(self._socket)


async def test_the_socket_of_a_daemon_that_is_away_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A modular daemon came in place of libvirtd, or any one after the host updater: it was away until that was restarted."""
    monkeypatch.setattr(driver_module, "LibvirtConnection", _OneDaemon)
    _OneDaemon.closed.clear()
    modular, monolithic = (tmp_path / name for name in ("virtqemud-sock", "libvirt-sock"))
    driver = LibvirtDriver(LibvirtOptions(), (str(modular), str(monolithic)), tmp_path)
    await driver.open()
    assert f"no libvirt at {monolithic}" in driver.ping()
    monolithic.touch()
    await driver._domains.take()
    assert driver.ping() == ""
    modular.touch()
    await driver._domains.take()
    assert driver.plans["web-1"].socket == str(monolithic), "it answers"
    monolithic.unlink()
    for _ in range(2):
        await driver._domains.take()
    assert driver.ping() == ""
    assert driver.plans["web-1"].socket == str(modular)
    assert _OneDaemon.closed == [str(monolithic)]
    await driver.close(stop_vms=False)
    assert _OneDaemon.closed == [str(monolithic), str(modular)]


def test_a_domain_whose_daemon_is_another_one_now_is_resumed_by_that(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_process(process.pid)
    assert found is not None
    monkeypatch.setattr(
        domain_view,
        "plan_of_domain",
        lambda vm, number, socket, uri: LibvirtPlan(
            vm.name, socket, uri, vm.uuid, number, process.pid, found.start_ticks
        ),
    )
    (tmp_path / "new").touch()
    connection = _OneDaemon("", str(tmp_path / "new"), "", lambda: None)
    view = DomainView()
    for socket in ("/old", "/new"):
        view = look_at_domains(connection, LibvirtOptions(), socket, view)  # type: ignore[arg-type]
        assert view.plans["web-1"].socket == socket


def test_where_the_memory_of_an_adopted_domain_is_is_looked_at_when_it_is_listed_again(
    daemon: Daemon, tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    """It was taken for a file without a name, whose digest failed, until the domain's next start."""
    found = read_process(process.pid)
    assert found is not None
    (tmp_path / "new").touch()
    driver = _driver(daemon, tmp_path)
    socket = str(tmp_path / "new")
    lost = LibvirtPlan("web-1", socket, "qemu:///system", _UUID, 7, process.pid, found.start_ticks)
    assert driver.adopt([lost]) == ["web-1"]
    connection = _OneDaemon("", socket, "", lambda: None)
    view = look_at_domains(connection, LibvirtOptions(), socket, driver._seen)  # type: ignore[arg-type]
    assert view.plans["web-1"] == lost
    assert "is private to its QEMU process" in view.memories["web-1"].error


async def test_a_look_that_breaks_is_told_and_followed_by_the_next(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = _driver(daemon, tmp_path)
    looks = 0

    async def take() -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            driver._event.set()
            raise ZeroDivisionError("a bug")
        driver._looking.cancel()  # type: ignore[union-attr]

    monkeypatch.setattr(driver._domains, "take", take)
    driver._event.set()
    driver._looking = asyncio.create_task(driver._look())
    await asyncio.wait([driver._looking], timeout=patient(10))
    assert looks == 2
    assert "a bug" in driver.ping()
    await driver.close(stop_vms=False)


class _Starting:
    """The view and the connection of a restarter: one domain, which runs as long as its process."""

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self.vms = {"a": LibvirtVm(name="a", uuid=_UUID, domain_name="a")}
        self.plans: dict[str, LibvirtPlan] = {}
        self.said: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.changes = asyncio.Event()
        if process is not None:
            found = read_process(process.pid)
            assert found is not None
            plan = LibvirtPlan("a", "/s", "qemu:///system", _UUID, 1, found.pid, found.start_ticks)
            self.plans = {"a": plan}

    def shut_down(self, _: str) -> None:
        self.said.append("shutdown")

    def start(self, _: str) -> None:
        self.said.append("start")
        self.go.wait()

    async def look(self) -> None:
        if "start" in self.said and self.go.is_set():
            self.plans = {"a": LibvirtPlan("a", "/s", "qemu:///system", _UUID, 2, 0, 0)}

    def restarter(self, folder: Path) -> DomainRestarter:
        return DomainRestarter(self, lambda: self, self.look, folder, self.changes.set)  # type: ignore[arg-type, return-value]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A domain's."""
    made = subprocess.Popen(["sleep", "600"])
    yield made
    made.kill()
    made.wait()


@pytest.mark.parametrize("age_s", [60, 7 * 86400])
async def test_a_domain_that_ends_long_after_it_was_asked_is_not_started_for_that(
    tmp_path: Path, process: subprocess.Popen[bytes], age_s: int
) -> None:
    """Its operator shut it down, a week later."""
    world = _Starting(process)
    restarter = world.restarter(tmp_path)
    with pytest.raises(ShutdownFailed):
        await restarter.shut_down("a", time.monotonic() + 0.1)
    assert not await restarter.start("a", time.monotonic())
    asked_at = time.time() - age_s
    os.utime(tmp_path / "a.shutdown", (asked_at, asked_at))
    world.plans.clear()
    restarter.start_ended(())
    async with asyncio.timeout(60):
        while (tmp_path / "a.shutdown").exists():  # noqa: ASYNC110 - a file's end
            await asyncio.sleep(0.01)
    assert world.said == (["shutdown", "start"] if age_s < 3600 else ["shutdown"])
    assert "a" not in restarter.down


async def test_a_domain_that_was_down_already_is_started_again_after_the_update(tmp_path: Path) -> None:
    world = _Starting(None)
    restarter = world.restarter(tmp_path)
    assert await restarter.shut_down("a", time.monotonic() + 5) == "itself"
    restarter.start_ended(())
    async with asyncio.timeout(60):
        while restarter.down:  # noqa: ASYNC110 - a thread's work
            await asyncio.sleep(0.01)
    assert world.said == ["start"]


async def test_a_start_that_hangs_delays_nobody_is_named_and_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that hangs: looks, the undoing of late pauses and the updater's own start go on."""
    monkeypatch.setattr(restarting, "_START_S", 0.01)
    (tmp_path / "a.shutdown").touch()
    world = _Starting(None)
    world.go.clear()
    restarter = world.restarter(tmp_path)
    try:
        async with asyncio.timeout(60):
            await restarter.open()
            await world.changes.wait()
        assert restarter.errors == {"a": "libvirt has not started it within 0.01 s"}
        restarter.start_ended(())
        with pytest.raises(DriverError, match="has not started it within"):
            await restarter.start("a", time.monotonic())
        assert world.said == ["start"]
        world.changes.clear()
    finally:
        world.go.set()
    async with asyncio.timeout(60):
        await world.changes.wait()
    assert (restarter.errors, restarter.down) == ({}, set())
    await restarter.close()


async def _looked(restarter: DomainRestarter) -> None:
    """As after a look of the driver's, to the end of what that begins."""
    restarter.start_ended(())
    await asyncio.gather(*restarter._late.values())


async def test_a_start_that_outlasts_its_operation_is_over_when_the_domain_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its operator shut it down within the hour: it was called broken, and started."""
    monkeypatch.setattr(restarting, "_START_S", 0.01)
    world = _Starting(None)
    world.go.clear()
    restarter = world.restarter(tmp_path)
    try:
        await restarter.shut_down("a", time.monotonic() + 5)
        with pytest.raises(DriverError, match="has not started it within"):
            await restarter.start("a", time.monotonic())
    finally:
        world.go.set()
    async with asyncio.timeout(60):
        while restarter._starts:  # noqa: ASYNC110 - a thread's work
            await asyncio.sleep(0.01)
    await world.look()
    await _looked(restarter)
    assert (restarter.down, (tmp_path / "a.shutdown").exists()) == (set(), False)
    world.plans.clear()
    await _looked(restarter)
    assert (world.said, restarter.errors) == (["start"], {})


async def test_a_domain_that_was_started_since_it_was_asked_is_up(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    """It was waited for as long as one that shuts down still, and then called one that had never been down."""
    world = _Starting(None)
    restarter = world.restarter(tmp_path)
    await restarter.shut_down("a", time.monotonic() + 5)
    world.plans = _Starting(process).plans
    assert await restarter.start("a", time.monotonic())
    assert (world.said, restarter.down) == ([], set())


@pytest.mark.parametrize("opened", [False, True])
async def test_a_domain_that_its_operator_started_again_is_not_started_for_an_earlier_request(
    tmp_path: Path, process: subprocess.Popen[bytes], opened: bool
) -> None:
    """It outlasted its operation. ``opened``: the host updater was restarted meanwhile."""
    world = _Starting(process)
    restarter = world.restarter(tmp_path)
    with pytest.raises(ShutdownFailed):
        await restarter.shut_down("a", time.monotonic() + 0.1)
    if opened:
        restarter = world.restarter(tmp_path)
        await restarter.open()
    await _looked(restarter)
    assert restarter.down == {"a"}, "it shuts down still"
    world.plans = {"a": replace(world.plans["a"], number=2, start_ticks=1)}
    await _looked(restarter)
    assert (restarter.down, (tmp_path / "a.shutdown").exists()) == (set(), False)
    world.plans.clear()
    await _looked(restarter)
    assert world.said == ["shutdown"]


async def test_the_ping_names_a_start_that_hangs(daemon: Daemon, tmp_path: Path) -> None:
    driver = _driver(daemon, tmp_path)
    driver._restarter.errors["a"] = "libvirt has not started it within 30 s"
    assert "a ended, and is to be started again: libvirt has not started it" in driver.ping()


# -- a daemon that does not answer in a freeze ------------------------------------------------------------------


class _Suspending:
    """A daemon whose domain runs until it is suspended; its first answers about the state after that are refusals."""

    def __init__(self, refusals: float) -> None:
        self._refusals = refusals
        self._state = 1

    def __call__(self, procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _SUSPEND:
            self._state = 3
        if procedure != _STATE:
            return good(procedure, serial, arguments)
        if self._state == 3 and self._refusals > 0:
            self._refusals -= 1
            return reply(procedure, serial, refusal(38, "busy"), status=1)
        return reply(procedure, serial, struct.pack(">ii", self._state, 1))


async def test_a_look_that_fails_after_the_suspend_is_followed_by_the_next(
    daemon: Daemon, tmp_path: Path
) -> None:
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    daemon.answer = _Suspending(2)
    await driver.freeze("web-old", time.monotonic() + patient(20))
    daemon.answer = good
    assert (await driver.read_states())["web-old"] == "paused"


async def test_a_pause_that_nobody_confirms_is_none_when_its_time_is_over(
    daemon: Daemon, tmp_path: Path
) -> None:
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    daemon.answer = _Suspending(math.inf)
    with pytest.raises(FreezeFailed, match="is not paused in time: libvirt says: busy") as raised:
        await driver.freeze("web-old", time.monotonic() + patient(0.5))
    assert _SUSPEND in daemon.called
    assert not raised.value.untouched


def _ending(procedure: int, serial: int, arguments: bytes) -> bytes | None:
    """A daemon that is dead."""
    return None


def _refusing(procedure: int, serial: int, _: bytes) -> bytes | None:
    """polkit is away."""
    return reply(procedure, serial, refusal(88, "no polkit agent"), status=1)


@pytest.mark.parametrize("answer", [_ending, _refusing])
async def test_a_freeze_that_failed_before_the_suspend_leaves_what_its_operator_had_paused(
    daemon: Daemon, tmp_path: Path, answer: Answer
) -> None:
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon))
    daemon.answer = answer
    with pytest.raises(FreezeFailed) as raised:
        await driver.freeze("web-old", time.monotonic() + patient(5))
    assert raised.value.untouched
    assert await driver.resume("web-old", patient(1)) == "left"
    assert "nothing was done to it" in driver.why_left("web-old")
    daemon.answer = good
    assert await driver.resume("web-old", patient(1)) == "left"
    assert not {_SUSPEND, _RESUME} & set(daemon.called)


@pytest.mark.parametrize("late", [False, True])
async def test_a_label_that_was_misspelt_since_the_plan_has_the_freeze_refused_and_nothing_done(
    daemon: Daemon, tmp_path: Path, late: bool
) -> None:
    """``late``: an earlier pause of ours was not answered, and may be what is found."""
    driver = _driver(daemon, tmp_path)
    driver._take(_view(daemon, ""))
    driver._held.add("web-1")
    driver._take(_view(daemon, '<vm sett="x"/>'))
    if late:
        driver._late.expect(driver.plans["web-1"])
    with pytest.raises(FreezeFailed, match="sett") as raised:
        await driver.freeze("web-1", time.monotonic() + patient(5))
    assert raised.value.untouched is not late
    assert ("web-1" in driver._late) is late
    if not late:
        assert await driver.resume("web-1", patient(1)) == "left"
    assert not {_SUSPEND, _RESUME} & set(daemon.called)
    await driver._late.close()


async def test_a_domain_that_does_not_run_is_not_touched(daemon: Daemon, tmp_path: Path) -> None:
    driver = _driver(daemon, tmp_path)
    driver._take(replace(_view(daemon), plans={}))
    with pytest.raises(FreezeFailed, match="is not running") as raised:
        await driver.freeze("web-old", time.monotonic() + patient(5))
    assert raised.value.untouched
    driver._take(_view(daemon))
    assert await driver.resume("web-old", patient(1)) == "left", "its operator started and paused it"
    assert _RESUME not in daemon.called
