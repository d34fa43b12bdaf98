"""Commands delivered twice and late, and aborts in every state (I5, I9, I10, I11)."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from caesura.contract import messages as m
from caesura_ctl.session import new_request_id


def _capture_commands(pair: Any) -> list[m.StartOperation]:
    """Freeze commands as they pass by on the bus (the session must be subscribed to them)."""
    captured: list[m.StartOperation] = []

    async def listen(received: Any) -> None:
        if isinstance(received.message, m.StartOperation):
            captured.append(received.message)

    pair.session.post.listeners.append(listen)
    return captured


def _command(pair: Any, **changes: Any) -> m.StartOperation:
    """A command as this coordinator would give it."""
    boss = pair.fleet_view.coordinator
    command = m.StartOperation(
        operation=new_request_id(),
        epoch=boss.epoch,
        coordinator=boss.coordinator,
        host="host-1",
        rollout="by-hand",
        wave=0,
        method="freeze",
        targets=(m.OperationTarget(vm="web-1", set="web", update_domain=0),),
        hold_s=1.0,
        budget_s=5.0,
        not_after=datetime.now(UTC) + timedelta(seconds=20),
    )
    return msgspec.structs.replace(command, **changes)


async def _report(pair: Any, operation: str, *statuses: str) -> m.OperationReported:
    await pair.sandbox.until(
        lambda: (
            operation in pair.fleet_view.reports and pair.fleet_view.reports[operation].status in statuses
        ),
        10,
        f"a report {'/'.join(statuses)}",
    )
    report: m.OperationReported = pair.fleet_view.reports[operation]
    return report


async def test_one_command_delivered_twice_freezes_once(pair: Any) -> None:
    command = _command(pair)
    for _ in range(2):
        await pair.session.post.send(command, host="host-1")
    await pair.frozen("web-1")
    await pair.session.post.send(command, host="host-1")
    await _report(pair, command.operation, "completed")
    del pair.fleet_view.reports[command.operation]
    await pair.session.post.send(command, host="host-1")
    again = await _report(pair, command.operation, "completed")
    assert again.vms[0].frozen
    assert len(pair.sandbox.watch.pauses) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epoch": 0}, None),
        ({"not_after": datetime(2026, 1, 1, tzinfo=UTC)}, "not_after"),
        ({"targets": (m.OperationTarget(vm="web-9", set="web", update_domain=0),)}, "web-9"),
        ({"method": "swap"}, "swap"),
        ({"update": "unheard-of", "hold_s": 0.0}, "unheard-of"),
    ],
    ids=["epoch-zero", "expired", "unknown-vm", "method", "unknown-update"],
)
async def test_what_a_host_refuses(changes: dict[str, Any], words: str | None, pair: Any) -> None:
    command = _command(pair, **changes)
    await pair.session.post.send(command, host="host-1")
    if words is None:  # breaks the contract: dropped with a log line, changes nothing
        await pair.sandbox.until(
            lambda: any(each.get("event") == "bus.message_refused" for each in pair.sandbox.events("host-1")),
            10,
            "a log line",
        )
    else:
        report = await _report(pair, command.operation, "refused")
        assert words in report.reason
    assert not pair.sandbox.watch.pauses


async def test_an_older_epoch_is_not_obeyed_after_a_takeover(pair: Any) -> None:
    old = _command(pair)
    await pair.sandbox.kill("coordinator")
    await pair.sandbox.start("coordinator")
    await pair.sandbox.until(lambda: pair.fleet_view.coordinator.epoch == 2, 15, "epoch 2")
    await pair.ready("host-1", "host-2")
    await pair.session.post.send(old, host="host-1")
    # Commands come in order: one that is refused for another reason proves that the old one was looked at.
    late = msgspec.structs.replace(_command(pair), not_after=datetime.now(UTC) - timedelta(seconds=1))
    await pair.session.post.send(late, host="host-1")
    await _report(pair, late.operation, "refused")
    assert not pair.sandbox.watch.pauses
    # The old one's operation came to no end by it: under the epoch that leads it is carried out.
    here = pair.fleet_view.coordinator
    again = msgspec.structs.replace(old, epoch=here.epoch, coordinator=here.coordinator)
    await pair.session.post.send(again, host="host-1")
    await _report(pair, old.operation, "completed")
    assert len(pair.sandbox.watch.pauses) == 1


async def test_who_shares_the_epoch_but_is_not_the_coordinator_is_not_obeyed(pair: Any) -> None:
    await pair.session.post.send(_command(pair, coordinator="somebody-else"), host="host-1")
    await pair.sandbox.until(
        lambda: any(each.get("event") == "command.ignored" for each in pair.sandbox.events("host-1")),
        10,
        "a log line",
    )
    assert not pair.sandbox.watch.pauses


async def test_an_abort_that_overtakes_its_command_prevents_the_pause(pair: Any) -> None:
    command = _command(pair)
    abort = m.AbortOperation(
        operation=command.operation, epoch=command.epoch, coordinator=command.coordinator, host="host-1"
    )
    await pair.session.post.send(abort, host="host-1")
    await _report(pair, command.operation, "cancelled")
    await pair.session.post.send(command, host="host-1")
    # A second operation that completes proves that the first command was handled, and left no trace.
    other = _command(pair)
    await pair.session.post.send(other, host="host-1")
    await _report(pair, other.operation, "completed")
    assert len(pair.sandbox.watch.pauses) == 1
    assert pair.fleet_view.reports[command.operation].status == "cancelled"


@pytest.mark.parametrize("state", ["scheduled", "frozen", "verifying", "soaking"])
async def test_abort_in_each_state(state: str, pair: Any) -> None:
    pair.sandbox.update("patch", ["sleep", "3"], expected_s=3.0)
    pair.notice_s = 2.0
    rollout = await pair.roll(soak_s=4.0)
    async with pair.held_in(state, rollout):
        answer = await pair.session.ask(
            m.AbortRequested(request=new_request_id(), rollout=rollout, reason="test")
        )
    assert answer.accepted, answer.reason
    ended = await pair.ended(rollout)
    assert ended.status == "aborted"
    await pair.none_frozen(timeout_s=3)
    assert "web-2" not in {each.vm for each in pair.sandbox.watch.pauses}
    if state == "scheduled":
        assert not pair.sandbox.watch.pauses
    if state == "frozen":
        assert pair.sandbox.watch.longest_s() < 3.0, "the pause was cut short"
    await pair.sandbox.until(lambda: not pair.fleet_view.documents["web"].events, 5, "document empty")
    await pair.sandbox.until(
        lambda: all(
            facts[-1].status in {"completed", "cancelled", "failed"}
            for facts in pair.fleet_view.events.values()
        ),
        5,
        "every event has its end",
    )
    pair.assert_one_end_each()
    # The set is free again.
    pair.sandbox.update("patch", ["sleep", "0.5"], expected_s=0.5)
    again = await pair.ended(await pair.roll())
    assert again.status == "completed", again.reason
    pair.assert_order()


async def test_a_halted_rollout_can_be_resumed(pair: Any) -> None:
    flag = pair.sandbox.folder / "works"
    pair.sandbox.update("patch", ["test", "-e", str(flag)], expected_s=0.5)
    rollout = await pair.roll()
    assert (await pair.ended(rollout)).status == "halted"
    flag.touch()
    answer = await pair.session.ask(m.ResumeRequested(request=new_request_id()))
    assert answer.accepted, answer.reason
    await pair.sandbox.until(lambda: pair.rollout(rollout).status == "completed", 30, "the rollout completed")
    pair.assert_order()
    pair.assert_one_end_each()


async def test_resume_tells_a_script_one_document(pair: Any) -> None:
    flag = pair.sandbox.folder / "works"
    pair.sandbox.update("patch", ["test", "-e", str(flag)], expected_s=0.5)
    rollout = await pair.roll()
    assert (await pair.ended(rollout)).status == "halted"
    flag.touch()
    command = (sys.executable, "-m", "caesura_ctl", "resume", "--json", "--broker", pair.sandbox.broker.url)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    assert process.returncode == 0
    told = json.loads(printed)
    assert told["rollout"]["rollout"] == rollout
    assert told["rollout"]["status"] == "completed"
