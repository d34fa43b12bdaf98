"""How a driver is found, reads its part of the host file, and is made.

A driver is an entry point of the group ``caesura.drivers``: its name is what the host file calls it, and it names a subclass of
``DriverPlugin``. What of the driver needs I/O libraries is imported in ``build``, so that a check of a host file needs none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
from msgspec.structs import fields

from caesura.contract.names import InvalidName, check_name
from caesura.runtime.errors import ConfigError
from caesura_host_updater.drivers.diagnosis import Diagnosis
from caesura_host_updater.drivers.port import KNOWN, Driver, DriverError, UnknownPlan, guard_plan
from caesura_host_updater.inventory.kernel_options import KernelOptions
from caesura_host_updater.inventory.vm_spec import VmSpec
from caesura_vmcontrol.resume_plans import MECHANISMS, Mechanism

GROUP = "caesura.drivers"

_COMMON_KEYS = ("host", "driver", "kernel", "vm")
"""The keys of a host file that are not a driver's table."""

V = TypeVar("V", bound=VmSpec)
O = TypeVar("O", bound=msgspec.Struct)  # noqa: E741 - a type variable


class DriverUnusable(ConfigError):
    """The driver that the host file names is not installed, cannot be loaded, or needs what the pause guard cannot do."""


@dataclass(frozen=True, kw_only=True)
class DriverSetup(Generic[V, O]):
    """What a driver is made of.

    Args:
        host: the host's name.
        vms: the VMs of the host file, and those that ``discover`` found.
        options: the driver's table of the host file.
        state_dir: the state folder; it exists.
        environ: what processes inherit that the driver starts.
        max_digest_bytes: memory above this is not digested whole.
        kernel: the host file's table ``[kernel]``.
    """

    host: str
    vms: tuple[V, ...]
    options: O
    state_dir: Path
    environ: Mapping[str, str]
    max_digest_bytes: int
    kernel: KernelOptions = field(default_factory=KernelOptions)


class DriverPlugin(ABC, Generic[V, O]):
    """A kind of driver; made without arguments. A subclass sets the attributes."""

    name: str
    """As in the host file: ``driver = "<name>"`` and the table ``[<name>]``."""
    takes: str
    """What a VM of it has in the host file, for people: ``[[vm.process]]``."""
    vm_type: type[V]
    """The keys of a VM: the common ones and the driver's own, which have defaults."""
    options_type: type[O]
    """The keys of the table ``[<name>]``; all have defaults."""
    mechanisms: frozenset[Mechanism]
    """How the pause guard resumes its VMs alone: what ``Driver.resume_plan`` may give."""

    @abstractmethod
    def vm_error(self, vm: V, options: O) -> str:
        """What is wrong with a VM beyond its types, behind its name: ``has no [[vm.process]]``. Empty: nothing."""

    def kernel_error(self, kernel: KernelOptions, options: O) -> str:  # noqa: ARG002 - for subclasses
        """Why the host file may not have this table ``[kernel]`` with this driver; empty: it may."""
        return (
            f'[kernel]: kexec = true needs driver = "qemu": {self.name!r} keeps no VM over a change of the kernel'
            if kernel.kexec
            else ""
        )

    def discover(self, options: O, known: Collection[str]) -> tuple[tuple[V, ...], Mapping[str, str]]:  # noqa: ARG002 - for subclasses
        """VMs that run here and that the host file does not name, and where one was passed over: place to reason. Blocking.

        ``known``: the names of the VMs that it does name.
        """
        return (), {}

    def diagnose(self, setup: DriverSetup[V, O]) -> Iterable[Diagnosis]:  # noqa: ARG002 - for subclasses
        """What is wrong or missing on this host, each with its remedy; also what is well. Blocking; changes nothing."""
        return ()

    @abstractmethod
    async def build(self, setup: DriverSetup[V, O]) -> Driver:
        """The driver, not open yet."""


