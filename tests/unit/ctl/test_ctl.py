"""Durations, the picture, the verdict, the layout, and the command line's own refusals."""

from __future__ import annotations

import asyncio
import errno
import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from caesura.bus.embedded import EmbeddedBrokerMissing
from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.contract import messages as m
from caesura.contract.examples import examples
from caesura.contract.parts import WholeRollout
from caesura.runtime.errors import CaesuraError
from caesura_ctl.cli import caesura
from caesura_ctl.console import VisibleConsole
from caesura_ctl.durations import parse_duration, show_duration
from caesura_ctl.fleet_view import FleetView
from caesura_ctl.follow import Progress
from caesura_ctl.name_params import SET_NAME
from caesura_ctl.session import Session
from caesura_ctl.tables import (
    attention_view,
    documents_view,
    history_view,
    hosts_view,
    live_view,
    pauses_view,
    plan_view,
    rollout_view,
    set_name,
)
from caesura_ctl.updates_table import updates_view
from caesura_demo import workspace
from caesura_demo.checks import WorkloadStatus, judge, overlaps
from caesura_demo.layout import standard_layout
from caesura_demo.workspace import Interrupted, run_folder
from caesura_testing.collector import eventually
from caesura_testing.patience import patient
from caesura_testing.rollouts import sent, wave_state, whole_rollout

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("9", 9), ("9s", 9), ("0.5s", 0.5), ("1m30s", 90), ("15m", 900), ("2h", 7200), ("1h1m1s", 3661)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "9x", "1s1m", "nine", "1e3"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@given(st.integers(1, 100_000))
def test_shown_durations_can_be_read_again(seconds: int) -> None:
    assert parse_duration(show_duration(seconds)) == seconds


def _resumed(
    vm: str, domain: int, begin_s: float, pause_s: float, operation: str = "o"
) -> list[m.VmFrozen | m.VmResumed]:
    common: dict[str, Any] = {
        "vm": vm,
        "host": "h",
        "set": "web",
        "update_domain": domain,
        "operation": operation,
        "method": "freeze",
        "budget_s": 10.0,
    }
    begin = T0 + timedelta(seconds=begin_s)
    return [
        m.VmFrozen(**common, at=begin),
        m.VmResumed(
            **common,
            pause_s=pause_s,
            within_budget=pause_s <= 10,
            resumed_by="updater",
            memory=m.MemoryProof(proof="digest", ok=True),
            at=begin + timedelta(seconds=pause_s),
        ),
    ]


def test_vms_that_need_a_person_are_named_with_what_their_host_says() -> None:
    fleet_view = FleetView()
    vm = m.VmRecord(vm="vm-1", set="_vm-1", update_domain=0, state="paused", methods=())
    fleet_view.fold(m.HostInventory(host="h", driver="qemu", epoch=1, vms=(vm,), guard="ready"))
    assert attention_view(fleet_view) is None
    named = msgspec.structs.replace(vm, state_detail="QEMU paused it for an I/O error")
    fleet_view.fold(m.HostInventory(host="h", driver="qemu", epoch=1, vms=(named,), guard="ready"))
    view = attention_view(fleet_view)
    assert view is not None
    written = io.StringIO()
    Console(width=140, file=written).print(view)
    assert "vm-1" in written.getvalue()
    assert "QEMU paused it for an I/O error" in written.getvalue()


async def test_what_is_removed_from_the_broker_leaves_the_view_of_a_command_that_watches() -> None:
    """A host that was taken out of service stayed on the screen of every running ``caesura watch``."""
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="ops", filters=["caesura/v1/#"])
    session = Session(bus, "ops")
    other = MemoryBus(broker, client_id="host-1")
    post = MessageClient(other, "/caesura/default/host/host-1")
    running = [
        asyncio.create_task(bus.run(session.post.deliver)),
        asyncio.create_task(other.run(post.deliver)),
    ]
    try:
        assert await bus.wait_connected(5)
        await post.send(m.HostInventory(host="host-1", driver="qemu", epoch=1, vms=()), host="host-1")
        await eventually(lambda: "host-1" in session.fleet_view.hosts)
        await post.clear(m.HostInventory, host="host-1")
        await eventually(lambda: "host-1" not in session.fleet_view.hosts)
        assert len(session.fleet_view.hosts) == 0
    finally:
        await bus.close()
        await other.close()
        await asyncio.gather(*running)


