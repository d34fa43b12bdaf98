"""Which commands are obeyed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura.contract.messages import (
    EPOCH_MOST,
    AbortOperation,
    OperationTarget,
    StartOperation,
    VmRecord,
    VmState,
)
from caesura.lifecycle.epoch import EPOCH_LEAP
from caesura_host_updater.command_admission import (
    AbortRunning,
    Accept,
    Host,
    Ignore,
    Refuse,
    Repeat,
    Tombstone,
    Underway,
    evaluate_abort,
    evaluate_start,
)
from caesura_host_updater.epoch_authority import EpochAuthority, NotObeyed, observe_epoch
from caesura_host_updater.inventory.updates import Catalogue, UpdateFile

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def host(**changes: Any) -> Host:
    """A host with two VMs and an update."""
    update = UpdateFile(
        name="patch", impact="pause", scope="host", argv=("/bin/true",), expected_s=1, timeout_s=5
    )
    facts: dict[str, Any] = {
        "host": "host-1",
        "vms": {
            name: VmRecord(
                vm=name,
                set="web",
                update_domain=0,
                state="running",
                methods=("live", "freeze"),
                methods_missing={"swap": "no"},
            )
            for name in ("a", "b")
        },
        "catalogue": Catalogue({"patch": update}),
    }
    return Host(**(facts | changes))


def command(**changes: Any) -> StartOperation:
    """A good command."""
    facts: dict[str, Any] = {
        "operation": "op",
        "epoch": 2,
        "coordinator": "c",
        "host": "host-1",
        "rollout": "r",
        "wave": 0,
        "method": "freeze",
        "targets": tuple(OperationTarget(vm=name, set="web", update_domain=0) for name in ("a", "b")),
        "update": "patch",
        "budget_s": 10.0,
        "not_after": NOW + timedelta(seconds=1),
    }
    return StartOperation(**(facts | changes))


def _target(vm: str, set_name: str = "web", domain: int = 0) -> OperationTarget:
    return OperationTarget(vm=vm, set=set_name, update_domain=domain)


def judge(sent: StartOperation, at: Host | None = None, known: Underway | Repeat | None = None) -> Any:
    """The verdict of a host that obeys epoch 2 of c."""
    observed = observe_epoch(EpochAuthority(2, "c"), sent.epoch, sent.coordinator)
    return evaluate_start(sent, host=at or host(), authority=observed, known=known, now=NOW)


def test_good_command_is_accepted() -> None:
    verdict = judge(command())
    assert isinstance(verdict, Accept)
    assert verdict.update is not None
    assert verdict.update.name == "patch"
    assert judge(command(update="", hold_s=7.0)) == Accept(None)


def test_known_operation_is_only_told_again_whatever_else_is_wrong() -> None:
    sent = command(epoch=1, not_after=NOW - timedelta(days=1), host="other")
    assert judge(sent, known=Underway()) == Underway()


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"epoch": 1}, "epoch 1 is old"), ({"coordinator": "d"}, "belongs to coordinator c")],
)
def test_who_has_no_authority_gets_no_answer(changes: dict[str, Any], why: str) -> None:
    verdict = judge(command(**changes))
    assert isinstance(verdict, Ignore)
    assert why in verdict.why


@pytest.mark.parametrize(
    ("changes", "at", "why"),
    [
        ({"host": "host-2"}, {}, "is for host host-2"),
        ({"not_after": NOW - timedelta(seconds=3)}, {}, "3.0 s after"),
        ({}, {"stopping": True}, "stopping"),
        ({}, {"busy": "other-op"}, "busy with operation other-op"),
        ({"method": "swap"}, {}, "swap is not possible for VM a: no"),
        ({"update": "nope"}, {}, "not known"),
        ({"budget_s": 3.0, "update": "", "hold_s": 2.5}, {}, "takes 2.5 s"),
        ({"method": "live", "update": ""}, {}, "does nothing"),
        ({"targets": (_target("a"), _target("b", domain=1))}, {}, "VM b is in set web domain 0"),
        ({"targets": (_target("a"), _target("b", set_name="db"))}, {}, "the command says db domain 0"),
        ({"targets": (_target("a"), _target("a"))}, {}, "VM a is named 2 times"),
        ({"targets": (_target("a"), _target("x"))}, {}, "VM x is not on this host"),
        ({"targets": (_target("a"),)}, {}, "leaves out b"),
    ],
)
def test_refusals(changes: dict[str, Any], at: dict[str, Any], why: str) -> None:
    verdict = judge(command(**changes), host(**at))
    assert isinstance(verdict, Refuse)
    assert why in verdict.why


@pytest.mark.parametrize("state", ["paused", "stopped", "unknown"])
def test_a_vm_that_does_not_run_is_not_paused(state: VmState) -> None:
    vms = {name: msgspec.structs.replace(vm, state=state) for name, vm in host().vms.items()}
    verdict = judge(command(), host(vms=vms))
    assert isinstance(verdict, Refuse)
    assert f"VM a is {state}, not running" in verdict.why


@pytest.mark.parametrize(
    ("vmm", "scope", "method"),
    [("beside", "vm", "swap"), ("instead", "host", "replace"), ("", "host", "freeze")],
)
def test_an_update_is_applied_by_its_own_method_only(vmm: Any, scope: Any, method: Any) -> None:
    update = UpdateFile(
        name="patch", impact="pause", scope=scope, vmm=vmm, argv=("/bin/true",), expected_s=1, timeout_s=5
    )
    able = {
        name: msgspec.structs.replace(record, methods=("live", "freeze", "swap", "replace"))
        for name, record in host().vms.items()
    }
    at = host(catalogue=Catalogue({"patch": update}), vms=able)
    for tried in ("live", "freeze", "swap", "replace"):
        verdict = judge(command(method=tried), at)
        assert isinstance(verdict, Accept) == (tried == method), tried
        if isinstance(verdict, Refuse):
            assert f"by method {method}" in verdict.why


@pytest.mark.parametrize(
    ("state", "refused"), [("running", True), ("paused", True), ("unknown", True), ("stopped", False)]
)
def test_another_kernel_is_not_started_under_a_vm_that_it_would_end(state: VmState, refused: bool) -> None:
    """One that was started after the plan was made, or that somebody else has paused."""
    update = UpdateFile(
        name="patch",
        impact="pause",
        scope="host",
        kernel="kexec",
        kernel_release="6.1",
        argv=("/bin/true",),
        expected_s=1,
        timeout_s=5,
    )
    vms = {
        name: msgspec.structs.replace(record, methods=("kexec",), state="running" if name == "a" else state)
        for name, record in host().vms.items()
    }
    verdict = judge(
        command(method="kexec", targets=(_target("a"),), budget_s=30.0),
        host(catalogue=Catalogue({"patch": update}), vms=vms),
    )
    assert isinstance(verdict, Refuse) == refused
    if isinstance(verdict, Refuse):
        assert "leaves out b" in verdict.why


def test_what_a_swap_does_before_its_pause_needs_no_budget() -> None:
    update = UpdateFile(
        name="patch",
        impact="pause",
        scope="vm",
        vmm="beside",
        argv=("/bin/true",),
        expected_s=600,
        timeout_s=900,
    )
    able = {name: msgspec.structs.replace(record, methods=("swap",)) for name, record in host().vms.items()}
    at = host(catalogue=Catalogue({"patch": update}), vms=able)
    assert isinstance(judge(command(method="swap"), at), Accept)


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(["c", "d"])), max_size=20), st.integers(0, 5))
def test_authority_never_goes_back_and_never_changes_hands_within_an_epoch(
    said: list[tuple[int, str]], start: int
) -> None:
    authority = EpochAuthority(start, "c")
    owners = {start: "c"}
    for epoch, coordinator in said:
        observed = observe_epoch(authority, epoch, coordinator)
        if isinstance(observed, EpochAuthority):
            assert observed.epoch >= authority.epoch
            assert owners.setdefault(observed.epoch, observed.coordinator) == observed.coordinator
            assert (observed.epoch, observed.coordinator) == (epoch, coordinator)
            authority = observed
        else:
            assert epoch < authority.epoch or coordinator != authority.coordinator


def test_an_epoch_that_nobody_can_have_claimed_is_refused_with_a_reason() -> None:
    here = EpochAuthority(7, "c")
    assert observe_epoch(here, 7 + EPOCH_LEAP, "d") == EpochAuthority(7 + EPOCH_LEAP, "d")
    for epoch in (8 + EPOCH_LEAP, EPOCH_MOST):
        why = observe_epoch(here, epoch, "d")
        assert isinstance(why, NotObeyed)
        assert f"epoch {epoch} is more than 1000 above epoch 7 of c" in why.why
    # A new host takes what comes first, but for one above which there is nothing.
    assert observe_epoch(EpochAuthority(), 10**9, "d") == EpochAuthority(10**9, "d")
    assert isinstance(observe_epoch(EpochAuthority(), EPOCH_MOST, "d"), NotObeyed)


def test_abort() -> None:
    sent = AbortOperation(operation="op", epoch=2, coordinator="c", host="host-1")
    good = EpochAuthority(2, "c")
    assert evaluate_abort(sent, busy="op", authority=good, known=Underway()) == AbortRunning()
    assert evaluate_abort(sent, busy="", authority=good, known=None) == Tombstone()
    assert evaluate_abort(sent, busy="", authority=good, known=Underway()) == Underway()
    assert isinstance(evaluate_abort(sent, busy="op", authority=NotObeyed("old"), known=None), Ignore)
