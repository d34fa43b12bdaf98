"""What is missing on a host whose VMs are domains of libvirt. Blocking."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from caesura_host_updater.drivers.diagnosis import Diagnosis, ok, warning, wrong
from caesura_host_updater.drivers.libvirt.binding import NoBinding
from caesura_host_updater.drivers.libvirt.connection import LibvirtConnection, LibvirtError, existing_socket
from caesura_host_updater.drivers.libvirt.definition import (
    FoundDomain,
    LibvirtOptions,
    LibvirtVm,
    usual_sockets,
    vms_of,
)
from caesura_host_updater.drivers.libvirt.resume_paths import plan_of_domain
from caesura_vmcontrol.libvirt_control import libvirt_condition

_RIGHTS = "put the user of host updater and guard into the group libvirt, or install deploy/polkit/50-caesura-libvirt.rules"


def sockets_of(options: LibvirtOptions, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Where the daemon may listen, the likeliest first."""
    if options.socket:
        return (options.socket,)
    return usual_sockets(options.uri, environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")


def diagnose(options: LibvirtOptions, environ: Mapping[str, str]) -> Iterator[Diagnosis]:
    """See the module."""
    sockets = sockets_of(options, environ)
    socket = existing_socket(sockets)
    if not Path(socket).exists():
        yield wrong(
            "libvirt.daemon",
            f"no daemon of libvirt listens at {' or '.join(sockets)}",
            "systemctl start libvirtd (or virtqemud.socket); [libvirt] socket names another place",
        )
        return
    connection = LibvirtConnection(options.uri, socket, options.binding, lambda: None)
    try:
        version, domains = connection.version(), connection.domains()
    except NoBinding as error:
        yield wrong("libvirt.binding", str(error), "apt-get install python3-libvirt")
        return
    except LibvirtError as error:
        yield wrong("libvirt.daemon", f"{socket}: {error}", _RIGHTS)
        return
    finally:
        connection.close()
    yield ok("libvirt.daemon", f"libvirt {version} at {socket}, {len(domains)} domains")
    vms, passed = vms_of(domains, options.domains)
    for domain, why in sorted(passed.items()):
        yield wrong("libvirt.name", f"domain {domain} cannot be a VM: {why}", "as the text says")
    found = {domain.uuid: domain for domain in domains}
    for vm in vms:
        yield from _of_domain(vm, found[vm.uuid], socket, options)


def _of_domain(
    vm: LibvirtVm, domain: FoundDomain, socket: str, options: LibvirtOptions
) -> Iterator[Diagnosis]:
    called = vm.name if vm.name == vm.domain_name else f"{vm.name} ({vm.domain_name})"
    if vm.label_error:
        yield wrong("libvirt.label", f"{called}: {vm.label_error}", "as the text says")
        return
    if not vm.set:
        yield warning(
            "libvirt.label",
            f"{called} is in no set: nothing keeps it and its peers from being paused at once",
            f"caesura libvirt label '{vm.domain_name}' --set SET --update-domain N",
        )
    plan = plan_of_domain(vm, domain.number, socket, options.uri) if domain.number > 0 else None
    if plan is None:
        yield ok("libvirt.domain", f"{called} does not run")
        return
    try:
        state = libvirt_condition(plan)
    except OSError as error:
        yield wrong("libvirt.rights", f"{called}: the guard's way to libvirt does not work: {error}", _RIGHTS)
        return
    if state == "frozen":
        yield warning(
            "libvirt.domain", f"{called} is paused, and not by Caesura", f"virsh resume '{vm.domain_name}'"
        )
    ways = "libvirt" if not plan.qmp else f"libvirt, and {' and '.join(plan.qmp)} where that is away"
    if plan.qmp:
        yield ok("libvirt.ways", f"{called} is resumed by {ways}")
    else:
        yield warning(
            "libvirt.ways",
            f"{called} is resumed by libvirt alone: a daemon that dies or hangs in a pause keeps it paused",
            "run host updater and guard as root, or give it a QMP socket of its own: docs/drivers/libvirt.md",
        )
    if domain.agent_connected:
        yield ok("libvirt.agent", f"{called} has a guest agent")
    elif not vm.agent:
        yield warning(
            "libvirt.agent",
            f"{called} has no guest agent: its clock is corrected by its own time service, and there is no verdict",
            "install qemu-guest-agent in it, with the channel org.qemu.guest_agent.0",
        )