async def test_a_rollout_that_is_caught_between_two_messages_is_not_missing() -> None:
    """A wave's state is published before the rollout that names it: whoever looks just then waits for the rollout."""
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="ops", filters=["caesura/v1/#"])
    session = Session(bus, "ops")
    running = asyncio.create_task(bus.run(session.post.deliver))
    try:
        assert await bus.wait_connected(5)
        before = whole_rollout("r1", [wave_state(wave=0, status="started", vms=("w1",))])
        after = whole_rollout("r1", [wave_state(wave=0, status="verifying", vms=("w1",))])
        (newer, _), (head, _) = sent(after)[0], sent(before)[1]
        await session.post.send(newer, rollout="r1", wave=0)
        await session.post.send(head, rollout="r1")
        await eventually(lambda: session.post.incomplete)
        settled = asyncio.ensure_future(session.settled(patient(30)))
        await asyncio.sleep(0.5)  # longer than the silence that is waited for
        assert not settled.done()
        await session.post.send(sent(after)[1][0], rollout="r1")
        await settled
        assert [each.status for each in session.fleet_view.rollouts["r1"].waves] == ["verifying"]
    finally:
        await bus.close()
        await running


def test_the_picture_takes_every_message_and_repetition_changes_nothing() -> None:
    fleet_view = FleetView()
    for _ in range(2):
        for example in examples():
            fleet_view.fold(example.message)
    assert list(fleet_view.hosts) == ["host-1"]
    assert len(fleet_view.pauses) == 1
    assert not fleet_view.frozen, "a repeated frozen after its resumed does not freeze anything"
    written = io.StringIO()
    console = Console(width=120, file=written)
    console.print(live_view(fleet_view, T0))
    console.print(hosts_view(fleet_view), documents_view(fleet_view), updates_view(fleet_view))
    console.print(pauses_view(fleet_view.pauses.values(), fleet_view.clocks))
    console.print(history_view(list(fleet_view.rollouts.values())))
    answer = next(each.message for each in examples() if isinstance(each.message, m.RequestAnswered))
    assert answer.plan is not None
    console.print(plan_view(answer.plan))
    text = written.getvalue()
    for word in ("host-1", "web-1", "qemu-security", "8.734s", "typo.toml", "every VM of the host pauses"):
        assert word in text


def test_overlaps_of_domains_are_found_and_touching_ones_are_not() -> None:
    def at(second: float) -> datetime:
        return T0 + timedelta(seconds=second)

    assert overlaps([("web", 0, at(0), at(2)), ("web", 1, at(2), at(4))]) == []
    assert overlaps([("web", 0, at(0), at(2)), ("db", 1, at(1), at(4))]) == []
    assert overlaps([("web", 1, at(1.9), at(4)), ("web", 0, at(0), at(2))]) == ["web: domains 0 and 1"]
    assert overlaps([("web", 0, at(0), at(9)), ("web", 0, at(1), at(2)), ("web", 2, at(8), at(10))]) == [
        "web: domains 0 and 2"
    ]


