"""What an operator says about domains in the host file and in their metadata, and which VMs they are. Pure."""

from __future__ import annotations

import posixpath
import re
import shlex
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from caesura.contract.names import InvalidName, check_name
from caesura_host_updater.inventory.vm_spec import VmSpec

NAMESPACE = "urn:caesura:libvirt"
"""Of our element in a domain's ``<metadata>``."""
PREFIX = "caesura"
_LABEL_KEYS = ("set", "update-domain", "fault-domain", "name", "agent")
_UNUSABLE = re.compile(r"[^A-Za-z0-9_-]")
_QMP_SOCKET = re.compile(r"unix:(/[^,]+)(,|\Z)")
_MOST_DOMAINS = 19

AbsolutePath = Annotated[str, Meta(pattern=r"^(/.*)?\Z")]


class LibvirtOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[libvirt]``."""

    uri: Annotated[str, Meta(pattern=r"^[a-z]+:///[a-z]+\Z")] = "qemu:///system"
    """Of libvirt on this host: ``qemu:///system`` or ``qemu:///session``."""
    socket: AbsolutePath = ""
    """The daemon's socket; empty: the usual one of the URI, of the modular daemon (virtqemud) where there is one."""
    domains: Literal["all", "labelled"] = "all"
    """Which domains are VMs: all, or those with a label (``caesura libvirt label``)."""
    binding: AbsolutePath = ""
    """The folder with libvirt's Python binding (``libvirt.py``); empty: what this Python has, else Debian's python3-libvirt."""


