"""``caesura-host-updater``: the composition root of the host updater."""

from __future__ import annotations

from caesura.runtime.interrupt import QuietInterrupt
from caesura.runtime.logs import get_logger

with QuietInterrupt():
    import asyncio
    import errno
    import fcntl
    import os
    import signal
    import sys
    from collections.abc import Iterator, Mapping
    from contextlib import contextmanager, suppress
    from pathlib import Path
    from typing import Any

    from prometheus_client import CollectorRegistry

    from caesura.bus.mqtt import MqttBus
    from caesura.bus.options import check_broker, options_from
    from caesura.bus.presence import last_will
    from caesura.bus.rates import Rates
    from caesura.contract.envelope import source_of
    from caesura.runtime.command import run_service
    from caesura.runtime.errors import CaesuraError, StoreError
    from caesura.runtime.health import serve_health
    from caesura.runtime.identity import new_id
    from caesura.runtime.listen import check_health_address
    from caesura.runtime.lock import StateFolderUnusable, private_dir, translate_os_errors
    from caesura.runtime.serve import serve
    from caesura.runtime.threads import in_thread
    from caesura_host_updater.drivers.plugin import DriverSetup, check_plans, load_plugin
    from caesura_host_updater.drivers.port import Driver
    from caesura_host_updater.guard_client import GuardClient
    from caesura_host_updater.inventory.host_config import HostFile, read_host_file, with_discovered
    from caesura_host_updater.journal import JournalThread
    from caesura_host_updater.metrics import HostMetrics
    from caesura_host_updater.operation.crash_recovery import resume_marked
    from caesura_host_updater.operation.runner import inherited_environment
    from caesura_host_updater.pause_markers import PauseMarkers
    from caesura_host_updater.service import HostUpdater, presence
    from caesura_host_updater.settings import HostUpdaterSettings
    from caesura_host_updater.subscriptions import filters
    from caesura_vmcontrol.notify import Notifier

_NO_WATCHDOG_S = 1.0  # s: between two looks whether there is something left to say to systemd
_OPEN_AGAIN_S = 1.0  # s: between two tries to open a journal that the disk refuses

_log = get_logger("caesura.host_updater")


class StateInUse(CaesuraError):
    """Another host updater runs on the same state folder."""


def main() -> int:
    """The console script."""
    return run_service(
        "host-updater",
        "Freezes this host's VMs for an update and resumes them within the budget, whatever happens.",
        HostUpdaterSettings,
        _main,
        checks=(lambda settings: read_host_file(settings.host_file), check_broker, check_health_address),
    )


async def _main(settings: HostUpdaterSettings) -> None:
    folder, wrong = Path(settings.state_dir), None
    try:
        folder = private_dir(settings.state_dir)
    except StateFolderUnusable as error:
        if not await in_thread("state folder", folder.is_dir):
            raise
        wrong = error
    with _only_one(folder):
        # Before anything that could wait or fail: VMs that a previous run left paused.
        pauses = PauseMarkers(folder)
        resumed = await resume_marked(pauses)
        if wrong is not None:
            raise wrong
        host, passed = await in_thread(
            "host file", lambda: with_discovered(read_host_file(settings.host_file))
        )
        for place, why in passed.items():
            _log.warning("discovery.passed_over", place=place, why=why)
        await _run(settings, host, folder, pauses, resumed)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep a second updater out: by the folder's own lock, which needs no room on the disk, and by a file for people."""
    with translate_os_errors(folder):
        handles = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        with translate_os_errors(folder), suppress(_NoRoom):
            handles.append(_open_lock(folder / "updater.lock"))
        try:
            for handle in handles:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateInUse(f"another host updater runs on {folder}") from None
        yield
    finally:
        for handle in handles:
            os.close(handle)


class _NoRoom(Exception):
    """The disk takes no new file."""


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise _NoRoom from error
        raise


async def _run(
    settings: HostUpdaterSettings,
    host: HostFile,
    folder: Path,
    pauses: PauseMarkers,
    resumed: Mapping[str, float],
) -> None:
    notifier = Notifier.taken_from(os.environ)
    beating = asyncio.create_task(_beat(notifier), name="watchdog")
    try:
        await _serve(settings, host, folder, pauses, resumed, notifier)
    finally:
        beating.cancel()


async def _beat(notifier: Notifier) -> None:
    """From the event loop itself: one that does not turn does not beat, and systemd starts us again."""
    while True:
        notifier.beat()
        await asyncio.sleep(notifier.interval_s or _NO_WATCHDOG_S)


async def _serve(
    settings: HostUpdaterSettings,
    host: HostFile,
    folder: Path,
    pauses: PauseMarkers,
    resumed: Mapping[str, float],
    notifier: Notifier,
) -> None:
    environ = inherited_environment(os.environ)
    instance = new_id()
    bus = MqttBus(
        options_from(settings, client_id=f"caesura-host-{host.host}"),
        filters=filters(host),
        rates=Rates(),
        will=last_will(
            presence(host.host, instance, online=False),
            source_of(settings.fleet, "host", host.host),
            host=host.host,
        ),
    )
    registry = CollectorRegistry()
    journal = JournalThread()
    guard = GuardClient(folder, spawn=settings.guard == "spawn")
    driver = await _driver(settings, host, folder, environ)
    updater = HostUpdater(
        settings,
        host,
        bus=bus,
        driver=driver,
        guard=guard,
        journal=journal,
        metrics=HostMetrics(registry),
        pauses=pauses,
        resumed=resumed,
        instance=instance,
        environ=environ,
    )
    updater.show_gauges()

    async def drain() -> None:
        notifier.stopping()
        await updater.drain()

    stopped = False
    try:
        await updater.resume_paused()
        check_plans(driver, [vm.name for vm in host.vm])
        await _open(journal, str(folder / "journal.sqlite"), settings.fleet)
        await updater.recover()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, updater.reread)
        async with serve_health(settings.health_listen, updater.pings(), registry, fleet=settings.fleet):
            notifier.ready()
            await serve(updater.tasks(), drain=drain, drain_timeout_s=settings.drain_timeout_s)
        stopped = True
    finally:
        await driver.close(stop_vms=settings.stop_vms_on_exit and stopped)
        await guard.close()
        await journal.close()


async def _open(journal: JournalThread, path: str, fleet: str) -> None:
    """Open the journal; on a disk that is full, when there is room again. Until then the host is not on the bus."""
    said = ""
    while True:
        try:
            await journal.open(path, fleet)
        except StoreError as error:
            if not error.temporary:
                raise
            if str(error) != said:
                said = str(error)
                _log.error("journal.not_open", why=said, hint="every VM runs; make room, it is tried again")
            await asyncio.sleep(_OPEN_AGAIN_S)
        else:
            return


async def _driver(
    settings: HostUpdaterSettings, host: HostFile, folder: Path, environ: dict[str, str]
) -> Driver:
    setup: DriverSetup[Any, Any] = DriverSetup(
        host=host.host,
        vms=host.vm,
        options=host.options,
        state_dir=folder,
        environ=environ,
        max_digest_bytes=settings.max_digest_bytes,
        kernel=host.kernel,
    )
    return await load_plugin(host.driver).build(setup)


if __name__ == "__main__":
    sys.exit(main())
