"""What is wrong or missing on this host itself: files, guard, services, driver. Blocking."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from caesura.bus.options import parse_addresses
from caesura.runtime.errors import ConfigError
from caesura_doctor.service_probes import ask_ready
from caesura_host_updater.clocks.reference_clock import is_synchronized
from caesura_host_updater.drivers.diagnosis import Diagnosis, ok, warning, wrong
from caesura_host_updater.drivers.plugin import DriverSetup, load_plugin
from caesura_host_updater.inventory.host_config import (
    HostFile,
    HostFileError,
    read_host_file,
    with_discovered,
)
from caesura_host_updater.settings import HostUpdaterSettings
from caesura_vmcontrol.guard_socket import ask_guard
from caesura_vmcontrol.mounts import mount_of, read_mounts

_ANSWER_S = 3.0
_ROOM_BYTES = 64 << 20
_VOLATILE = ("tmpfs", "ramfs")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def host_file(settings: HostUpdaterSettings) -> tuple[HostFile | None, list[Diagnosis]]:
    """The host file with the VMs that its driver finds; None: it cannot be used."""
    try:
        host, passed = with_discovered(read_host_file(settings.host_file))
    except (HostFileError, ConfigError) as error:
        return None, [wrong("host_file", str(error), f"mend {settings.host_file}")]
    findings = [ok("host_file", f"{settings.host_file}: host {host.host}, driver {host.driver}")]
    findings += [
        wrong("host_file.discovery", f"{place} is not a VM: {why}", "as the text says")
        for place, why in passed.items()
    ]
    return host, findings


def check_host(
    settings: HostUpdaterSettings, host: HostFile, environ: Mapping[str, str]
) -> Iterator[Diagnosis]:
    """Everything but the broker."""
    yield from _state_folder(Path(settings.state_dir))
    yield from _updates(Path(settings.updates_dir))
    yield from _guard(settings)
    yield from _updater(settings)
    yield from _time()
    brokers = {each.host for each in parse_addresses(settings.broker_url)}
    if brokers <= set(_LOOPBACK) and host.kernel.kexec:
        yield wrong(
            "kernel.broker",
            "the broker is on this host, whose kernel may be changed under its VMs",
            "use a broker on another host, or [kernel] kexec = false",
        )
    yield from _driver(settings, host, environ)


def _state_folder(folder: Path) -> Iterator[Diagnosis]:
    try:
        found = folder.stat()
    except OSError as error:
        yield wrong(
            "state_dir", f"{folder}: {error.strerror}", "the unit makes it (StateDirectory=), or mkdir -m 700"
        )
        return
    if stat.S_IMODE(found.st_mode) & 0o077:
        yield wrong("state_dir", f"{folder} can be used by others", f"chmod 700 {folder}")
        return
    free = shutil.disk_usage(folder).free
    if free < _ROOM_BYTES:
        yield warning(
            "state_dir", f"{folder}: {free >> 20} MiB are free", "make room: no pause begins on a full disk"
        )
    else:
        yield ok("state_dir", f"{folder}: {free >> 20} MiB are free")
    if _kind(folder) in _VOLATILE:
        yield warning(
            "state_dir.volatile",
            f"{folder} is in memory",
            "put it on a disk: facts that wait for the broker are lost in a reboot",
        )


def _kind(folder: Path) -> str:
    try:
        found = mount_of(read_mounts(), str(folder.resolve()))
    except OSError:
        return ""
    return found.kind if found is not None else ""


def _updates(folder: Path) -> Iterator[Diagnosis]:
    try:
        count = sum(each.suffix == ".toml" for each in folder.iterdir())
    except OSError as error:
        yield warning(
            "updates_dir", f"{folder}: {error.strerror}", "mkdir it, and put a file for each update there"
        )
        return
    if count:
        yield ok("updates_dir", f"{folder}: {count} updates")
    else:
        yield warning(
            "updates_dir",
            f"{folder} has no updates",
            "put a file for each update there; `caesura freeze` needs none",
        )


def _guard(settings: HostUpdaterSettings) -> Iterator[Diagnosis]:
    remedy = (
        "systemctl start caesura-pause-guard"
        if settings.guard == "external"
        else "start the host updater, which starts it"
    )
    try:
        answer = ask_guard(settings.state_dir, {"do": "status"}, _ANSWER_S)
    except PermissionError:
        yield warning(
            "guard",
            "the pause guard may not be asked by this user",
            "run this as root, or as the host updater's user",
        )
        return
    except (OSError, ValueError) as error:
        yield wrong("guard", f"there is no pause guard, so nothing is frozen: {error}", remedy)
        return
    intent = answer.get("intent")
    busy = f", with operation {intent['operation']}" if isinstance(intent, dict) else ""
    yield ok("guard", f"the pause guard (pid {answer.get('pid')}) is {answer.get('state')}{busy}")


def _updater(settings: HostUpdaterSettings) -> Iterator[Diagnosis]:
    if not settings.health_listen:
        yield warning(
            "updater", "the host updater has no health listener", "set CAESURA_HOST_UPDATER_HEALTH_LISTEN"
        )
        return
    try:
        troubles = ask_ready(settings.health_listen, _ANSWER_S)
    except OSError as error:
        yield warning(
            "updater",
            f"the host updater does not answer at {settings.health_listen}: {error}",
            "systemctl start caesura-host-updater",
        )
        return
    if not troubles:
        yield ok("updater", "the host updater runs, and is ready")
    for name, why in troubles.items():
        yield wrong(f"updater.{name}", why, "as the text says; journalctl -u caesura-host-updater")


def _time() -> Iterator[Diagnosis]:
    if is_synchronized():
        yield ok("clock", "the kernel says that this host's clock is synchronised")
    else:
        yield warning(
            "clock",
            "nothing synchronises this host's clock: guests are set by it",
            "run chrony, ntpd or systemd-timesyncd",
        )


def _driver(settings: HostUpdaterSettings, host: HostFile, environ: Mapping[str, str]) -> Iterator[Diagnosis]:
    setup: DriverSetup[Any, Any] = DriverSetup(
        host=host.host,
        vms=host.vm,
        options=host.options,
        state_dir=Path(settings.state_dir),
        environ=environ,
        max_digest_bytes=settings.max_digest_bytes,
        kernel=host.kernel,
    )
    yield from load_plugin(host.driver).diagnose(setup)
