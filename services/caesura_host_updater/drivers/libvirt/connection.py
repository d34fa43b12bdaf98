"""A connection to libvirt by its binding: which domains there are, events, the guest's agent, shutdown and start.

Pauses do not go through it: see ``libvirt_control``, which the pause guard uses, too. Every method but ``events`` blocks, for as
long as the daemon takes: callers run them in threads and bound them.
"""

from __future__ import annotations

import json
import threading
import xml.etree.ElementTree as ET  # what libvirt made itself
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from caesura_host_updater.drivers.libvirt.binding import load_binding, run_events
from caesura_host_updater.drivers.libvirt.definition import NAMESPACE, PREFIX, FoundDomain, Label

_KEEP_ALIVE_S, _KEEP_ALIVES = 2, 3
"""A daemon that hangs is given up after these; calls to it fail then."""
_AGENT_S = 3  # s: what the daemon waits for a guest agent


class LibvirtError(OSError):
    """libvirt's own words."""


class NoSuchDomain(LibvirtError):
    """There is no domain of that name or UUID."""


def existing_socket(sockets: Sequence[str]) -> str:
    """The first socket that is there, else the last. Blocking."""
    return next((each for each in sockets if Path(each).exists()), sockets[-1])


class LibvirtConnection:
    """See the module.

    Args:
        uri: such as ``qemu:///system``.
        socket: the daemon's.
        binding: the folder of the binding; see ``load_binding``.
        changed: called in a thread of libvirt's when a domain may have changed, or the connection ended.
    """

    def __init__(self, uri: str, socket: str, binding: str, changed: Callable[[], None]) -> None:
        driver, _, mode = uri.partition(":///")
        self._uri = f"{driver}+unix:///{mode}?socket={socket}"
        self._binding = binding
        self._changed = changed
        self._lock = threading.Lock()
        self._ended = threading.Condition()
        self._migrated: dict[str, bool] = {}
        """UUIDs of domains that ended since they were last started, and whether they did so by a migration to another host."""
        self._libvirt: ModuleType | None = None
        self._open: Any = None

    def _module(self) -> ModuleType:
        """Raises NoBinding."""
        if self._libvirt is None:
            self._libvirt = load_binding(self._binding)
            run_events(self._libvirt)
        return self._libvirt

    def load(self) -> None:
        """Load the binding before the first connection. Raises NoBinding."""
        with self._lock:
            self._module()

    def _connection(self) -> Any:
        """Connected, with events. Raises NoBinding, LibvirtError."""
        with self._lock:
            libvirt = self._module()
            if self._open is not None and self._open.isAlive():
                return self._open
            try:
                connection = libvirt.open(self._uri)
                connection.setKeepAlive(_KEEP_ALIVE_S, _KEEP_ALIVES)
                connection.registerCloseCallback(lambda *_: self._changed(), None)
                lifecycle = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
                connection.domainEventRegisterAny(None, lifecycle, self._on_lifecycle, None)
                for event in (
                    libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE,
                    libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE,
                ):
                    connection.domainEventRegisterAny(None, event, lambda *_: self._changed(), None)
            except libvirt.libvirtError as error:
                raise LibvirtError(_words(error)) from error
            self._open = connection
            return connection

    def _on_lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _: Any) -> None:
        """In libvirt's thread."""
        libvirt = self._module()
        uuid = domain.UUIDString()
        with self._ended:
            if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
                self._migrated[uuid] = detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED
            elif event == libvirt.VIR_DOMAIN_EVENT_STARTED:
                self._migrated.pop(uuid, None)
            self._ended.notify_all()
        self._changed()

    def was_migrated(self, uuid: str, patience_s: float) -> bool:
        """Whether a domain that has ended was migrated to another host; False where nothing tells within ``patience_s``.

        It is waited for once: a daemon that is dead tells nothing.
        """
        with self._ended:
            self._ended.wait_for(lambda: uuid in self._migrated, patience_s)
            return self._migrated.setdefault(uuid, False)

    def version(self) -> str:
        """Of the daemon, such as ``9.0.0``. Raises NoBinding, LibvirtError."""
        number = self._do(lambda connection: connection.getLibVersion())
        return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"

    def domains(self) -> list[FoundDomain]:
        """All, whether they run or not. Raises NoBinding, LibvirtError."""
        found = []
        for domain in self._do(lambda connection: connection.listAllDomains()):
            with suppress(NoSuchDomain):  # it was undefined or migrated away in this moment
                found.append(self._on(domain, self._found))
        return found

    def _found(self, domain: Any) -> FoundDomain:
        libvirt = self._module()
        number, uuid = domain.ID(), domain.UUIDString()
        away = number <= 0 and domain.state() == [
            libvirt.VIR_DOMAIN_SHUTOFF,
            libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED,
        ]
        return FoundDomain(
            name=domain.name(),
            uuid=uuid,
            number=number,
            migrated=away,
            label=self._label(domain),
            agent_connected=number > 0 and _agent_connected(domain.XMLDesc()),
            persistent=bool(domain.isPersistent()),
        )

    def _label(self, domain: Any) -> str:
        libvirt = self._module()
        try:
            return str(domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE))
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                return ""
            raise

    def set_label(self, name: str, label: Label | None) -> None:
        """Write a domain's label, in its definition and in the domain that runs; None: remove it.

        Raises:
            NoSuchDomain, NoBinding, LibvirtError: it is not written.
        """
        libvirt = self._module()

        def write(domain: Any) -> None:
            flags = libvirt.VIR_DOMAIN_AFFECT_LIVE if domain.isActive() else 0
            flags |= libvirt.VIR_DOMAIN_AFFECT_CONFIG if domain.isPersistent() else 0
            text = label.xml if label is not None else None
            domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, text, PREFIX, NAMESPACE, flags)

        self._on(self._do(lambda connection: connection.lookupByName(name)), write)

    def ask_agent(self, uuid: str, request: dict[str, Any], timeout_s: int = _AGENT_S) -> str:
        """What the guest agent answers: one JSON document. Raises NoSuchDomain, NoBinding, LibvirtError."""
        import libvirt_qemu  # type: ignore[import-not-found]  # noqa: PLC0415 - loaded with the binding

        return str(
            self._on(
                self._by_uuid(uuid),
                lambda domain: libvirt_qemu.qemuAgentCommand(domain, json.dumps(request), timeout_s, 0),
            )
        )

    def shut_down(self, uuid: str) -> None:
        """Ask the guest, by its agent or by ACPI, as libvirt chooses. Raises NoSuchDomain, NoBinding, LibvirtError."""
        self._on(self._by_uuid(uuid), lambda domain: domain.shutdownFlags(0))

    def start(self, uuid: str) -> None:
        """Start a domain that is defined and does not run. Raises NoSuchDomain, NoBinding, LibvirtError."""
        self._on(self._by_uuid(uuid), lambda domain: None if domain.isActive() else domain.create())

    def destroy(self, uuid: str) -> None:
        """End it at once. Raises NoSuchDomain, NoBinding, LibvirtError."""
        self._on(self._by_uuid(uuid), lambda domain: domain.destroy() if domain.isActive() else None)

    def close(self) -> None:
        """The domains run on."""
        with self._lock:
            if self._open is not None:
                with suppress(self._module().libvirtError):
                    self._open.close()
                self._open = None

    # -- calls ------------------------------------------------------------------------------------------------

    def _by_uuid(self, uuid: str) -> Any:
        return self._do(lambda connection: connection.lookupByUUIDString(uuid))

    def _do(self, work: Callable[[Any], Any]) -> Any:
        connection = self._connection()
        return self._on(connection, work)

    def _on(self, target: Any, work: Callable[[Any], Any]) -> Any:
        libvirt = self._module()
        try:
            return work(target)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise NoSuchDomain(_words(error)) from error
            raise LibvirtError(_words(error)) from error


def _words(error: Exception) -> str:
    return f"libvirt says: {error}"


def _agent_connected(xml: str) -> bool:
    document = ET.fromstring(xml)  # noqa: S314 - of the daemon, which we trust with the guests
    for target in document.iterfind("./devices/channel/target[@name='org.qemu.guest_agent.0']"):
        return target.get("state") == "connected"
    return False