class LibvirtVm(VmSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM that is a domain."""

    agent: bool = False
    """A domain has our agent only if it was put into it; its label says so."""
    uuid: str = ""
    """Set for each that was found. Not for the host file."""
    domain_name: str = ""
    """What libvirt calls it."""
    label_error: str = ""
    """What is wrong with its label: it is a VM by itself, and cannot be paused until that is mended."""


class BadLabel(ValueError):
    """A label that is not one; the text says what is wrong with it."""


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """What a domain's metadata says of it: ``<vm xmlns="urn:caesura:libvirt" set="web" update-domain="0"/>``."""

    set: str = ""
    update_domain: int | None = None
    fault_domain: int = 0
    name: str = ""
    """The VM's name on the bus; empty: the domain's."""
    agent: bool = False

    @property
    def xml(self) -> str:
        """The element, as libvirt takes it (``virDomainSetMetadata``)."""
        attributes = {
            "set": self.set,
            "update-domain": "" if self.update_domain is None else str(self.update_domain),
            "fault-domain": str(self.fault_domain) if self.fault_domain else "",
            "name": self.name,
            "agent": "yes" if self.agent else "",
        }
        element = ET.Element("vm", {key: value for key, value in attributes.items() if value})
        return ET.tostring(element, encoding="unicode")


def read_label(text: str) -> Label:
    """Read the element.

    Raises:
        BadLabel: another element, something in it, an unknown attribute, a name or number that is not one, a set without a domain.
    """
    try:
        element = ET.fromstring(text)  # noqa: S314 - one element, which libvirt has parsed already
    except ET.ParseError as error:
        raise BadLabel(f"it is not XML: {error}") from error
    if element.tag not in ("vm", f"{{{NAMESPACE}}}vm"):
        raise BadLabel(f"it is an element {element.tag.removeprefix(f'{{{NAMESPACE}}}')}, not vm")
    if inside := [child.tag.removeprefix(f"{{{NAMESPACE}}}") for child in element]:
        raise BadLabel(f"it has elements in it: {', '.join(inside)}; what it says is in attributes")
    if element.text and element.text.strip():
        raise BadLabel(f"it has text in it: {element.text.strip()!r}; what it says is in attributes")
    found = dict(element.attrib)
    if unknown := sorted(set(found) - set(_LABEL_KEYS)):
        raise BadLabel(f"it has {', '.join(unknown)}; known are {', '.join(_LABEL_KEYS)}")
    domain = _number(found, "update-domain", _MOST_DOMAINS)
    label = Label(
        set=found.get("set", ""),
        update_domain=domain,
        fault_domain=_number(found, "fault-domain", 2) or 0,
        name=found.get("name", ""),
        agent=_yes_or_no(found.get("agent", "no")),
    )
    if label_error := _error_of(label):
        raise BadLabel(label_error)
    return label


def _error_of(label: Label) -> str:
    try:
        if label.set:
            check_name("set", label.set)
        if label.name:
            check_name("VM", label.name)
    except InvalidName as error:
        return str(error)
    if label.set and label.update_domain is None:
        return f"it is in set {label.set!r} and has no update-domain (0 to {_MOST_DOMAINS})"
    if not label.set and label.update_domain is not None:
        return "it has an update-domain and no set that it would be in"
    return ""


def _number(found: Mapping[str, str], key: str, most: int) -> int | None:
    text = found.get(key)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or int(text) > most:
        raise BadLabel(f"{key} is {text!r}, not a number from 0 to {most}")
    return int(text)


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise BadLabel(f"agent is {text!r}, not yes or no")
    return text == "yes"


class FoundDomain(msgspec.Struct, frozen=True, kw_only=True):
    """A domain as libvirt has it.

    Args:
        number: its id while it runs; -1: it does not.
        label: our element in its metadata; empty: it has none.
        agent_connected: whether a guest agent has opened its port in the guest.
        persistent: whether it stays defined when it ends.
        migrated: whether it is only its definition: the domain was migrated to another host.
    """

    name: str
    uuid: str
    number: int = -1
    label: str = ""
    agent_connected: bool = False
    persistent: bool = True
    migrated: bool = False


def vms_of(
    domains: Iterable[FoundDomain], which: Literal["all", "labelled"]
) -> tuple[tuple[LibvirtVm, ...], dict[str, str]]:
    """The VMs by name, and the domains that cannot be VMs: their names to the reasons, with the remedy.

    A name that is one on the bus wins over one that becomes the same by escaping; of several that become the same none wins.
    """
    named: list[tuple[bool, LibvirtVm]] = []
    passed: dict[str, str] = {}
    for domain in domains:
        if domain.migrated or (which == "labelled" and not domain.label):
            continue
        vm = _vm_of(domain)
        try:
            check_name("VM", vm.name)
        except InvalidName as error:
            passed[domain.name] = f"{error}; {_remedy(domain.name)}"
        else:
            named.append((vm.name == domain.name, vm))
    exact = {vm.name for is_exact, vm in named if is_exact}
    counts = Counter(vm.name for is_exact, vm in named if not is_exact)
    usable = []
    for is_exact, vm in named:
        if not is_exact and (vm.name in exact or counts[vm.name] > 1):
            passed[vm.domain_name] = (
                f"another domain is called {vm.name} here, too; {_remedy(vm.domain_name)}"
            )
        else:
            usable.append(vm)
    return tuple(sorted(usable, key=lambda vm: vm.name)), passed


def _vm_of(domain: FoundDomain) -> LibvirtVm:
    label, wrong = Label(), ""
    if domain.label:
        try:
            label = read_label(domain.label)
        except BadLabel as error:
            wrong = f"its label is wrong: {error}; mend it by `caesura libvirt label {shlex.quote(domain.name)} …`"
    return LibvirtVm(
        name=label.name or escaped(domain.name),
        set=label.set,
        update_domain=label.update_domain,
        fault_domain=label.fault_domain,
        agent=label.agent,
        uuid=domain.uuid,
        domain_name=domain.name,
        label_error=wrong,
    )


def _remedy(domain: str) -> str:
    return f"give it a name of its own: `caesura libvirt label {shlex.quote(domain)} --name NAME`"


def escaped(name: str) -> str:
    """A domain's name as one level of a topic: what cannot be in one becomes ``-``."""
    return _UNUSABLE.sub("-", name).lstrip("_")


def qmp_sockets(arguments: Iterable[str]) -> list[str]:
    """The QMP sockets of its own that a QEMU was started with (``-qmp unix:PATH,server=on,wait=off``)."""
    words = list(arguments)
    found = []
    for option, value in pairwise(words):
        match = _QMP_SOCKET.match(value) if option in ("-qmp", "-qmp-pretty") else None
        if match is not None and "server" in value:
            found.append(match[1])
    return found


def usual_sockets(uri: str, runtime_dir: str) -> tuple[str, ...]:
    """Where the daemons of a URI listen, the modular one first.

    Args:
        runtime_dir: ``XDG_RUNTIME_DIR`` of the user, for a session.

    Source: libvirt's docs/daemons.rst.
    """
    driver, _, mode = uri.partition(":///")
    base = "/run/libvirt" if mode == "system" else posixpath.join(runtime_dir, "libvirt")
    return f"{base}/virt{driver}d-sock", f"{base}/libvirt-sock"


def pid_files(socket: str, domain: str) -> tuple[str, ...]:
    """Where libvirt may have written the pid of a domain's QEMU: beside its socket, of the system and of a session."""
    base = posixpath.dirname(socket)
    return f"{base}/qemu/{domain}.pid", f"{base}/qemu/run/{domain}.pid"