def installed_drivers() -> tuple[str, ...]:
    """The names of the drivers that are installed, sorted; whether each can be loaded is not known."""
    return tuple(sorted(entry_points(group=GROUP).names))


def load_plugin(name: str) -> DriverPlugin[Any, Any]:
    """The driver of that name.

    Raises:
        DriverUnusable: it is not installed, is installed by two packages, cannot be loaded, or is not a usable driver.
    """
    # One that is found twice on the path is still one.
    points = list({point.value: point for point in entry_points(group=GROUP, name=name)}.values())
    if not points:
        raise DriverUnusable(f"the driver {name!r} is not installed; {_there()}")
    if len(points) > 1:
        packages = " and ".join(sorted(map(_package, points)))
        raise DriverUnusable(f"the driver {name!r} is installed by {packages}: remove all but one")
    (point,) = points
    try:
        plugin_type = point.load()
    except Exception as error:
        raise DriverUnusable(
            f"the driver {name!r} of {_package(point)} cannot be loaded: {type(error).__name__}: {error}. "
            f"Install {_package(point)} again, or remove it; {_there()}"
        ) from error
    if not (isinstance(plugin_type, type) and issubclass(plugin_type, DriverPlugin)):
        raise DriverUnusable(f"the driver {name!r} of {_package(point)} is {point.value}: not a DriverPlugin")
    try:
        plugin: DriverPlugin[Any, Any] = plugin_type()
        wrong = _plugin_error(plugin, name)
    except (TypeError, AttributeError) as error:  # abstract, or an attribute is missing
        wrong = str(error)
    if wrong:
        raise DriverUnusable(f"the driver {name!r} of {_package(point)} cannot be used: {wrong}")
    return plugin


def _there() -> str:
    names = " and ".join(map(repr, installed_drivers())) or "none"
    return f"installed: {names}"


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _plugin_error(plugin: DriverPlugin[Any, Any], name: str) -> str:
    """What is wrong with a plug-in, for people; empty: nothing."""
    if plugin.name != name:
        return f"it calls itself {plugin.name!r}"
    try:
        check_name("driver", name)
    except InvalidName as error:
        return str(error)
    if not name.isidentifier():
        return "its name is not one word of letters, digits and underscores that starts with a letter"
    if name in _COMMON_KEYS:
        return f"its name is {name!r}, a key that every host file has"
    if not plugin.takes:
        return "it does not say what its VMs have in the host file"
    if not issubclass(plugin.vm_type, VmSpec):
        return f"its VMs are {plugin.vm_type.__name__}, which is not a VmSpec"
    # Raises TypeError where a key has no default.
    plugin.vm_type(name="vm")
    plugin.options_type()
    common, its = ({each.name: each.type for each in fields(kind)} for kind in (VmSpec, plugin.vm_type))
    if changed := sorted(key for key in common if its[key] != common[key]):
        return f"its VMs change what every VM has: {', '.join(changed)}"
    return mechanism_error(plugin.mechanisms)


def mechanism_error(mechanisms: Collection[str]) -> str:
    """Why the pause guard could not resume VMs of a driver with these mechanisms; empty: it can."""
    if unknown := sorted(set(mechanisms) - set(MECHANISMS)):
        return f"it has VMs resumed by {', '.join(map(repr, unknown))}; {KNOWN}"
    return "" if mechanisms else f"it names no way to resume a VM; {KNOWN}"


def check_plans(driver: Driver, vms: Iterable[str]) -> None:
    """Hold an open driver to what its plug-in promised, before anything is paused.

    Raises:
        DriverUnusable: a plan is of a kind that the pause guard does not know.
    """
    for vm in vms:
        try:
            guard_plan(driver, vm)
        except UnknownPlan as error:
            raise DriverUnusable(f"the driver {driver.name!r} cannot be used: {error}") from error
        except DriverError:
            continue  # it does not run: nothing of it can be paused
