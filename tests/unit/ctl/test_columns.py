"""Tables and the live view at the width and height of a terminal: nothing that names something is broken or cut off."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from rich.console import Console, RenderableType

from caesura.contract import messages as m
from caesura.contract.examples import examples
from caesura.contract.parts import WholeRollout
from caesura_ctl.columns import Columns
from caesura_ctl.errors import NotCompleted
from caesura_ctl.fleet_view import FleetView
from caesura_ctl.follow import Progress, conclude
from caesura_ctl.options import wide_console
from caesura_ctl.tables import (
    documents_view,
    domains_view,
    history_view,
    hosts_view,
    live_view,
    plan_view,
    rollout_view,
)
from caesura_ctl.updates_table import updates_view
from caesura_testing.rollouts import wave_state, whole_rollout

NOW = datetime(2026, 4, 20, 12, 0, tzinfo=UTC)
ROLLOUT = "20260420-221158-1f3a"
EVENT = "C7061BAC-AFDC-4513-B24B-AA5F13A16123"
OPERATION = "0b6c1d8e-6a55-5b54-9a3d-2f4f0a5c9f01"


def _printed(view: RenderableType, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(view)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def _example(kind: type[Any], **changes: Any) -> Any:
    found = next(each.message for each in examples() if isinstance(each.message, kind))
    return msgspec.structs.replace(found, **changes)


def _rollout(waves: int = 2, **changes: Any) -> WholeRollout:
    made = tuple(
        wave_state(
            wave=number,
            status="completed" if number < waves // 2 else "pending",
            domains={f"set-{number}-{each}": 0 for each in range(12)},
            hosts=tuple(f"host-{number}-{each}" for each in range(12)),
            vms=tuple(f"vm-{number}-{each}" for each in range(12)),
        )
        for number in range(waves)
    )
    example = _example(m.RolloutState)
    names = ("update", "policy", "sets", "estimate_s", "requested_by", "created_at")
    return whole_rollout(example.rollout, made, **{name: getattr(example, name) for name in names} | changes)


def test_an_id_in_a_history_is_whole_at_80_columns_and_columns_are_left_out_instead() -> None:
    state = _rollout(
        status="halted",
        reason="update qemu-security failed on host-1: exit code 3, see the output of the update",
    )
    lines = _printed(history_view([state]))
    assert all(len(line) <= 80 for line in lines)
    assert any(line.strip().startswith(ROLLOUT) for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "halted" in text
    assert "requested" not in text
    wide = " ".join(_printed(history_view([state]), 200))
    assert "ops" in wide
    assert "2026-04-20 22:11:58Z" in wide


def test_a_queued_rollout_is_shown_as_such_with_whom_it_waits_for() -> None:
    state = _rollout(status="running", queued_behind="20260420-210000-aaaa")
    assert "queued behind 20260420-210000-aaaa" in " ".join(
        _printed(rollout_view(state, FleetView(), NOW), 140)
    )
    wide = " ".join(_printed(history_view([state]), 220))
    assert "queued" in wide
    assert "behind 20260420-210000-aaaa" in wide
    said = Progress().lines(FleetView(), state)
    assert f"rollout {ROLLOUT}: queued behind rollout 20260420-210000-aaaa" in said
    over = _rollout(status="aborted", queued_behind="20260420-210000-aaaa")
    assert "behind" not in " ".join(_printed(rollout_view(over, FleetView(), NOW), 140))


def test_ids_of_operations_and_events_are_whole_or_their_column_is_not_there() -> None:
    fleet_view = FleetView()
    fleet_view.fold(_example(m.HostInventory, operation=OPERATION, driver_detail="cgroup v2 freezer " * 4))
    fleet_view.fold(_example(m.SetDocument))
    for width in (60, 80, 100, 140):
        for view, name in ((hosts_view(fleet_view), OPERATION), (documents_view(fleet_view), EVENT)):
            lines = _printed(view, width)
            assert all(len(line) <= width for line in lines)
            whole = any(name in line for line in lines)
            assert whole or not any(name[:8] in line for line in lines), (width, lines)
    assert any(OPERATION in line for line in _printed(hosts_view(fleet_view), 80))
    assert any(EVENT in line for line in _printed(documents_view(fleet_view), 80))


def test_what_is_left_out_first_is_what_was_said_to_matter_least() -> None:
    table = Columns("name", "much", "more", ">n", drop=("more", "much"))
    table.add_row("a-long-name", "x" * 20, "y" * 20, "1")
    assert table.shown(80) == ["name", "much", "more", "n"]
    assert table.shown(42) == ["name", "much", "n"]
    assert table.shown(21) == ["name", "n"]
    assert table.shown(5) == ["name", "n"], "what may not be left out never is"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 40), (120, 24), (100, 60), (80, 18)])
@pytest.mark.parametrize("waves", [1, 3, 60])
@pytest.mark.parametrize("status", ["running", "halted"])
def test_watch_fits_the_terminal_and_its_rollout_comes_first(
    width: int, height: int, waves: int, status: Any
) -> None:
    fleet_view = FleetView()
    reason = "update qemu-security failed on host-1: exit code 3" * 3 if status == "halted" else ""
    fleet_view.fold(_rollout(waves, status=status, reason=reason))
    inventory = _example(m.HostInventory)
    for number in range(60):
        vms = tuple(
            msgspec.structs.replace(inventory.vms[0], vm=f"vm-{number}-{each}", set=f"set-{number}")
            for each in range(5)
        )
        fleet_view.fold(
            msgspec.structs.replace(inventory, host=f"host-{number}", vms=vms, refused_updates=())
        )
    for number in range(30):
        fleet_view.fold(_example(m.VmFrozen, vm=f"vm-{number}-0", operation=f"op-{number}", at=NOW))
    view = live_view(fleet_view, NOW + timedelta(seconds=3), ROLLOUT, lines=height, width=width)
    lines = _printed(view, width)
    assert len(lines) <= height, "\n".join(lines)
    assert ROLLOUT in lines[0]
    assert any("paused now: vm-0-0 3.0s" in line for line in lines)
    assert any(line.split()[:1] == [str(waves // 2 + 1)] for line in lines), "the wave that is next is shown"
    if status == "halted":
        assert f"caesura resume {ROLLOUT}" in "\n".join(lines)


def test_waves_are_counted_from_one() -> None:
    first = next(
        line for line in _printed(rollout_view(_rollout(1), FleetView(), NOW), 140) if "pending" in line
    )
    assert first.split()[0] == "1"


def test_a_halt_names_the_next_commands() -> None:
    class Session:
        fleet_view = FleetView()

    class Context:
        json = False

    state = _rollout(status="halted", reason="it failed")
    with pytest.raises(Exception, match="it failed") as caught:
        conclude(Session(), Context(), state)  # type: ignore[arg-type]
    for command in ("history", "resume", "abort"):
        assert f"caesura {command} {ROLLOUT}" in str(caught.value)


def _hosts(count: int) -> FleetView:
    fleet_view = FleetView()
    for number in range(count):
        inventory = _example(m.HostInventory)
        vms = tuple(msgspec.structs.replace(vm, vm=f"{vm.vm}-{number}") for vm in inventory.vms)
        fleet_view.fold(
            msgspec.structs.replace(inventory, host=f"host-{number}", vms=vms, refused_updates=())
        )
    return fleet_view


def test_a_sentence_is_not_squeezed_into_a_column_of_single_words() -> None:
    reason = "host-1 failed: update qemu-security failed with exit code 7"
    lines = _printed(history_view([_rollout(update="bad", status="halted", reason=reason)]))
    assert len([line for line in lines if line.strip()]) <= 6, lines


def test_the_reason_of_a_halt_is_said_once_below_the_waves() -> None:
    reason = "host-1 failed: update qemu-security failed with exit code 7"
    failed = msgspec.structs.replace(_rollout().waves[0], status="failed", reason=reason)
    state = _rollout(status="halted", reason=reason)
    state = msgspec.structs.replace(state, waves=(failed, *state.waves[1:]))
    text = " ".join(" ".join(_printed(rollout_view(state, FleetView(), NOW), 200)).split())
    assert text.count("exit code 7") == 1


@pytest.mark.parametrize("count", [6, 40])
def test_the_hosts_of_an_update_take_a_line_or_two_and_not_one_each(count: int) -> None:
    lines = _printed(updates_view(_hosts(count)))
    assert len(lines) < 12, lines
    assert f"all {count}" in " ".join(lines)


def test_what_all_waves_of_a_plan_have_in_common_is_said_once() -> None:
    answer = _example(m.RequestAnswered)
    (first, *_) = answer.plan.waves
    second = msgspec.structs.replace(first, wave=1)
    plan = msgspec.structs.replace(answer.plan, waves=(first, second))
    reason = f"{first.vms[0].method}: {first.vms[0].reason}"
    text = " ".join(" ".join(_printed(plan_view(plan), 300)).split())
    assert text.count(reason) == 1
    other = msgspec.structs.replace(first.vms[0], reason="another reason")
    mixed = msgspec.structs.replace(plan, waves=(first, msgspec.structs.replace(second, vms=(other,))))
    text = " ".join(" ".join(_printed(plan_view(mixed), 300)).split())
    assert reason in text
    assert "another reason" in text


def test_a_vm_whose_application_ended_does_not_count_as_running() -> None:
    fleet_view = FleetView()
    inventory = _example(m.HostInventory)
    dead = msgspec.structs.replace(
        inventory.vms[0], state="running", state_detail="/bin/web was ended by SIGKILL"
    )
    fleet_view.fold(msgspec.structs.replace(inventory, vms=(dead,)))
    (row,) = [line for line in _printed(domains_view(fleet_view)) if line.strip().startswith(dead.set)]
    assert row.split()[2:] == ["1", "0", "1", "?"]


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("", 140), ("wide", 140)])
def test_in_a_pipe_columns_is_obeyed(monkeypatch: pytest.MonkeyPatch, columns: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert wide_console().width == width


def test_how_long_until_a_wave_starts_is_in_sight_on_a_narrow_terminal() -> None:
    state = _rollout(waves=6, status="running")
    scheduled = msgspec.structs.replace(
        state.waves[0],
        domains={"_solo-4": 0},
        hosts=("h-4",),
        vms=("solo-4",),
        status="scheduled",
        not_before=NOW + timedelta(seconds=7),
        events={"web": EVENT},
    )
    fleet_view = FleetView()
    fleet_view.fold(msgspec.structs.replace(state, waves=(scheduled,)))
    lines = _printed(live_view(fleet_view, NOW, ROLLOUT, lines=24, width=68), 68)
    assert any("NotBefore in 7s" in line for line in lines), lines


def test_a_reason_does_not_repeat_the_status_that_stands_before_it() -> None:
    state = _rollout(status="aborted", reason="aborted: wrong day")

    class Session:
        fleet_view = FleetView()

    class Context:
        json = False

    with pytest.raises(NotCompleted) as stopped:
        conclude(Session(), Context(), state)  # type: ignore[arg-type]
    assert str(stopped.value) == f"rollout {ROLLOUT} aborted: wrong day"
    assert Progress().lines(FleetView(), state)[0] == f"rollout {ROLLOUT}: aborted: wrong day"
