"""The host file: which VMs this host has, in which sets and domains. Checked whole before anything starts.

What all drivers have in common is here; the table ``[<driver>]`` and a VM's own keys are each driver's (``drivers/plugin.py``).
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import FieldInfo, fields

from caesura.contract.messages import MOST_TARGETS
from caesura.contract.names import InvalidName, check_name
from caesura.runtime.errors import ConfigError
from caesura.runtime.validation_errors import describe_error
from caesura_host_updater.drivers.plugin import (
    GROUP,
    DriverPlugin,
    DriverUnusable,
    installed_drivers,
    load_plugin,
)
from caesura_host_updater.files import read_regular
from caesura_host_updater.inventory.kernel_options import KernelOptions, kernel_error
from caesura_host_updater.inventory.vm_details_table import details_error
from caesura_host_updater.inventory.vm_spec import VmSpec

AnyPlugin = DriverPlugin[Any, Any]


class HostFileError(ConfigError):
    """The host file cannot be used; the text names the file and the key."""


class HostFile(msgspec.Struct, frozen=True, kw_only=True):
    """A whole host file."""

    host: str
    driver: str = "process"
    vm: tuple[VmSpec, ...] = ()
    """Of the driver's ``vm_type``."""
    options: Any = None
    """The driver's table, of its ``options_type``; None where no driver is made from it."""
    kernel: KernelOptions = KernelOptions()


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """What must be known to read the rest."""

    driver: str = "process"


class _Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all host files have, without the tables of drivers and the VMs."""

    host: str
    driver: str = "process"
    kernel: KernelOptions = KernelOptions()


def parse_host_file(text: str, name: str) -> HostFile:
    """Read and check a host file; ``name`` stands in the errors.

    Raises:
        HostFileError: not TOML, a driver that cannot be used, an unknown or ill-typed key, a bad or repeated name, a set
            without a domain.
    """
    wanted: Any = _Head
    try:
        raw = tomllib.loads(text)
        plugin = _plugin(msgspec.convert(raw, _Head).driver)
        others = _others(raw, plugin)
        wanted = _file_type(plugin, others, raw)
        read = msgspec.convert(raw, wanted)
    except (tomllib.TOMLDecodeError, DriverUnusable) as error:
        raise HostFileError(f"{name}: {error}") from error
    except msgspec.ValidationError as error:
        raise HostFileError(f"{name}: {describe_error(error, wanted)}") from error
    table = {field.name: getattr(read, field.name) for field in fields(wanted)}
    file = HostFile(
        host=read.host, driver=plugin.name, vm=table["vm"], options=table[plugin.name], kernel=read.kernel
    )
    _check_names(file, name)
    if wrong := kernel_error(file.kernel) or plugin.kernel_error(file.kernel, file.options):
        raise HostFileError(f"{name}: {wrong}")
    for vm in file.vm:
        if vm.set and vm.update_domain is None:
            raise HostFileError(
                f"{name}: VM {vm.name!r} is in set {vm.set!r} but has no update_domain (0 to 19)"
            )
        if not vm.set and vm.update_domain is not None:
            raise HostFileError(f"{name}: VM {vm.name!r} has an update_domain but no set that it would be in")
        wrong = _foreign_keys(vm, plugin, others) or plugin.vm_error(vm, file.options)
        if wrong := wrong or (details_error(vm.details) if vm.details is not None else ""):
            raise HostFileError(f"{name}: VM {vm.name!r} {wrong}")
    return file


def _check_names(file: HostFile, name: str) -> None:
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


# -- drivers --------------------------------------------------------------------------------------------------


def _plugin(driver: str) -> AnyPlugin:
    names = installed_drivers()
    if driver in names:
        return load_plugin(driver)
    *others, last = map(repr, names or ("",))
    raise DriverUnusable(
        f"there is no driver {driver!r}: write {', '.join(others)}{' or ' if others else ''}{last} - at `$.driver` "
        f"(these are installed; a driver is an entry point of the group {GROUP})"
        if names
        else f"there is no driver {driver!r}, nor any other: install Caesura again"
    )


def _others(raw: Mapping[str, Any], plugin: AnyPlugin) -> list[AnyPlugin]:
    """Other drivers whose keys the file has, too: their tables are allowed, and what a VM has of theirs is named."""
    own = _own_keys(plugin)
    keys = (
        {key for vm in _tables(raw.get("vm")) for key in vm}
        - {each.name for each in fields(VmSpec)}
        - own.keys()
    )
    found = []
    for name in installed_drivers():
        if name == plugin.name or not (keys or name in raw):
            continue
        try:
            other = load_plugin(name)
        except DriverUnusable:
            if name in raw:
                raise
            continue
        if name in raw or keys & _own_keys(other).keys():
            found.append(other)
    return found


def _tables(value: Any) -> Iterator[Mapping[str, Any]]:
    """The tables of an array of tables; nothing if it is not one, which is an error elsewhere."""
    if isinstance(value, list):
        yield from (each for each in value if isinstance(each, dict))


def _own_keys(plugin: AnyPlugin) -> dict[str, FieldInfo]:
    """A driver's keys of a VM."""
    common = {each.name for each in fields(VmSpec)}
    return {each.name: each for each in fields(plugin.vm_type) if each.name not in common}


