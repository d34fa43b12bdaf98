"""What an operator says about VMs in the host file, and what Proxmox's files say: configurations, tags, locks. Pure.

Source of the formats: Proxmox's qemu-server 9.2, ``parse_vm_config`` and ``instance_running_locally``; pve-common, ``split_list``.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from caesura.contract.names import InvalidName, check_name
from caesura_host_updater.inventory.vm_spec import VmSpec

_FILE = re.compile(r"([1-9][0-9]{0,8})\.conf\Z")
_SECTION = re.compile(r"\[[^\]]*\]\s*\Z")
_KEY = re.compile(r"([a-z][a-z_\-]*[0-9]*):\s*(.+?)\s*\Z")
_BETWEEN_TAGS = re.compile(r"[,;\s]+")
_TRUE = frozenset(("1", "on", "yes", "true"))

MARK = "caesura"
"""What each of our tags begins with. Alone it says nothing of a VM but that it is one for Caesura (``vms = "tagged"``)."""
_MOST = {"ud": 19, "fd": 2}
_KNOWN = "caesura-set-SET, caesura-ud-0 to caesura-ud-19, caesura-fd-0 to caesura-fd-2"

AbsolutePath = Annotated[str, Meta(pattern=r"^/.*\Z")]


class ProxmoxOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[proxmox]``."""

    config_dir: AbsolutePath = "/etc/pve/qemu-server"
    """Where Proxmox has the configurations of this node's VMs."""
    run_dir: AbsolutePath = "/var/run/qemu-server"
    """Where Proxmox has the sockets and the pid files of VMs that run."""
    vms: Literal["all", "tagged"] = "all"
    """Which are VMs for Caesura: all, or those with a tag that begins with ``caesura``."""
    prefix: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}\Z")] = "vm-"
    """Of a VM's name on the bus, before its id: two clusters may both have a VM 100."""

    def name_of(self, vmid: int) -> str:
        """Of a VM on the bus. It has the id: in Proxmox several VMs may have one name."""
        return f"{self.prefix}{vmid}"