def _judged(**changes: Any) -> dict[str, bool]:
    """A rollout of two VMs that went well, with something changed."""
    fleet_view = FleetView()
    events = {"web": ("E1", "E2")}
    waves = tuple(
        wave_state(
            wave=index,
            status="completed",
            domains={"web": index},
            hosts=(f"h{index}",),
            vms=(f"w{index}",),
            events={"web": events["web"][index]},
        )
        for index in range(2)
    )
    rollout = whole_rollout(
        rollout="r",
        update="patch",
        status=changes.get("status", "completed"),
        policy=m.Policy(),
        sets=("web",),
        waves=waves,
        created_at=T0,
    )
    for index in range(2):
        begin = changes.get("begin", (0.0, 5.0))[index]
        fleet_view.fold(
            m.OperationReported(
                operation=f"o{index}", host=f"h{index}", epoch=1, rollout="r", status="completed", at=T0
            )
        )
        for message in _resumed(f"w{index}", index, begin, changes.get("pause_s", 2.0), f"o{index}"):
            fleet_view.fold(message)
        fleet_view.fold(
            m.VmClockSynced(
                vm=f"w{index}",
                host=f"h{index}",
                set="web",
                update_domain=index,
                operation=f"o{index}",
                synced=True,
                by="agent",
                error_before_s=-2.0,
                error_after_s=changes.get("error_after_s", 0.001),
                at=T0,
            )
        )
        for status in ("scheduled", "started", changes.get("end", "completed")):
            fleet_view.fold(
                m.EventChanged(
                    event_id=f"E{index + 1}",
                    set="web",
                    event_type="Freeze",
                    status=status,
                    resources=(f"w{index}",),
                    incarnation=1,
                    not_before=T0,
                    approved_by="w0" if status != "scheduled" else "",
                    at=T0,
                )
            )
    status = WorkloadStatus("w", 1, 1, 0, ["e1"], [2.0], 1, changes.get("digests_ok", True))
    checks = judge(
        fleet_view,
        rollout,
        {"w0": status, "w1": status},
        changes.get("patched", ["h0", "h1"]),
        changes.get("still_frozen", []),
    )
    return {check.rule: check.held for check in checks}


def test_a_good_rollout_holds_every_rule() -> None:
    assert all(_judged().values())


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"status": "halted"}, "the rollout completed"),
        ({"begin": (0.0, 1.0)}, "one update domain of a set at a time"),
        ({"pause_s": 10.5, "begin": (0.0, 20.0)}, "every pause inside its budget"),
        ({"patched": ["h0"]}, "every host updated once, while its VMs were paused"),
        ({"patched": ["h0", "h1", "h1"]}, "every host updated once, while its VMs were paused"),
        ({"digests_ok": False}, "memory proven for every VM"),
        ({"error_after_s": 0.2}, "clocks corrected"),
        ({"end": "failed"}, "every event reached exactly one end"),
        ({"still_frozen": ["process 1"]}, "no VM left paused"),
    ],
)
def test_each_rule_can_break(changes: dict[str, Any], rule: str) -> None:
    assert [name for name, held in _judged(**changes).items() if not held] == [rule]


def test_the_demo_has_the_fleet_it_promises() -> None:
    layout = standard_layout(range(18100, 18125))
    assert (len(layout.hosts), len(layout.vms)) == (6, 25)
    sets = {name: [vm for vm in layout.vms if vm.set == name] for name in ("web", "db", "")}
    assert [len(each) for each in sets.values()] == [12, 12, 1]
    for name in ("web", "db"):
        assert {vm.update_domain for vm in sets[name]} == {0, 1, 2}
    for host in layout.hosts:
        for name in ("web", "db"):
            assert len({vm.update_domain for vm in layout.on(host) if vm.set == name}) == 1
    assert len({vm.port for vm in layout.vms}) == 25


