"""What is missing on a host whose VMs are containers. Blocking."""

from __future__ import annotations

from collections.abc import Iterator

from caesura_host_updater.drivers.container.cgroup import NoFreezer, read_freezer
from caesura_host_updater.drivers.container.definition import (
    NO_LIVE_RESTORE,
    ContainerOptions,
    ContainerVm,
    engine_facts,
    inspected,
)
from caesura_host_updater.drivers.diagnosis import Diagnosis, ok, warning, wrong
from caesura_vmcontrol import container_engine
from caesura_vmcontrol.container_engine import EngineRefused

_ASK_S = 3.0


def diagnose(vms: tuple[ContainerVm, ...], options: ContainerOptions) -> Iterator[Diagnosis]:
    """See the module."""
    try:
        version = container_engine.call(options.socket, "GET", "/version", _ASK_S)
        facts = engine_facts(version, container_engine.call(options.socket, "GET", "/info", _ASK_S))
    except OSError as error:
        yield wrong(
            "container.engine",
            str(error),
            "start the engine; put the host updater's user into its group; [container] socket names another place",
        )
        return
    yield ok("container.engine", f"{facts.name} {facts.version} at {options.socket}")
    if not facts.survives:
        yield warning(
            "container.live_restore", NO_LIVE_RESTORE, "live-restore in daemon.json, then reload the engine"
        )
    for vm in vms:
        yield from _of_container(vm, options)


def _of_container(vm: ContainerVm, options: ContainerOptions) -> Iterator[Diagnosis]:
    try:
        found = inspected(
            container_engine.call(options.socket, "GET", f"/containers/{vm.container_name}/json", _ASK_S)
        )
        if not found.running:
            yield ok("container", f"{vm.name}: container {vm.container_name} does not run")
            return
        kind, _ = read_freezer(found.pid)
    except EngineRefused as error:
        yield wrong("container", f"{vm.name}: {error.why}", "mend [vm.container] name, or create it")
    except (OSError, ValueError, NoFreezer) as error:
        yield wrong(
            "container.freezer",
            f"{vm.name}: {error}",
            "run the host updater where the containers' cgroups can be seen",
        )
    else:
        yield ok("container", f"{vm.name}: container {vm.container_name}, frozen by {kind}")
