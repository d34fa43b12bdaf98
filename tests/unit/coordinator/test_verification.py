from __future__ import annotations

from caesura.contract import messages as m
from caesura.lifecycle.proof import memory_proof
from caesura_coordinator.records import ClockVerdict, HostOperation, Wave
from caesura_coordinator.verification import verify


def result(vm: str, **changes: object) -> m.VmResult:
    values: dict[str, object] = {
        "vm": vm,
        "set": "web",
        "update_domain": 0,
        "state": "running",
        "frozen": True,
    }
    return m.VmResult(**{**values, **changes})  # type: ignore[arg-type]


def planned(vm: str, host: str) -> m.PlannedVm:
    return m.PlannedVm(vm=vm, set="web", update_domain=0, host=host, method="freeze", reason="")


def test_what_a_host_reports_of_anothers_vm_is_neither_a_fault_nor_a_proof() -> None:
    lost = memory_proof((), ["digest_equal"], "changed")
    wave = Wave(
        index=0,
        domains={"web": 0},
        vms=(planned("w1", "h1"), planned("w2", "h2")),
        operations=(
            HostOperation(host="h1", operation="o1", status="completed", vms=(result("w1"),)),
            HostOperation(
                host="h2",
                operation="o2",
                status="completed",
                vms=(result("w2"), result("w1", state="stopped", pause_s=99.0, memory=lost)),
            ),
        ),
        clocks={name: ClockVerdict(synced=True, error_after_s=0.0) for name in ("w1", "w2")},
    )
    assert verify(wave, m.Policy(on_unproven="proceed")) == ([], [])
    proven = memory_proof(["digest_equal"], (), "equal")
    forged = wave.operations[1].vms[0], result("w1", memory=proven)
    wave = Wave(
        index=0,
        domains=wave.domains,
        vms=wave.vms,
        operations=(
            wave.operations[0],
            HostOperation(host="h2", operation="o2", status="completed", vms=(forged[0], forged[1])),
        ),
        clocks=wave.clocks,
    )
    wrong, _ = verify(wave, m.Policy(on_unproven="halt"))
    assert any(each.text.startswith("w1") for each in wrong), "another host's proof proves nothing"