@pytest.mark.parametrize("name", sorted(caesura.commands))
def test_every_command_has_help_with_examples_and_exit_codes(name: str) -> None:
    result = CliRunner().invoke(caesura, [name, "--help"])
    assert result.exit_code == 0
    assert "examples:" in result.output
    assert f"caesura {name}" in result.output
    assert "exit codes:" in result.output


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["freeze", "--vm", "w", "--for", "soon"], "is not a duration"),
        (["freeze", "--for", "9s"], "say where to freeze"),
        (["freeze", "--vm", "w", "--for", "30s"], "takes 30 s, a pause budget of 30 s leaves"),
        (["freeze", "--vm", "w", "--for", "29.99s"], "takes 29.99 s, a pause budget of 30 s leaves"),
        (["roll"], "Missing argument 'UPDATE'"),
        (["tail", "--type", "caesura.nothing.v1"], "is none of"),
        (["demo", "--budget", "31s"], "at most 30s"),
        (["demo", "--notice", "0s"], "longer than zero"),
        (["acl", "hots:host-1"], "'hots' is none of"),
        (["acl", "host"], "host:NAME"),
        (["acl", "vm:a.b"], "A-Z"),
        (["acl", "host:h:a=web/20"], "host:NAME[:VM"),
        (["acl", "host:h:a=web/x"], "host:NAME[:VM"),
        (["acl", "host:h:a=/1"], "host:NAME[:VM"),
        (["acl", "host:h:a="], "host:NAME[:VM"),
        (["acl", "host:h:a=web/"], "host:NAME[:VM"),
        (["acl", "metadata:m:a=web"], "metadata:NAME[:VM"),
        (["history", "--limit", "0"], "not in the range"),
        (["roll", "u", "--budget", "31s"], "'--budget': 31s is too long: at most 30s"),
        (["roll", "u", "--budget", "0s"], "'--budget': it must be longer than zero"),
        (["plan", "u", "--notice", "0s"], "'--notice': it must be longer than zero"),
        (["plan", "u", "--clock-bound", "0s"], "'--clock-bound': it must be longer than zero"),
        (["plan", "u", "--verify-timeout", "0s"], "'--verify-timeout': it must be longer than zero"),
        (["freeze", "--vm", "w", "--for", "0s"], "'--for': it must be longer than zero"),
        (["freeze", "--vm", "w", "--for", "31s"], "'--for': 31s is too long: at most 30s"),
        (["plan", "a/b"], "'UPDATE': 'a/b' is not a name: letters, digits, _ and -, 1 to 63 of them"),
        (["plan", "u", "--set", "a b"], "'--set': 'a b' is not a name"),
        (["plan", "u", "--set", "(a b)"], "'--set': '(a b)' is not a name"),
        (["plan", "u", "--host", "a.b"], "'--host': 'a.b' is not a name"),
        (["freeze", "--vm", "", "--for", "1s"], "'--vm': '' is not a name"),
        (["tail", "--set", "a b"], "'--set': 'a b' is not a name"),
        (["abort", "r" * 65], "ROLLOUT: at most 64 characters, of A-Z a-z 0-9 _ -\n"),
        (["abort", "../r"], "ROLLOUT: at most 64 characters, of A-Z a-z 0-9 _ -\n"),
        (["abort", "--reason", "r" * 4097], "--reason: at most 4096 characters"),
        (["demo", "--method", "kexec"], "need --driver qemu"),
        (["demo", "--driver", "qemu", "--method", "kexec", "--method", "swap"], "--method kexec goes alone"),
        (
            ["demo", "--driver", "qemu", "--method", "kexec", "--vms", "3"],
            "--vms does nothing with --method kexec",
        ),
        (["demo", "--driver", "qemu", "--method", "kexec", "--budget", "9s"], "--budget does nothing"),
        (["demo", "--accel", "kvm"], "--accel needs --driver qemu"),
        (["demo", "--memory", "9999"], "--memory needs --driver qemu"),
        (["demo", "--memory", "160"], "--memory needs --driver qemu"),
        (["demo", "--method", "swap"], "need --driver qemu"),
        (["demo", "--driver", "qemu", "--freezer", "sigstop"], "--freezer needs --driver process"),
        (["demo", "--update-takes", "9s"], "--update-takes 9s: at most 6.17s with --budget 10s"),
        (["demo", "--update-takes", "7s"], "--update-takes 7s: at most 6.17s with --budget 10s"),
        (["demo", "--budget", "0.5s"], "--budget 0.5s leaves no time for an update"),
        (["demo", "--dir", "."], "--dir: . exists already"),
        (["demo", "--dir", __file__], "exists already"),
        (["demo", "--dir", "/proc/none/such"], "--dir: /proc/none/such cannot be created: "),
    ],
)
def test_bad_usage_is_said_with_exit_code_2(
    words: list[str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAESURA_CTL_BROKER_URL", "mqtt://127.0.0.1:1")  # what is found out without a broker
    result = CliRunner().invoke(caesura, words)
    assert (result.exit_code, error in result.output) == (2, True), result.output


@pytest.mark.parametrize(
    ("words", "kind", "reason"),
    [
        (["roll", "--json"], "UsageError", "UPDATE"),
        (["roll", "u", "--budget", "31s", "--json"], "UsageError", "at most 30s"),
        (["freeze", "--json", "--for", "9s"], "UsageError", "say where to freeze"),
        (["demo", "--json", "--memory", "160"], "UsageError", "--memory needs --driver qemu"),
        (["nothing", "--json"], "UsageError", "No such command"),
        (["abort", "--json", "r" * 65], "BadRequest", "ROLLOUT"),
    ],
)
def test_bad_usage_with_json_is_json(words: list[str], kind: str, reason: str) -> None:
    result = CliRunner().invoke(caesura, words)
    assert (result.exit_code, result.stdout) == (2, "")
    told = json.loads(result.stderr)
    assert (told["error"], told["exit_code"]) == (kind, 2)
    assert reason in told["reason"]


def test_a_word_json_that_is_no_option_leaves_usage_errors_as_text() -> None:
    result = CliRunner().invoke(caesura, ["roll", "u", "--nonsense", "--", "--json"])
    assert result.exit_code == 2
    assert "Usage: caesura roll" in result.stderr


@pytest.mark.parametrize("name", ["web", "_cache-01", "_" + "x" * 62])
def test_a_set_can_be_named_as_it_is_shown(name: str) -> None:
    assert SET_NAME.convert(set_name(name), None, None) == name
    assert SET_NAME.convert(name, None, None) == name


def test_a_set_that_is_shown_in_brackets_may_stand_so_in_access_rules() -> None:
    shown = CliRunner().invoke(caesura, ["acl", "vm:cache-01:(cache-01)"])
    plain = CliRunner().invoke(caesura, ["acl", "vm:cache-01:_cache-01"])
    assert (shown.exit_code, shown.output) == (0, plain.output)


def test_a_host_is_bound_to_its_vms_where_they_are_and_one_that_is_not_is_named() -> None:
    bound = CliRunner().invoke(caesura, ["acl", "host:h1:web-1=web/0,c-1=(c-1)", "metadata:m1:web-1"])
    assert (bound.exit_code, bound.stderr) == (0, "")
    assert "topic write caesura/v1/host/h1/set/web/ud/0/vm/web-1/frozen\n" in bound.stdout
    assert "topic write caesura/v1/host/h1/set/_c-1/ud/19/vm/c-1/frozen\n" in bound.stdout
    assert not [line for line in bound.stdout.splitlines() if line.startswith("topic write") and "+" in line]
    endless = CliRunner().invoke(
        caesura, ["acl", "coordinator", "host:h1:web-1", "metadata:fleet", "vm:a:web"]
    )
    assert endless.exit_code == 0
    (said,) = endless.stderr.splitlines()
    assert "host_h1, metadata_fleet" in said
    assert "host:NAME:VM=SET/DOMAIN" in said
    assert "metadata:NAME:VM" in said
    assert "note" not in endless.stdout, "it is the file"


def test_brackets_around_no_name_are_refused() -> None:
    with pytest.raises(click.BadParameter, match="is not a name"):
        SET_NAME.convert("()", None, None)


def test_bad_settings_are_said_with_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAESURA_CTL_BROKER_ULR", "mqtt://x")
    result = CliRunner().invoke(caesura, ["status"])
    assert result.exit_code == 2
    assert "did you mean CAESURA_CTL_BROKER_URL" in result.output


def test_a_vm_without_a_set_may_read_its_own_document_only() -> None:
    result = CliRunner().invoke(caesura, ["acl", "vm:cache-1", "coordinator:standby"])
    assert result.exit_code == 0
    assert "topic read caesura/v1/fleet/set/_cache-1/document" in result.output
    assert "fleet/set/+/document" not in result.output.split("user coordinator_standby")[0]
    assert "user coordinator_standby\ntopic write caesura/v1/fleet/coordinator\n" in result.output
    assert "#" not in result.output.partition("\n")[2], "topics of the table, no subtrees"


@pytest.mark.parametrize("text", ["", "not PEM"])
def test_a_ca_file_that_cannot_be_used_is_named_with_its_variable(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ca.pem"
    if text:
        path.write_text(text)
    monkeypatch.setenv("CAESURA_CTL_BROKER_URL", "mqtts://127.0.0.1:1")
    monkeypatch.setenv("CAESURA_CTL_BROKER_CA_FILE", str(path))
    result = CliRunner().invoke(caesura, ["status"])
    assert result.exit_code == 2, result.output
    assert "CAESURA_CTL_BROKER_CA_FILE" in result.output
    assert str(path) in result.output
    assert "Start it" not in result.output


# -- what failed updates wrote --


def test_what_a_failed_update_wrote_is_shown_and_does_nothing_to_the_terminal() -> None:
    failed = m.FailedUpdate(host="h", outcome="failed", exit_code=3, output_tail="E: no space\n\x1b[2Jdpkg\n")
    wave = msgspec.structs.replace(_wave(0, "failed"), failed_updates=(failed,))
    rollout = _rollout(wave, status="halted")
    written = io.StringIO()
    VisibleConsole(width=80, file=written).print(rollout_view(rollout, FleetView(), T0))
    assert (
        "u on h: failed, exit code 3, last output:\n  E: no space\n  \\u001b[2Jdpkg\n" in written.getvalue()
    )
    lines = Progress().lines(FleetView(), rollout)
    assert "u on h: failed, exit code 3, last output:\n  E: no space\n  \x1b[2Jdpkg" in lines


# -- what is known of pauses --


def _wave(index: int, status: m.WaveStatus) -> m.WaveState:
    vms = (f"w{index}a", f"w{index}b")
    return wave_state(wave=index, status=status, domains={"web": index}, hosts=("h",), vms=vms)


def _rollout(*waves: m.WaveState, status: m.RolloutStatus = "running") -> WholeRollout:
    return whole_rollout(
        rollout="r", update="u", status=status, policy=m.Policy(), sets=("web",), waves=waves, created_at=T0
    )


def _paused(fleet_view: FleetView, vm: str) -> None:
    fleet_view.fold(
        m.OperationReported(operation=vm, host="h", epoch=1, rollout="r", status="accepted", at=T0)
    )
    for message in _resumed(vm, 0, 0.0, 1.0, vm):
        fleet_view.fold(message)


def _so_far(fleet_view: FleetView) -> list[str]:
    """The column "paused so far", a cell a wave."""
    written = io.StringIO()
    Console(width=140, file=written).print(rollout_view(fleet_view.rollouts["r"], fleet_view, T0))
    head = next(line for line in written.getvalue().splitlines() if "paused so far" in line)
    end = head.index("paused so far") + len("paused so far")
    rows = written.getvalue().splitlines()
    return [row[end - 13 : end].strip() for row in rows if " web/" in row]


def test_pauses_that_were_not_heard_are_not_counted_as_none() -> None:
    fleet_view = FleetView()
    fleet_view.fold(_rollout(_wave(0, "completed"), _wave(1, "verifying"), _wave(2, "pending")))
    assert _so_far(fleet_view) == ["-", "-", ""]
    assert not fleet_view.observed_all(fleet_view.rollouts["r"])
    _paused(fleet_view, "w1a")
    assert _so_far(fleet_view) == ["-", "1+/2", ""]
    _paused(fleet_view, "w1b")
    fleet_view.fold(_rollout(_wave(0, "completed"), _wave(1, "completed"), _wave(2, "started")))
    assert _so_far(fleet_view) == ["-", "2/2", "0/2"]


def test_pauses_of_what_was_seen_from_its_beginning_are_counted() -> None:
    fleet_view = FleetView()
    fleet_view.fold(_rollout(_wave(0, "scheduled"), _wave(1, "pending")))
    fleet_view.fold(_rollout(_wave(0, "started"), _wave(1, "pending")))
    assert _so_far(fleet_view) == ["0/2", ""]
    _paused(fleet_view, "w0a")
    assert _so_far(fleet_view) == ["1/2", ""]
    assert fleet_view.observed_all(fleet_view.rollouts["r"])


def test_what_was_missed_while_the_broker_was_away_is_not_counted_as_none() -> None:
    fleet_view = FleetView()
    fleet_view.fold(_rollout(_wave(0, "pending"), _wave(1, "pending")))
    fleet_view.fold(_resumed("w0a", 0, 0.0, 1.0)[0])
    fleet_view.missed()
    assert not fleet_view.frozen, "it may have been resumed meanwhile"
    fleet_view.fold(_rollout(_wave(0, "started"), _wave(1, "pending")))
    assert _so_far(fleet_view) == ["-", ""]
    assert not fleet_view.observed_all(fleet_view.rollouts["r"])
    fleet_view.fold(_rollout(_wave(0, "completed"), _wave(1, "started")))
    assert _so_far(fleet_view) == ["-", "0/2"]


# -- the demo's folder --


def _fail_in_folder(error: Exception, wanted: Path | None = None, *, log: bool = False) -> None:
    with run_folder(wanted) as folder:
        if log:
            (folder / "x.log").write_text("x")
        (folder / "empty").touch()
        raise error


def test_an_error_keeps_its_text_and_its_exit_code_when_the_logs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "_base", lambda: str(tmp_path))
    with pytest.raises(EmbeddedBrokerMissing, match=r"needs amqtt(.|\n)*logs are kept in") as told:
        _fail_in_folder(EmbeddedBrokerMissing(), log=True)
    (kept,) = tmp_path.iterdir()
    assert str(told.value).endswith(f"logs are kept in {kept}")


def test_a_folder_without_a_log_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_base", lambda: str(tmp_path))
    with pytest.raises(EmbeddedBrokerMissing) as told:
        _fail_in_folder(EmbeddedBrokerMissing())
    assert "logs are kept" not in str(told.value)
    with pytest.raises(EmbeddedBrokerMissing):
        _fail_in_folder(EmbeddedBrokerMissing(), tmp_path / "named")
    with pytest.raises(Interrupted):
        _fail_in_folder(Interrupted("interrupted"), log=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_said_with_what_to_do(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "_base", lambda: str(tmp_path))
    folder = tmp_path / "named" if named else None
    with pytest.raises(CaesuraError, match=r"No space left on device: make room there, or .* --dir") as told:
        _fail_in_folder(OSError(errno.ENOSPC, "No space left on device"), folder)
    assert str(folder or tmp_path) in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_a_folder_that_was_asked_for_stays(tmp_path: Path) -> None:
    with pytest.raises(CaesuraError):
        _fail_in_folder(OSError(errno.EACCES, "Permission denied"), tmp_path / "named", log=True)
    assert (tmp_path / "named" / "x.log").exists()


def test_a_demo_without_any_broker_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "_base", lambda: str(tmp_path))
    monkeypatch.setattr("caesura.bus.local_broker.embedded_available", lambda: False)
    result = CliRunner().invoke(caesura, ["demo", "--broker-kind", "embedded"])
    assert result.exit_code == 1
    assert "pip install 'caesura[embedded]'" in result.output
    assert list(tmp_path.iterdir()) == []
