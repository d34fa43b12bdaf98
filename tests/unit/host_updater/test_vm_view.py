"""What the inventory adds to what the driver says of each VM."""

from __future__ import annotations

from typing import cast

import pytest

from caesura_host_updater.drivers.port import Capabilities, Driver
from caesura_host_updater.host_vms import HostVms
from caesura_host_updater.inventory.vm_spec import VmSpec
from caesura_host_updater.vm_view import VmView


class _Driver:
    """One VM with a risk of its own, one without."""

    def capabilities(self, vm: str) -> Capabilities:
        risk = "only the daemon" if vm == "web-1" else ""
        return Capabilities(methods=("freeze",), missing={}, clock="none", pause_risk=risk)

    async def read_states(self) -> dict[str, str]:
        return {"web-1": "running", "web-2": "running"}

    def health_error(self, vm: str) -> str:  # noqa: ARG002 - as the driver's
        return ""


@pytest.mark.parametrize("guard", ["", "the guard may not use it"])
async def test_what_the_guard_cannot_use_is_a_risk_of_the_pause(guard: str) -> None:
    vms = HostVms([VmSpec(name=vm) for vm in ("web-1", "web-2")])
    view = VmView(vms, cast("Driver", _Driver()), lambda _: guard)
    found = {vm: record.pause_risk for vm, record in (await view.records((), ())).items()}
    assert found == {
        "web-1": "the guard may not use it; only the daemon" if guard else "only the daemon",
        "web-2": guard,
    }
