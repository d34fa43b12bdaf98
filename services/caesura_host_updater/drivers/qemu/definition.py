"""What an operator says about QEMU and its VMs in the host file. Pure: structs and their checks."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from caesura_host_updater.inventory.vm_spec import VmSpec

_MAC = r"^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$"
_BRIDGE = r"^[A-Za-z0-9_.-]{1,15}$"  # an interface name has at most 15 characters (IFNAMSIZ - 1)
_VERSION = re.compile(
    r"-\d+\.\d+(\.\d+)*$"
    # Distributions name theirs: pc-q35-jammy, pc-i440fx-focal-hpb, pc-q35-rhel9.2.0. A bare family is the alias.
    r"|^(pc-q35|pc-i440fx|virt|pseries|s390-ccw-virtio)-[a-z0-9][a-z0-9._+-]*$"
)

OptionalPath = Annotated[str, Meta(pattern=r"^(/.*)?$")]
"""Absolute, or empty: not given."""


class QemuOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[qemu]``: what holds for all VMs of the host."""

    binary: str = "qemu-system-x86_64"
    """The VMM that starts VMs and takes them over; a name is looked for on PATH."""
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    run_dir: OptionalPath = ""
    """Sockets live below; short, for a socket's path has at most 107 bytes. Empty: a folder of our own in /run."""
    ram_dir: OptionalPath = "/dev/shm"  # noqa: S108 - tmpfs is what guest RAM shall live in
    """A tmpfs; guests' RAM files live in a folder of our own below it."""
    discover: OptionalPath = ""
    """A folder with one folder per VM, named like it, with its sockets: ``qmp``, ``guard`` and ``ga``."""
    reserve_memory: bool = True
    """Take a guest's whole RAM from the tmpfs at its start: a full one is an error then and not a crash later."""
    powerdown_s: Annotated[float, Meta(ge=0, le=600)] = 10.0
    """How long a guest may take to shut itself down when its VM is stopped, before its QEMU is ended."""
    start_timeout_s: Annotated[float, Meta(gt=0, le=600)] = 15.0
    """How long a QEMU may take from its start until it answers."""


class Disk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A virtio disk."""

    file: Annotated[str, Meta(pattern=r"^/")]
    format: Literal["qcow2", "raw"] = "qcow2"


class Nic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A virtio network card: on QEMU's own user network, or on a bridge through a tap of each process's own."""

    bridge: Annotated[str, Meta(pattern=_BRIDGE)] | None = None
    mac: Annotated[str, Meta(pattern=_MAC)] | None = None
    """None: made from the VM's name."""


class Definition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[vm.qemu]``: a VM that the host updater starts and supervises."""

    memory_mib: Annotated[int, Meta(ge=16, le=2**24)]
    machine: str
    """Versioned, such as ``pc-q35-7.2``: what another QEMU version promises to be as well."""
    vcpus: Annotated[int, Meta(ge=1, le=1024)] = 1
    cpu: Annotated[str, Meta(min_length=1)] = "qemu64"
    """A named model: ``host`` and ``max`` are what the processor or the version at hand makes of them."""
    kernel: OptionalPath = ""
    initrd: OptionalPath = ""
    append: str = ""
    disk: tuple[Disk, ...] = ()
    nic: tuple[Nic, ...] = ()
    extra: tuple[str, ...] = ()
    """More words for the command line, the same for every process of the VM."""


class Adopt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[vm.adopt]``: a VM that somebody else starts."""

    qmp: Annotated[str, Meta(pattern=r"^/")]
    """A QMP socket that is ours alone."""
    guard_qmp: OptionalPath = ""
    """A second one, for the pause guard: without it nothing that pauses is possible."""
    guest_agent: OptionalPath = ""
    """The host's side of ``org.qemu.guest_agent.0``."""


class QemuVm(VmSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM of the QEMU driver."""

    qemu: Definition | None = None
    """A VM to start."""
    adopt: Adopt | None = None
    """A VM that somebody else starts; with neither it is looked for in ``[qemu] discover``."""


def vm_error(vm: QemuVm, options: QemuOptions) -> str:
    """What is wrong with a VM beyond its types: names the key. Empty: nothing."""
    if vm.qemu is not None and vm.adopt is not None:
        return "has both [vm.qemu] and [vm.adopt]: either we start it or somebody else does"
    if vm.qemu is not None:
        wrong = definition_error(vm.qemu)
        return f"[vm.qemu]: {wrong}" if wrong else ""
    if vm.adopt is None and not options.discover:
        return "has no [vm.qemu] and no [vm.adopt], and [qemu] discover names no folder to look for it"
    return ""


def is_versioned(machine: str) -> bool:
    """Whether a machine type is one that stays the same from version to version of QEMU."""
    return _VERSION.search(machine.split(",", 1)[0]) is not None


def definition_error(definition: Definition) -> str:
    """What is wrong with a definition beyond its types: names the key. Empty: nothing."""
    machine = definition.machine.split(",", 1)[0]
    if not is_versioned(machine):
        return f"machine {machine!r} has no version: give one such as 'pc-q35-7.2' (`qemu -machine help` lists them)"
    if "memory-backend=" in definition.machine:
        return "machine names a memory-backend: the guest's RAM file is made here"
    if definition.cpu.split(",", 1)[0] in ("host", "max"):
        return f"cpu {definition.cpu!r} is another one on another version or processor: name a model, such as 'qemu64'"
    if (definition.initrd or definition.append) and not definition.kernel:
        return "initrd and append need a kernel"
    for words in definition.extra:
        if words in (
            "-incoming",
            "-S",
            "-daemonize",
            "-pidfile",
            "-m",
            "-machine",
            "-M",
            "-accel",
            "-snapshot",
        ):
            return f"extra holds {words}: that is set here"
    return ""
