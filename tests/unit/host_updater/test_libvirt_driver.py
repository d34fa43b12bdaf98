"""The libvirt driver where no daemon is needed; with one: tests/integration/libvirt."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from caesura_host_updater.drivers.libvirt import restarting
from caesura_host_updater.drivers.libvirt.definition import LibvirtOptions, LibvirtVm
from caesura_host_updater.drivers.libvirt.driver import LibvirtDriver
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan

_UUID = "783136f9-2b12-4ee3-8a40-5eee38a7cccd"


def test_one_vm_that_shuts_down_for_an_update_hides_no_other_that_ended(tmp_path: Path) -> None:
    driver = LibvirtDriver(LibvirtOptions(), ("/s",), tmp_path)
    driver.vms = {name: LibvirtVm(name=name) for name in ("a", "b")}
    driver._error = ""
    driver._restarter.down = {"a"}
    assert driver.ping() == "not running: b (its domain does not run)"


async def test_a_daemon_is_never_asked_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain whose process is not seen from here, as without root: only the daemon says that it has ended."""
    asked: list[threading.Thread] = []

    def condition(_: LibvirtPlan) -> str:
        asked.append(threading.current_thread())
        return "gone"

    monkeypatch.setattr(restarting, "condition", condition)
    assert await restarting.has_ended(LibvirtPlan("a", "/s", "qemu:///system", _UUID, 1, 0, 0))
    assert asked
    assert asked[0] is not threading.current_thread()
