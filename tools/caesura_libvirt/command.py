"""The command group ``caesura libvirt``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import click
import msgspec

from caesura.contract.names import InvalidName, check_name
from caesura.runtime.errors import CaesuraError
from caesura_ctl.errors import fail
from caesura_ctl.options import print_json
from caesura_host_updater.drivers.libvirt.connection import LibvirtConnection, LibvirtError, existing_socket
from caesura_host_updater.drivers.libvirt.definition import (
    BadLabel,
    FoundDomain,
    Label,
    LibvirtOptions,
    LibvirtVm,
    read_label,
    vms_of,
)
from caesura_host_updater.drivers.libvirt.diagnosis import HANGS, sockets_of
from caesura_vmcontrol.bounded_calls import CallTimeout, within

_ANSWER_S = 5.0  # s: for one question to the daemon; it takes some 10 ms

T = TypeVar("T")

_EXIT_CODES = """\b
exit codes:
  0  done
  1  not done; the text says what to do
  2  bad usage"""

_GROUP_EPILOG = f"""\b
examples:
  caesura libvirt list
  caesura libvirt label web-1 --set web --update-domain 0
  caesura libvirt label web-1 --remove

{_EXIT_CODES}"""

_LABEL_EPILOG = f"""\b
examples:
  caesura libvirt label web-1 --set web --update-domain 0
  caesura libvirt label web-1 --fault-domain 1
  caesura libvirt label "Web server (old)" --name web-old
  caesura libvirt label web-1 --remove

{_EXIT_CODES}"""

_LIST_EPILOG = f"""\b
examples:
  caesura libvirt list
  caesura libvirt list --json
  caesura libvirt list --uri qemu:///session

