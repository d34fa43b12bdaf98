"""Host updater and guard with the rights that the shipped units and drop-ins give them: which way there is past a daemon that is dead."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from caesura.conformance.drivers import freeze_deadline
from caesura_host_updater.drivers.libvirt.definition import LibvirtOptions
from caesura_host_updater.drivers.libvirt.driver import LibvirtDriver
from caesura_host_updater.guard_client import GuardClient
from caesura_testing.libvirt_daemons import URI, LibvirtDaemon
from caesura_testing.patience import patient
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.vm_control import condition

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process the rights of a unit"),
]

_UNITS = Path(__file__).parents[3] / "deploy" / "systemd"
_PLAN = """
import asyncio, json, sys
from pathlib import Path
from caesura_host_updater.drivers.libvirt.definition import LibvirtOptions
from caesura_host_updater.drivers.libvirt.driver import LibvirtDriver
from caesura_vmcontrol.resume_plans import plan_to_json

async def tell():
    driver = LibvirtDriver(LibvirtOptions(uri=sys.argv[1]), (sys.argv[2],), Path(sys.argv[3]))
    await driver.open()
    print(json.dumps({"qmp": driver.resume_plan("web-1").qmp, "risk": driver.capabilities("web-1").pause_risk}))
    await driver.close(stop_vms=False)

asyncio.run(tell())
"""


def _told(file: Path, key: str) -> str:
    (value,) = [
        line.partition("=")[2]
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith(f"{key}=")
    ]
    return value


def _as_root_of(file: Path) -> list[str]:
    """How systemd starts root with a ``CapabilityBoundingSet``: the first process after it has what is in the set, and cannot get more."""
    capabilities = [
        f"+{each.removeprefix('CAP_').lower()}" for each in _told(file, "CapabilityBoundingSet").split()
    ]
    return ["setpriv", "--no-new-privs", f"--bounding-set={','.join(['-all', *capabilities])}"]


def _root(name: str) -> list[str]:
    """Of the drop-in ``*-root.conf``."""
    file = _UNITS / "libvirt" / f"caesura-{name}-root.conf"
    assert _told(file, "User") == "root"
    return _as_root_of(file)


def _without_drop_in(name: str) -> list[str]:
    """Root, as somebody would make it who only changes ``User=``."""
    return _as_root_of(_UNITS / f"caesura-{name}.service")


@pytest.fixture
def open_daemon(daemon: LibvirtDaemon) -> LibvirtDaemon:
    """Its socket is everybody's, as the system's is; the folder of the monitor sockets is QEMU's user's."""
    daemon.runtime_dir.chmod(0o755)
    (daemon.runtime_dir / "libvirt").chmod(0o755)
    daemon.socket.chmod(0o777)
    return daemon


def _driver(daemon: LibvirtDaemon, folder: Path) -> LibvirtDriver:
    return LibvirtDriver(LibvirtOptions(uri=URI), (str(daemon.socket),), folder)


@pytest.mark.parametrize("rights", [_root, _without_drop_in])
async def test_which_ways_the_host_updater_finds(
    open_daemon: LibvirtDaemon, tmp_path: Path, rights: Callable[[str], list[str]]
) -> None:
    open_daemon.define("web-1")
    command = [
        *(*rights("host-updater"), sys.executable, "-c", _PLAN),
        *(URI, str(open_daemon.socket), str(tmp_path)),
    ]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, check=True, timeout=patient(60)
    )
    told = json.loads(done.stdout.splitlines()[-1])
    if rights is _root:
        (socket,) = told["qmp"]
        assert socket.endswith("/monitor.sock")
        assert "hangs (not: one that is dead)" in told["risk"]
    else:
        assert told["qmp"] == []
        assert "only libvirt's daemon can resume it" in told["risk"]


@asynccontextmanager
async def _guard(start: list[str], folder: Path) -> AsyncIterator[GuardClient]:
    """One with the rights of a unit, and a connection to it."""
    command = [*start, sys.executable, "-m", "caesura_pause_guard", "--state-dir", str(folder)]
    with (folder / "guard.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    client = GuardClient(folder, spawn=False)
    try:
        await client.start(patient(20))
        yield client
    finally:
        process.kill()
        await process.wait()


async def _until(wanted: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(patient(20)):
            while not wanted():  # noqa: ASYNC110 - a guard that does not call us
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(what) from None


@pytest.mark.parametrize("rights", [_root, _without_drop_in])
async def test_a_guard_whose_daemon_is_dead(
    open_daemon: LibvirtDaemon, tmp_path: Path, rights: Callable[[str], list[str]]
) -> None:
    """The host updater dies in the pause. Whoever may not use the monitor socket has said so when it was armed."""
    open_daemon.define("web-1")
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    driver = _driver(open_daemon, tmp_path / "driver")
    await driver.open()
    plan = driver.resume_plan("web-1")
    try:
        async with _guard(rights("pause-guard"), folder) as client:
            await client.arm("op", time.monotonic() + patient(60), [plan])
            assert bool(client.pause_risk("web-1")) is (rights is not _root)
            await driver.freeze("web-1", freeze_deadline())
            open_daemon.kill()
            await client.close()
            if rights is _root:
                await _until(lambda: _seen(driver) == "running", "the guard does not resume it")
            else:
                failed = lambda: "guard.resume_failed" in (folder / "guard.log").read_text()  # noqa: E731
                await _until(failed, "the guard does not try")
                assert _seen(driver) == "frozen"
            open_daemon.start()
            open_daemon.socket.chmod(0o777)
            await _until(lambda: open_daemon.state("web-1") == "running", "libvirt does not resume it")
    finally:
        await driver.close(stop_vms=False)


def _seen(driver: LibvirtDriver) -> Condition:
    return condition(driver.resume_plan("web-1"))


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that every user may enter. Those of pytest are closed again by each session that begins."""
    with tempfile.TemporaryDirectory(prefix="caesura-test-") as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path


async def test_a_guard_with_a_user_of_its_own_and_a_socket_of_the_domains_own(
    open_daemon: LibvirtDaemon, open_path: Path
) -> None:
    """The folder of ``caesura-qmp.tmpfiles``: QEMU's user makes the socket, and by the folder it is our group's. It is a way past a
    daemon that hangs, too.
    """
    kind, _, mode, *_ = (_UNITS / "libvirt" / "caesura-qmp.tmpfiles").read_text().splitlines()[-1].split()
    assert kind == "d"
    ours = ("--reuid=daemon", "--regid=daemon", "--clear-groups")
    qmp, folder = open_path / "qmp", open_path / "state"
    for each, user in ((qmp, "nobody"), (folder, "daemon")):
        each.mkdir()
        shutil.chown(each, user, "daemon")
    qmp.chmod(int(mode, 8))
    folder.chmod(0o700)
    open_daemon.define("web-1", own_qmp=True, qmp_dir=qmp)
    driver = _driver(open_daemon, open_path / "driver")
    await driver.open()
    plan = driver.resume_plan("web-1")
    assert plan.qmp[0] == str(qmp / "web-1.qmp")
    start = ["setpriv", *ours, *_as_root_of(_UNITS / "caesura-pause-guard.service")[1:]]
    try:
        async with _guard(start, folder) as client:
            await client.arm("op", time.monotonic() + patient(60), [plan])
            assert plan.qmp[0] not in client.pause_risk("web-1")
            await driver.freeze("web-1", freeze_deadline())
            with open_daemon.hung():
                await client.close()
                await _until(lambda: _seen(driver) == "running", "the guard does not resume it")
    finally:
        await driver.close(stop_vms=False)