def _file_type(plugin: AnyPlugin, others: list[AnyPlugin], raw: Mapping[str, Any]) -> Any:
    """The struct that a host file of this driver is, with what it has of other drivers."""
    vm_type: Any = plugin.vm_type
    foreign = {
        key: field
        for other in others
        for key, field in _own_keys(other).items()
        if key not in _own_keys(plugin)
    }
    if foreign:
        vm_type = msgspec.defstruct(
            plugin.vm_type.__name__,
            [(key, field.type, _default(field)) for key, field in foreign.items()],
            bases=(plugin.vm_type,),
            frozen=True,
            kw_only=True,
            forbid_unknown_fields=True,
        )
    tables = [plugin, *(other for other in others if other.name in raw)]
    return msgspec.defstruct(
        "HostFile",
        [
            ("vm", tuple[vm_type, ...], ()),
            *((each.name, each.options_type, each.options_type()) for each in tables),
        ],
        bases=(_Common,),
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )


def _default(field: FieldInfo) -> Any:
    return (
        field.default
        if field.default is not msgspec.NODEFAULT
        else msgspec.field(default_factory=field.default_factory)
    )


def _foreign_keys(vm: VmSpec, plugin: AnyPlugin, others: list[AnyPlugin]) -> str:
    """That the VM has keys of another driver; empty: it has none."""
    own = _own_keys(plugin)
    for other in others:
        untouched = other.vm_type(name=vm.name)
        for key in _own_keys(other).keys() - own.keys():
            if getattr(vm, key) != getattr(untouched, key):
                return (
                    f'has a {other.takes}, but the host\'s driver is {plugin.name!r}: say driver = "{other.name}" '
                    f"(driver {plugin.name!r} takes {plugin.takes})"
                )
    return ""


def read_host_file(path: str) -> HostFile:
    """Read a host file from disk. Raises HostFileError."""
    try:
        text = read_regular(Path(path))
    except (OSError, ValueError) as error:
        raise HostFileError(f"{path}: cannot be read: {error}") from error
    return parse_host_file(text, path)


def with_discovered(host: HostFile) -> tuple[HostFile, Mapping[str, str]]:
    """The host file with the VMs that its driver finds and that are not named in it; and who was passed over, and why. Blocking.

    Raises:
        DriverUnusable: see ``load_plugin``.
    """
    found, passed = load_plugin(host.driver).discover(host.options, {vm.name for vm in host.vm})
    return msgspec.structs.replace(host, vm=host.vm + found), passed