{_EXIT_CODES}"""


class LibvirtCommandError(CaesuraError):
    """libvirt could not do it, or the label is not one; the text says what to do."""


class _ShownDomain(msgspec.Struct, frozen=True, kw_only=True):
    """A domain in the output."""

    domain: str
    uuid: str
    running: bool
    vm: str = ""
    """Its name on the bus; empty: it cannot be a VM, see ``problem``."""
    set: str = ""
    update_domain: int | None = None
    fault_domain: int = 0
    agent: bool = False
    problem: str = ""


def _at(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--json",
            "as_json",
            is_flag=True,
            help="Print the result, and what goes wrong, as one JSON document.",
        ),
        click.option(
            "--binding",
            default="",
            metavar="FOLDER",
            help="The folder with libvirt's Python binding. Left out: what this Python has, else Debian's.",
        ),
        click.option(
            "--socket", default="", metavar="PATH", help="The daemon's socket. Left out: the usual one."
        ),
        click.option(
            "--uri", default="qemu:///system", show_default=True, help="Which libvirt of this host."
        ),
    ):
        command = option(command)
    return command


@click.group(epilog=_GROUP_EPILOG)
def libvirt() -> None:
    """Say what the domains of this host are to Caesura: their sets, update domains and names."""


@libvirt.command("label", epilog=_LABEL_EPILOG)
@click.argument("domain")
@click.option("--set", "set_name", metavar="SET", help="The availability set that it is in.")
@click.option("--update-domain", type=click.IntRange(0, 19), metavar="N", help="Its update domain, 0 to 19.")
@click.option("--fault-domain", type=click.IntRange(0, 2), metavar="N", help="Its fault domain, 0 to 2.")
@click.option(
    "--name", "vm_name", metavar="NAME", help="What Caesura calls it, where its own name cannot be one."
)
@click.option("--agent/--no-agent", default=None, help="Whether caesura-vm-agent runs in it.")
@click.option("--remove", is_flag=True, help="Remove the label.")
@_at
def label(
    *,
    domain: str,
    set_name: str | None,
    update_domain: int | None,
    fault_domain: int | None,
    vm_name: str | None,
    agent: bool | None,
    remove: bool,
    uri: str,
    socket: str,
    binding: str,
    as_json: bool,
) -> None:
    """Write what DOMAIN is into its metadata, live and for its next starts. What is not said stays as it is.

    The domain is not restarted, and nothing else of its definition is touched. A host updater notices it within a second.
    """
    said = (set_name, update_domain, fault_domain, vm_name, agent)
    if remove == any(each is not None for each in said):
        raise click.UsageError("say what it is (--set, --update-domain, …), or --remove")

    def work() -> int:
        connection = _connection(uri, socket, binding)
        found = next((each for each in _domains(connection) if each.name == domain), None)
        if found is None:
            raise LibvirtCommandError(f"there is no domain {domain!r}: see `virsh -c {uri} list --all`")
        wanted = None
        if not remove:
            wanted = _changed(found, set_name, update_domain, fault_domain, vm_name, agent)
        try:
            _answered(lambda: connection.set_label(domain, wanted), "label")
        except LibvirtError as error:
            raise LibvirtCommandError(f"{domain} is not labelled: {error}") from error
        made = next(each for each in _shown(_domains(connection)) if each.domain == domain)
        if as_json:
            print_json(made)
        else:
            click.echo(_line(made))
        return 0 if not made.problem else 1

    _guarded(work, as_json=as_json)


@libvirt.command("list", epilog=_LIST_EPILOG)
@_at
def list_domains(*, uri: str, socket: str, binding: str, as_json: bool) -> None:
    """The domains of this host, and what each is to Caesura."""

    def work() -> int:
        shown = _shown(_domains(_connection(uri, socket, binding)))
        if as_json:
            print_json(shown)
        else:
            for each in shown:
                click.echo(_line(each))
        return 1 if any(each.problem for each in shown) else 0

    _guarded(work, as_json=as_json)


def _guarded(work: Callable[[], int], *, as_json: bool) -> None:
    try:
        sys.exit(work())
    except KeyboardInterrupt:
        sys.exit(130)
    except CaesuraError as error:
        fail(error, as_json=as_json)


def _connection(uri: str, socket: str, binding: str) -> LibvirtConnection:
    options = LibvirtOptions(uri=uri, socket=socket)
    return LibvirtConnection(uri, existing_socket(sockets_of(options, os.environ)), binding, lambda: None)


def _domains(connection: LibvirtConnection) -> list[FoundDomain]:
    try:
        return _answered(connection.domains, "domains")
    except LibvirtError as error:
        raise LibvirtCommandError(
            f"{error}. Is libvirtd (or virtqemud) running, and may this user use it (group libvirt, or root)?"
        ) from error


def _answered(work: Callable[[], T], what: str) -> T:
    """What the daemon answers. Raises LibvirtCommandError: it hangs; LibvirtError, NoBinding."""
    try:
        return within(_ANSWER_S, work, key=what)
    except CallTimeout:
        raise LibvirtCommandError(
            f"libvirt's daemon does not answer within {_ANSWER_S:g} s: it hangs. {HANGS}"
        ) from None


def _changed(
    found: FoundDomain,
    set_name: str | None,
    update_domain: int | None,
    fault_domain: int | None,
    vm_name: str | None,
    agent: bool | None,
) -> Label:
    """The label that it has, with what was said. Raises LibvirtCommandError: that is none."""
    before = Label()
    if found.label:
        try:
            before = read_label(found.label)
        except BadLabel:
            before = Label()  # it is replaced by what was said
    said = {
        "set": set_name,
        "update_domain": update_domain,
        "fault_domain": fault_domain,
        "name": vm_name,
        "agent": agent,
    }
    changed = msgspec.structs.replace(
        before, **{key: value for key, value in said.items() if value is not None}
    )
    try:
        if vm_name:
            check_name("VM", vm_name)
        return read_label(changed.xml)
    except (BadLabel, InvalidName) as error:
        raise LibvirtCommandError(f"{found.name} is not labelled: {error}") from error


def _shown(domains: list[FoundDomain]) -> list[_ShownDomain]:
    vms, passed = vms_of(domains, "all")
    by_uuid = {vm.uuid: vm for vm in vms}
    return [
        _of(domain, by_uuid.get(domain.uuid), passed.get(domain.name, ""))
        for domain in sorted(domains, key=lambda each: each.name)
    ]


def _of(domain: FoundDomain, vm: LibvirtVm | None, passed: str) -> _ShownDomain:
    if vm is None:
        return _ShownDomain(domain=domain.name, uuid=domain.uuid, running=domain.number > 0, problem=passed)
    return _ShownDomain(
        domain=domain.name,
        uuid=domain.uuid,
        running=domain.number > 0,
        vm=vm.name,
        set=vm.set,
        update_domain=vm.update_domain,
        fault_domain=vm.fault_domain,
        agent=vm.agent,
        problem=vm.label_error,
    )


def _line(each: _ShownDomain) -> str:
    if each.problem:
        return f"{each.domain}: {each.problem}"
    called = "" if each.vm == each.domain else f" (called {each.vm})"
    place = f"set {each.set}, update domain {each.update_domain}" if each.set else "in no set"
    fault = f", fault domain {each.fault_domain}" if each.fault_domain else ""
    return f"{each.domain}{called}: {place}{fault}{', with an agent' if each.agent else ''}{'' if each.running else '; not running'}"
