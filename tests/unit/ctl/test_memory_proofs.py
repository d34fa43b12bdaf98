"""What the command and the demo say of proofs of memory, in the exact words."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from click import Context
from click.testing import CliRunner
from rich.console import Console

from caesura.contract import messages as m
from caesura.lifecycle.proof import memory_proof
from caesura_ctl.commands.rollouts import freeze, plan, roll
from caesura_ctl.fleet_view import FleetView, Pause
from caesura_ctl.memory_proofs import Shown, counted, planned
from caesura_ctl.options import policy_from
from caesura_ctl.tables import pauses_view, plan_view
from caesura_demo.checks import _guest_memory

T0 = datetime(2026, 4, 20, tzinfo=UTC)


def _pause(vm: str, memory: m.MemoryProof | None) -> Pause:
    return Pause(vm, "h", "web", 0, "op", 1.0, 30.0, "updater", memory, T0, T0)


def _verdict(vm: str, memory: m.MemoryProof | None) -> m.VmClockSynced:
    return m.VmClockSynced(
        vm=vm,
        host="h",
        set="web",
        update_domain=0,
        operation="op",
        synced=True,
        by="agent",
        memory=memory,
        at=T0,
    )


def _picture(*verdicts: m.VmClockSynced) -> FleetView:
    fleet_view = FleetView()
    for verdict in verdicts:
        fleet_view.fold(verdict)
    return fleet_view


def _text(view: Any) -> str:
    written = io.StringIO()
    Console(width=200, file=written).print(view)
    return written.getvalue()


def test_a_boot_id_is_said_to_be_one_and_is_no_proof() -> None:
    """Only its boot id was equal, and the table said "memory same"."""
    fleet_view = _picture(_verdict("a", memory_proof(["not_rebooted"])))
    pauses = [_pause("a", memory_proof(detail="no memory file"))]
    text = _text(pauses_view(pauses, fleet_view.clocks))
    assert "not rebooted" in text
    assert "same" not in text
    assert not _guest_memory(fleet_view, pauses).held


@pytest.mark.parametrize(
    ("by_host", "by_guest", "held", "words"),
    [
        (["digest_equal"], ["not_rebooted"], True, "digest equal 1/1, not rebooted 1/1"),
        (["sampled_digest_equal"], [], True, "sampled digest equal 1/1"),
        ([], ["canary_equal", "not_rebooted"], True, "canary equal 1/1, not rebooted 1/1"),
        (["digest_equal", "sampled_digest_equal"], [], True, "digest equal 1/1"),
        ([], [], False, "nothing shown"),
    ],
)
def test_proofs_are_counted_from_both_sides(by_host: Any, by_guest: Any, held: bool, words: str) -> None:
    fleet_view = _picture(_verdict("a", memory_proof(by_guest)))
    check = _guest_memory(fleet_view, [_pause("a", memory_proof(by_host))])
    assert (check.held, check.detail) == (held, words)


def test_what_is_broken_comes_first_and_no_proof_outweighs_it() -> None:
    fleet_view = _picture(
        _verdict("a", memory_proof(["not_rebooted"], ["canary_equal"])), _verdict("b", None)
    )
    pauses = [_pause("a", memory_proof(["digest_equal"])), _pause("b", memory_proof(["digest_equal"]))]
    assert counted(Shown(each, fleet_view.clocks) for each in pauses) == (
        "CANARY DIFFERS 1/2, digest equal 2/2, not rebooted 1/2"
    )
    assert not _guest_memory(fleet_view, pauses).held
    assert not _guest_memory(fleet_view, []).held


def test_a_plan_says_what_will_be_shown_of_whom() -> None:
    def vm(name: str, *proofs: m.ProofCode) -> m.PlannedVm:
        return m.PlannedVm(
            vm=name, set="web", update_domain=0, host="h", method="swap", reason="why", proofs=proofs
        )

    assert planned([vm("a", "not_rebooted", "digest_equal"), vm("b", "digest_equal", "not_rebooted")]) == (
        "digest equal, not rebooted"
    )
    two = (vm("a", "sampled_digest_equal"), vm("b"))
    assert planned(two) == "sampled digest equal: a\nnothing shown: b"
    wave = m.PlannedWave(wave=0, domains={"web": 0}, hosts=("h",), vms=two)
    assert "nothing shown: b" in _text(plan_view(m.Plan(update="u", waves=(wave,))))


@pytest.mark.parametrize("command", [plan, roll, freeze])
def test_every_command_that_pauses_takes_the_policy(command: Any) -> None:
    option = next(each for each in command.params if each.name == "on_unproven")
    assert option.default is None
    assert "proceed for freeze" in " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    given = {each.name: each.get_default(Context(command)) for each in command.params}
    given |= {"notice": 1.0, "budget": 9.0}
    assert policy_from(given).on_unproven is None
    assert policy_from({**given, "on_unproven": "halt"}).on_unproven == "halt"
