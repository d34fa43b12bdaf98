"""What is missing on a host whose VMs are domains of libvirt. Blocking."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
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
from caesura_vmcontrol.bounded_calls import CallTimeout, within
from caesura_vmcontrol.guard_socket import ask_guard
from caesura_vmcontrol.libvirt_control import libvirt_condition
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.resume_plans import plan_to_json

_RIGHTS = "put the user of host updater and guard into the group libvirt, or install deploy/polkit/50-caesura-libvirt.rules"

HANGS = "systemctl restart libvirtd (or virtqemud): its domains run on"
_GUARD_S = 2.0  # s: for its answer; it takes milliseconds
_ANSWER_S = 5.0  # s: for all that is asked of the daemon; it takes some 10 ms


def sockets_of(options: LibvirtOptions, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Where the daemon may listen, the likeliest first."""
    if options.socket:
        return (options.socket,)
    return usual_sockets(options.uri, environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")


def diagnose(options: LibvirtOptions, environ: Mapping[str, str], state_dir: Path) -> Iterator[Diagnosis]:
    """See the module. ``state_dir``: where the pause guard listens."""
    sockets = sockets_of(options, environ)
    socket = existing_socket(sockets)
    if not Path(socket).exists():
        yield wrong(
            "libvirt.daemon",
            f"no daemon of libvirt listens at {' or '.join(sockets)}",
            "systemctl start libvirtd (or virtqemud.socket); [libvirt] socket names another place",
        )
        return
    try:
        version, domains = within(_ANSWER_S, lambda: _ask(options, socket), key=f"libvirt at {socket}")
    except CallTimeout:
        yield wrong(
            "libvirt.daemon",
            f"the daemon at {socket} does not answer within {_ANSWER_S:g} s: it hangs",
            HANGS,
        )
        return
    except NoBinding as error:
        yield wrong("libvirt.binding", str(error), "apt-get install python3-libvirt")
        return
    except LibvirtError as error:
        yield wrong("libvirt.daemon", f"{socket}: {error}", _RIGHTS)
        return
    yield ok("libvirt.daemon", f"libvirt {version} at {socket}, {len(domains)} domains")
    vms, passed = vms_of(domains, options.domains)
    for domain, why in sorted(passed.items()):
        yield wrong("libvirt.name", f"domain {domain} cannot be a VM: {why}", "as the text says")
    found = {domain.uuid: domain for domain in domains}
    plans = {
        vm.name: plan
        for vm in vms
        if (number := found[vm.uuid].number) > 0
        and (plan := plan_of_domain(vm, number, socket, options.uri)) is not None
    }
    unusable = _unusable(plans.values(), state_dir)
    for vm in vms:
        yield from _of_domain(vm, found[vm.uuid], plans.get(vm.name), options, unusable.get(vm.name, []))


def _unusable(plans: Iterable[LibvirtPlan], state_dir: Path) -> dict[str, list[str]]:
    """What the guard may not use of what was found with our rights, which may be more; nothing where it cannot be asked."""
    request = {"do": "inspect", "plans": [plan_to_json(plan) for plan in plans]}
    try:
        answer = ask_guard(str(state_dir), request, _GUARD_S)
    except (OSError, ValueError):
        return {}  # that is said of the guard
    return dict(answer.get("unusable", {}))


def _ask(options: LibvirtOptions, socket: str) -> tuple[str, list[FoundDomain]]:
    connection = LibvirtConnection(options.uri, socket, options.binding, lambda: None)
    try:
        return connection.version(), connection.domains()
    finally:
        connection.close()


def _of_domain(
    vm: LibvirtVm, domain: FoundDomain, plan: LibvirtPlan | None, options: LibvirtOptions, unusable: list[str]
) -> Iterator[Diagnosis]:
    called = vm.name if vm.name == vm.domain_name else f"{vm.name} ({vm.domain_name})"
    if vm.label_error:
        yield wrong("libvirt.label", f"{called}: {vm.label_error}", "as the text says")
        return
    if not vm.set:
        yield warning(
            "libvirt.label",
            f"{called} is in no set: nothing keeps it and its peers from being paused at once",
            f"caesura libvirt label {shlex.quote(vm.domain_name)} --set SET --update-domain N",
        )
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
            "libvirt.domain",
            f"{called} is paused, and not by Caesura",
            f"virsh -c {options.uri} resume {shlex.quote(vm.domain_name)}",
        )
    ways = "libvirt" if not plan.qmp else f"libvirt, and {' and '.join(plan.qmp)} where that is away"
    if unusable:
        yield warning(
            "libvirt.ways",
            f"{called}: the pause guard may not use {' and '.join(unusable)}: a daemon that dies in a pause keeps it paused",
            "give host updater and pause guard the same rights: the drop-ins *-root.conf of deploy/systemd/libvirt, then restart both",
        )
    elif plan.qmp:
        yield ok("libvirt.ways", f"{called} is resumed by {ways}")
    else:
        yield warning(
            "libvirt.ways",
            f"{called} is resumed by libvirt alone: a daemon that dies or hangs in a pause keeps it paused",
            "install the drop-ins *-root.conf of deploy/systemd/libvirt, or give it a QMP socket of its own that host updater and guard may"
            " use: docs/drivers/libvirt.md",
        )
    if domain.agent_connected:
        yield ok("libvirt.agent", f"{called} has a guest agent")
    elif not vm.agent:
        yield warning(
            "libvirt.agent",
            f"{called} has no guest agent: its clock is corrected by its own time service, and there is no verdict",
            "install qemu-guest-agent in it, with the channel org.qemu.guest_agent.0",
        )
