"""The host file: which VMs this host has, in which sets and domains. Checked whole before anything starts."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from caesura.contract.messages import MOST_TARGETS, FaultDomain, UpdateDomain
from caesura.contract.names import InvalidName, check_name, own_set
from caesura.runtime.errors import ConfigError
from caesura.runtime.validation_errors import describe_error
from caesura_host_updater.drivers.elsewhere import hands_over
from caesura_host_updater.drivers.qemu.definition import Adopt, Definition, QemuOptions, definition_error
from caesura_host_updater.files import read_regular


class HostFileError(ConfigError):
    """The host file cannot be used; the text names the file and the key."""


class GuestProcess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One process of a process VM, run as it stands: no shell, program found on PATH."""

    argv: Annotated[tuple[str, ...], Meta(min_length=1)]
    environ: dict[str, str] = {}


class VmSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One VM as the operator wrote it."""

    name: str
    set: str = ""
    """Empty: in no set; the VM is a set of its own."""
    update_domain: UpdateDomain | None = None
    fault_domain: FaultDomain = 0
    agent: bool = True
    """Whether an agent is expected to answer in it."""
    ram_bytes: Annotated[int, Meta(ge=0, le=2**40)] = 0
    """Size of the memory file that its processes map, named in CAESURA_VM_RAM; 0: none."""
    process: tuple[GuestProcess, ...] = ()
    qemu: Definition | None = None
    """Driver ``qemu``: a VM to start."""
    adopt: Adopt | None = None
    """Driver ``qemu``: a VM that somebody else starts; with neither it is looked for in ``[qemu] discover``."""

    @property
    def set_name(self) -> str:
        """The set, or the one that the VM is by itself."""
        return self.set or own_set(self.name)

    @property
    def domain(self) -> int:
        """The update domain; 0 for a VM in no set."""
        return self.update_domain or 0


class ProcessOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the process driver."""

    freezer: Literal["auto", "cgroup2", "cgroup1", "sigstop"] = "auto"


class HostFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole host file."""

    host: str
    driver: Literal["process", "qemu"] = "process"
    vm: tuple[VmSpec, ...] = ()
    process: ProcessOptions = ProcessOptions()
    qemu: QemuOptions = QemuOptions()


def parse_host_file(text: str, name: str) -> HostFile:
    """Read and check a host file; ``name`` stands in the errors.

    Raises:
        HostFileError: not TOML, an unknown or ill-typed key, a bad or repeated name, a set without a domain.
    """
    try:
        file = msgspec.convert(tomllib.loads(text), HostFile)
    except tomllib.TOMLDecodeError as error:
        raise HostFileError(f"{name}: {error}") from error
    except msgspec.ValidationError as error:
        raise HostFileError(f"{name}: {describe_error(error, HostFile)}") from error
    try:
        check_name("host", file.host)
        for vm in file.vm:
            check_name("VM", vm.name)
            if vm.set:
                check_name("set", vm.set)
    except InvalidName as error:
        raise HostFileError(f"{name}: {error}") from error
    if len(file.vm) > MOST_TARGETS:
        raise HostFileError(
            f"{name}: {len(file.vm)} VMs; one operation holds at most {MOST_TARGETS}, so a host cannot have more"
        )
    for vm_name, count in Counter(vm.name for vm in file.vm).items():
        if count > 1:
            raise HostFileError(f"{name}: VM {vm_name!r} stands {count} times in it; names are unique")
    for vm in file.vm:
        if vm.set and vm.update_domain is None:
            raise HostFileError(
                f"{name}: VM {vm.name!r} is in set {vm.set!r} but has no update_domain (0 to 19)"
            )
        if not vm.set and vm.update_domain is not None:
            raise HostFileError(f"{name}: VM {vm.name!r} has an update_domain but no set that it would be in")
        wrong = _process_error(vm) if file.driver == "process" else _qemu_error(vm, file.qemu)
        if wrong:
            raise HostFileError(f"{name}: VM {vm.name!r} {wrong}")
    return file


def _process_error(vm: VmSpec) -> str:
    if vm.qemu is not None or vm.adopt is not None:
        return "has a [vm.qemu] or [vm.adopt], but the host's driver is 'process': say driver = \"qemu\""
    if not vm.process:
        return "has no [[vm.process]]: give it at least one argv"
    if "" in (process.argv[0] for process in vm.process):
        return "has a process whose argv starts with an empty word"
    return next((why for process in vm.process if (why := hands_over(process.argv))), "")


def _qemu_error(vm: VmSpec, options: QemuOptions) -> str:
    if vm.process or vm.ram_bytes:
        return "has a [[vm.process]] or ram_bytes: driver 'qemu' takes [vm.qemu] or [vm.adopt]"
    if vm.qemu is not None and vm.adopt is not None:
        return "has both [vm.qemu] and [vm.adopt]: either we start it or somebody else does"
    if vm.qemu is not None:
        wrong = definition_error(vm.qemu)
        return f"[vm.qemu]: {wrong}" if wrong else ""
    if vm.adopt is None and not options.discover:
        return "has no [vm.qemu] and no [vm.adopt], and [qemu] discover names no folder to look for it"
    return ""


def read_host_file(path: str) -> HostFile:
    """Read a host file from disk. Raises HostFileError."""
    try:
        text = read_regular(Path(path))
    except (OSError, ValueError) as error:
        raise HostFileError(f"{path}: cannot be read: {error}") from error
    return parse_host_file(text, path)