class ProxmoxVm(VmSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM of a Proxmox node."""

    agent: bool = False
    """A VM has our agent only if it was put into it."""
    vmid: int = 0
    """Set for each that was found. Not for the host file."""
    title: str = ""
    """Its ``name`` in Proxmox, which several VMs may have."""
    tag_error: str = ""
    """What is wrong with its tags: it cannot be paused until that is mended."""
    read_error: str = ""
    """Why its configuration cannot be read now: what is known of it is older."""
    lock: str = ""
    """What Proxmox does with it, or did when it failed: it is not touched."""
    template: bool = False
    """A template never runs."""
    guest_agent: bool = False
    """Whether qemu-guest-agent is enabled in its configuration."""

    @property
    def called(self) -> str:
        """For people: ``VM 100 (web-1)``."""
        return f"VM {self.vmid} ({self.title})" if self.title else f"VM {self.vmid}"

    @property
    def not_now(self) -> str:
        """Why it may not be paused as its configuration is; empty: it may."""
        if self.read_error:
            return f"its configuration cannot be read, so it may be locked: {self.read_error}"
        if self.template:
            return "it is a template, which never runs"
        if self.lock:
            return lock_text(self.lock, self.vmid)
        return self.tag_error


class BadTags(ValueError):
    """Our tags contradict each other, or one is not known; the text says which."""


class Placement(msgspec.Struct, frozen=True):
    """What a VM's tags say of it."""

    set: str = ""
    update_domain: int | None = None
    fault_domain: int = 0


def lock_text(lock: str, vmid: int) -> str:
    """What a lock means for us."""
    return (
        f"Proxmox has locked it (lock: {lock}), so it is not paused until that has ended; a lock that was left behind is removed"
        f" with `qm unlock {vmid}`"
    )


def vmid_of(file: str) -> int | None:
    """Whose configuration a file is, by its name; None: nobody's."""
    match = _FILE.match(file)
    return int(match[1]) if match is not None else None


def main_section(text: str) -> dict[str, str]:
    """The keys of a configuration as they are in force: not those of snapshots and pending changes, which follow in sections."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if _SECTION.match(line):
            break
        match = _KEY.match(line)
        if match is not None:
            found[match[1]] = match[2]
    return found


def read_config(vmid: int, text: str, name: str) -> ProxmoxVm:
    """The VM that a configuration describes. ``name``: on the bus."""
    keys = main_section(text)
    placement, wrong = Placement(), ""
    try:
        placement = placement_of(tags_of(keys))
    except BadTags as error:
        wrong = f"its tags are wrong: {error}; mend them in Proxmox, or with `qm set {vmid} --tags`"
    return ProxmoxVm(
        name=name,
        set=placement.set,
        update_domain=placement.update_domain,
        fault_domain=placement.fault_domain,
        vmid=vmid,
        title=keys.get("name", ""),
        tag_error=wrong,
        lock=keys.get("lock", ""),
        template=keys.get("template", "") in _TRUE,
        guest_agent=_agent_enabled(keys.get("agent", "")),
    )


def tags_of(keys: Mapping[str, str]) -> tuple[str, ...]:
    """Every tag of a configuration."""
    return tuple(filter(None, _BETWEEN_TAGS.split(keys.get("tags", ""))))


def is_tagged(text: str) -> bool:
    """Whether a configuration has one of our tags, right or wrong."""
    return any(tag.lower().startswith(MARK) for tag in tags_of(main_section(text)))


def placement_of(tags: Iterable[str]) -> Placement:
    """What tags say.

    Raises:
        BadTags: one of our tags is not known, is there twice, or has no number or name; a set without an update domain.
    """
    found: dict[str, str] = {}
    for tag in dict.fromkeys(tags):
        if not tag.lower().startswith(MARK) or tag == MARK:
            continue
        start, _, rest = tag.partition("-")
        key, dash, value = rest.partition("-")
        if start != MARK or not dash or key not in ("set", *_MOST):
            raise BadTags(f"{tag} is not known; there are {_KNOWN}")
        if key in found:
            raise BadTags(f"there are two tags caesura-{key}-, {found[key]} and {value}")
        found[key] = value
    name = found.get("set", "")
    if "set" in found:
        try:
            check_name("set", name)
        except InvalidName as error:
            raise BadTags(str(error)) from error
    domain, fault = _number(found, "ud"), _number(found, "fd")
    if "set" in found and domain is None:
        raise BadTags(f"it is in set {name} and has no update domain (caesura-ud-0 to caesura-ud-19)")
    if "set" not in found and domain is not None:
        raise BadTags("it has an update domain and no set that it would be in (caesura-set-SET)")
    return Placement(name, domain, fault or 0)


def _number(found: Mapping[str, str], key: str) -> int | None:
    text = found.get(key)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or int(text) > _MOST[key]:
        raise BadTags(f"caesura-{key}-{text} does not end with a number from 0 to {_MOST[key]}")
    return int(text)


def _agent_enabled(value: str) -> bool:
    """``1``, ``enabled=1,fstrim_cloned_disks=1``: the first word may stand without its key."""
    for number, word in enumerate(value.split(",")):
        key, equals, setting = word.partition("=")
        if not equals and number == 0:
            return key.strip() in _TRUE
        if key.strip() == "enabled":
            return setting.strip() in _TRUE
    return False


def sockets_of(run_dir: str, vmid: int) -> tuple[str, str]:
    """Of a VM that runs: QMP, and qemu-guest-agent's."""
    return posixpath.join(run_dir, f"{vmid}.qmp"), posixpath.join(run_dir, f"{vmid}.qga")


def pid_file_of(run_dir: str, vmid: int) -> str:
    """Where Proxmox has the pid of a VM that runs."""
    return posixpath.join(run_dir, f"{vmid}.pid")


def started_with(arguments: Sequence[str], pid_file: str) -> bool:
    """Whether a process is the QEMU of a pid file: Proxmox's own rule, for a pid may have been given to another process since."""
    wanted = _in_run(pid_file)
    return any(option == "-pidfile" and _in_run(value) == wanted for option, value in pairwise(arguments))


def _in_run(path: str) -> str:
    """``/var/run`` is another name of ``/run``, and Proxmox means to use that one."""
    return path.removeprefix("/var")
