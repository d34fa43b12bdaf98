"""The journal and the outbox: what is kept, in which order it is told, and what a repeat looks like."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.port import Bus, BusUnavailable, PublishRefused
from caesura.contract.codec import decode
from caesura.contract.messages import (
    EPOCH_MOST,
    AgentClockSynced,
    OperationReported,
    OperationTarget,
    StartOperation,
    VmClockSynced,
    VmFrozen,
)
from caesura.delivery.message import OutboxMessage
from caesura.delivery.sqlite_outbox import OutboxTable
from caesura.runtime.errors import StoreError
from caesura.runtime.lock import InUse, StateFolderUnusable
from caesura_host_updater import journal as module
from caesura_host_updater.__main__ import _only_one
from caesura_host_updater.clocks.tracker import ClockSyncTracker
from caesura_host_updater.clocks.verdict import ClockCheck
from caesura_host_updater.epoch_authority import EpochAuthority
from caesura_host_updater.forget_epoch import forget_epoch
from caesura_host_updater.journal import Journal, JournalThread
from caesura_host_updater.operation.facts import FactFactory
from caesura_host_updater.operation.finalizer import OperationFinalizer
from caesura_host_updater.operation.pause_deadlines import PauseDeadlines
from caesura_host_updater.operation.state import Operation, VmPause
from caesura_host_updater.outbox import Outbox
from caesura_testing.collector import PATIENCE_S, Collector, eventually, running
from caesura_testing.damage import flip_bits
from caesura_testing.patience import patient

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LETTERS = FactFactory("host-1")


def report_letter(report: OperationReported) -> OutboxMessage:
    """The one message of a report that fits into one."""
    (only,) = LETTERS.report(report)
    return only


def report(operation: str, status: Any = "completed") -> OperationReported:
    """An end."""
    return OperationReported(operation=operation, host="host-1", epoch=1, status=status, at=NOW)


def frozen(operation: str) -> VmFrozen:
    """A fact."""
    return VmFrozen(
        vm="a",
        host="host-1",
        set="web",
        update_domain=0,
        operation=operation,
        method="freeze",
        budget_s=1.0,
        at=NOW,
    )


def command(operation: str) -> StartOperation:
    """A command."""
    return StartOperation(
        operation=operation,
        epoch=1,
        coordinator="c",
        host="host-1",
        rollout="r",
        wave=0,
        method="freeze",
        targets=(OperationTarget(vm="a", set="web", update_domain=0),),
        budget_s=1.0,
        not_after=NOW + timedelta(days=1),
    )


def state(operation: str) -> Operation:
    """Its state."""
    vms = (VmPause(vm="a", set="web", update_domain=0, called_at=1.5),)
    return Operation(operation=operation, method="freeze", budget_s=1.0, vms=vms)


def test_an_operation_survives_with_its_state_and_ends_once(tmp_path: Path) -> None:
    path = str(tmp_path / "journal.sqlite")
    first = Journal(path)
    first.accept(command("op"), state("op"), "boot", [report_letter(report("op", "accepted"))])
    first.note_update("op", 12, 34)
    first.close()
    again = Journal(path)
    (entry,) = again.unfinished()
    assert (entry.id, entry.boot_id, entry.update_processes) == ("op", "boot", ((12, 34),))
    assert entry.state == state("op")
    assert entry.command == command("op")
    again.finish(report("op"), [report_letter(report("op"))], [ClockCheck("a", "web", 0, "op", 0.1)])
    again.finish(report("op", "failed"), [])
    again.note(state("op"))
    found = again.find("op")
    assert found is not None
    assert found.report == report("op")
    assert found.update_processes == ()
    assert again.unfinished() == []
    assert [letter.event_id for letter in again.outbox.load()] == [
        report_letter(report("op", "accepted")).event_id,
        report_letter(report("op")).event_id,
    ]
    assert [wait.vm for wait in again.clock_waits()] == ["a"]
    again.judged("a", "other", [])
    assert len(again.clock_waits()) == 1
    again.judged("a", "op", [])
    assert again.clock_waits() == []
    again.close()


def test_the_same_operation_cannot_be_accepted_twice() -> None:
    journal = Journal(":memory:")
    journal.accept(command("op"), state("op"), "boot", [])
    with pytest.raises(StoreError):
        journal.accept(command("op"), state("op"), "boot", [])
    journal.close()


def test_old_ends_are_forgotten_but_never_what_is_open() -> None:
    journal = Journal(":memory:")
    journal.accept(command("open"), state("open"), "boot", [])
    for number in range(module.KEEP_FINISHED + 5):
        journal.finish(report(f"op-{number}"), [])
    assert journal.find("op-0") is None
    assert journal.find(f"op-{module.KEEP_FINISHED + 4}") is not None
    assert journal.find("open") is not None
    journal.close()


def test_authority() -> None:
    journal = Journal(":memory:")
    assert journal.authority() == EpochAuthority()
    journal.obey(EpochAuthority(3, "c"))
    journal.obey(EpochAuthority(4, "d"))
    assert journal.authority() == EpochAuthority(4, "d")
    journal.close()


@pytest.fixture
async def thread(tmp_path: Path) -> AsyncIterator[JournalThread]:
    """A journal in its thread."""
    made = JournalThread()
    await made.open(str(tmp_path / "journal.sqlite"))
    yield made
    await made.close()


async def test_letters_are_told_in_order_after_the_broker_was_away(thread: JournalThread) -> None:
    broker = MemoryBroker()
    ear = Collector()
    bus = MemoryBus(broker, client_id="host")
    told: list[str] = []
    outbox = Outbox(bus, thread, lambda fact: told.append(fact.event_id))
    letters = [report_letter(report(f"op-{number}")) for number in range(5)]
    async with (
        running(MemoryBus(broker, client_id="ear", filters=["caesura/v1/#"]), ear.receive),
        running(bus),
    ):
        broker.down()
        for letter in letters:
            outbox.put(letter, state("op"))
        sending = asyncio.create_task(outbox.run())
        assert not await outbox.drained(0.05)
        assert [letter.event_id for letter in await thread.outbox(OutboxTable.load)] == [
            letter.event_id for letter in letters
        ]
        broker.up()
        assert await outbox.drained(patient(10))
        await ear.until(lambda deliveries: len(deliveries) >= 5)
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
    assert told == [letter.event_id for letter in letters]
    heard = [decode(each.topic, each.payload).header.id for each in ear.deliveries]
    assert list(dict.fromkeys(heard)) == told
    assert await thread.outbox(OutboxTable.load) == []


@pytest.mark.parametrize(
    "why_not", [BusUnavailable("nobody answers"), PublishRefused("caesura/v1/host/host-1", "not authorized")]
)
async def test_a_fact_that_the_broker_did_not_take_is_kept_and_sent_again_before_newer_ones(
    why_not: Exception, thread: JournalThread
) -> None:
    sent: list[str] = []
    refusals = 3

    class Unwilling:
        async def wait_connected(self, _: float) -> bool:
            return True

        async def publish(self, topic: str, payload: bytes, **_: Any) -> None:
            nonlocal refusals
            if refusals:
                refusals -= 1
                kept = [letter.event_id for letter in await thread.outbox(OutboxTable.load)]
                assert kept == wanted, "forgotten before the broker had it"
                raise why_not
            sent.append(decode(topic, payload).header.id)

    told: list[str] = []
    outbox = Outbox(cast("Bus", Unwilling()), thread, lambda fact: told.append(fact.event_id), retry_s=0.01)
    letters = [report_letter(report(f"op-{number}")) for number in range(2)]
    wanted = [letter.event_id for letter in letters]
    for letter in letters:
        outbox.put(letter, state("op"))
    sending = asyncio.create_task(outbox.run())
    await eventually(lambda: not len(outbox))
    assert await outbox.drained(PATIENCE_S)
    sending.cancel()
    with suppress(asyncio.CancelledError):
        await sending
    assert sent == told == wanted
    assert await thread.outbox(OutboxTable.load) == []


async def test_unsendable_letter_does_not_hold_up_the_others(thread: JournalThread) -> None:
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="host")
    told: list[str] = []
    outbox = Outbox(bus, thread, lambda fact: told.append(fact.event_id))
    good = report_letter(report("op"))
    async with running(bus):
        outbox.queue(
            OutboxMessage(event_id="bad", type="caesura.no-such.v1", topic="not/#/a topic", payload=b""), good
        )
        sending = asyncio.create_task(outbox.run())
        assert await outbox.drained(patient(10))
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
    assert told == [good.event_id]


async def test_a_fact_that_the_broker_refuses_does_not_hold_up_the_others(thread: JournalThread) -> None:
    """The access rules miss a topic: all others are published, and nothing of the refused one is lost or out of order."""
    allowed = asyncio.Event()
    broker = MemoryBroker(may_publish=lambda _, topic: allowed.is_set() or not topic.endswith("/frozen"))
    ear = Collector()
    bus = MemoryBus(broker, client_id="host")
    outbox = Outbox(bus, thread, lambda _: None, retry_s=0.01)
    facts = [LETTERS.fact(frozen(f"op-{number}")) for number in range(3)]
    ends = [report_letter(report(f"op-{number}")) for number in range(3)]
    async with (
        running(MemoryBus(broker, client_id="ear", filters=["caesura/v1/#"]), ear.receive),
        running(bus),
    ):
        for fact, end in zip(facts, ends, strict=True):
            outbox.put(fact, state("op"))
            outbox.put(end, state("op"))
        sending = asyncio.create_task(outbox.run())
        await ear.until(lambda deliveries: len(deliveries) == 3)
        assert not await outbox.drained(PATIENCE_S), "what is refused is left"
        assert [decode(each.topic, each.payload).header.id for each in ear.deliveries] == [
            each.event_id for each in ends
        ]
        assert await thread.outbox(OutboxTable.load) == facts
        assert (len(outbox), outbox.refused) == (3, 3)
        assert "/frozen" in outbox.ping()
        assert "access rules" in outbox.ping()
        allowed.set()
        await ear.until(lambda deliveries: len(deliveries) == 6)
        assert await outbox.drained(PATIENCE_S)
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
    assert [decode(each.topic, each.payload).header.id for each in ear.deliveries][3:] == [
        each.event_id for each in facts
    ]
    assert (len(outbox), outbox.refused, outbox.ping()) == (0, 0, "")
    assert await thread.outbox(OutboxTable.load) == []


async def test_facts_that_a_version_of_before_kept_are_published(tmp_path: Path) -> None:
    """Its outbox and its verdicts held the data of a message; the event's id stays the same."""
    path = tmp_path / "journal.sqlite"
    fresh = Journal(str(path))
    fresh.close()
    one, two = report("op-1"), report("op-2")

    def letter(message: OperationReported) -> bytes:
        return msgspec.json.encode(
            {
                "event_id": report_letter(message).event_id,
                "type": message.TYPE,
                "parameters": {"host": "host-1"},
                "body": message,
            }
        )

    with sqlite3.connect(path) as old:
        old.executescript(
            "DROP TABLE outbox; DROP TABLE outbox_1; PRAGMA user_version=2;"
            "CREATE TABLE outbox (number INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL UNIQUE, letter BLOB NOT NULL);"
        )
        old.execute("INSERT INTO outbox (event_id, letter) VALUES ('1', ?)", (letter(one),))
        old.execute("INSERT INTO outbox (event_id, letter) VALUES ('x', '{\"damaged\": true}')")
        old.execute("INSERT INTO verdict VALUES ('a', 'op-2', ?)", (letter(two),))
    old.close()
    thread = JournalThread()
    for _ in range(2):
        await thread.open(str(path), "blue")
        (kept,) = await thread.outbox(OutboxTable.load)
        (verdict,) = await thread.do(lambda journal: journal.verdicts("op-2"))
        await thread.close()
        for message, said in ((kept, one), (verdict, two)):
            received = decode(message.topic, message.payload)
            assert received.message == said
            assert received.header.id == message.event_id == report_letter(said).event_id
            assert received.header.source == "/caesura/blue/host/host-1"
    with closing(sqlite3.connect(path)) as left:
        kept_aside = left.execute("SELECT event_id FROM outbox_1").fetchall()
    assert kept_aside == [("x",)], "what cannot be read is not lost"


async def test_broken_journal_says_so(tmp_path: Path) -> None:
    thread = JournalThread()
    with pytest.raises(StoreError, match="not open"):
        await thread.do(Journal.authority)
    (tmp_path / "journal.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreError, match="cannot open the store"):
        await thread.open(str(tmp_path / "journal.sqlite"))
    await thread.close()


def test_the_newest_verdict_on_each_clock_is_kept_for_whoever_missed_it(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal.sqlite"))
    one = OutboxMessage(event_id="e1", type="t", topic="a", payload=b"{}")
    two = OutboxMessage(event_id="e2", type="t", topic="a", payload=b"{}")
    journal.judged("web-1", "first", [one])
    assert [each.event_id for each in journal.verdicts("first")] == ["e1"]
    journal.judged("web-1", "second", [two])
    assert journal.verdicts("first") == []
    assert [each.event_id for each in journal.verdicts("second")] == ["e2"]
    journal.close()


async def test_a_clock_that_was_judged_before_its_report_could_be_written_is_not_waited_for_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would answer for it then, and a VM that is right would loudly be flagged as unsynced."""
    monkeypatch.setattr("caesura_host_updater.operation.finalizer._SAVE_RETRY_S", 0.01)
    thread = JournalThread()
    await thread.open(str(tmp_path / "journal.sqlite"))
    driver: Any = SimpleNamespace(capabilities=lambda _: SimpleNamespace(clock="none"))

    def judged(verdict: VmClockSynced) -> None:
        thread.post(lambda journal: journal.judged(verdict.vm, verdict.operation, []))

    clocks = ClockSyncTracker(
        "host-1", driver, has_agent=lambda _: True, timeout_s=60, verdict=judged, repeat=lambda _: None
    )
    nothing: Any = SimpleNamespace(queue=lambda *_: None, finished=lambda *_: None)
    finalizer = OperationFinalizer(LETTERS, journal=thread, outbox=nothing, clocks=clocks, metrics=nothing)

    def full(*_: object) -> None:
        raise StoreError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", full)
        await finalizer.finalize(report("op"), None, [ClockCheck("a", "web", 0, "op", 0.1, "b")])
    clocks.answered(
        AgentClockSynced(
            vm="a",
            operation="op",
            trigger="resume",
            synced=True,
            error_after_s=0.0,
            uncertainty_s=0.0,
            boot_id="b",
        )
    )
    judging = asyncio.create_task(clocks.run())
    assert await clocks.wait_all_judged(patient(5))
    saving = asyncio.create_task(finalizer.retry_unsaved())
    async with asyncio.timeout(patient(5)):
        while await thread.do(lambda journal: journal.find("op")) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert await thread.do(Journal.clock_waits) == []
    for task in (judging, saving):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await thread.close()


def test_a_journal_with_a_flipped_bit_is_a_store_error_and_no_other(ram_path: Path) -> None:
    path = ram_path / "journal.sqlite"
    first = Journal(str(path))
    first.obey(EpochAuthority(7, "c"))
    first.accept(command("op"), state("op"), "boot", [report_letter(report("op", "accepted"))])
    first.note_update("op", 12, 34)
    first.finish(report("op2"), [report_letter(report("op2"))], [ClockCheck("a", "web", 0, "op", 0.1)])
    first.judged("b", "op", [report_letter(report("op2"))])
    first.close()

    def read_all() -> None:
        journal = Journal(str(path))
        try:
            journal.authority()
            journal.find("op2")
            journal.unfinished()
            journal.outbox.load()
            journal.clock_waits()
            journal.verdicts("op")
        finally:
            journal.close()

    refused = flip_bits(path, read_all)
    assert "cannot be read" in " ".join(refused)
    assert all(str(path) in each for each in refused), "the file is named"


def test_a_host_can_be_made_to_forget_whom_it_obeys_while_it_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(StateFolderUnusable, match=r"holds no journal\.sqlite"):
        forget_epoch(tmp_path)
    journal = Journal(str(tmp_path / "journal.sqlite"))
    journal.obey(EpochAuthority(EPOCH_MOST, "x"))
    journal.finish(report("op"), [])
    journal.close()
    with _only_one(tmp_path), pytest.raises(InUse, match="stop it first"):
        forget_epoch(tmp_path)
    assert forget_epoch(tmp_path) == EpochAuthority(EPOCH_MOST, "x")
    again = Journal(str(tmp_path / "journal.sqlite"))
    assert again.authority() == EpochAuthority()
    assert again.find("op") is not None, "all else stays"
    again.close()


def test_deadlines_in_a_journal_keep_their_name_of_0_1() -> None:
    """Else an updater that was upgraded in the middle of a pause would not know when it must have ended."""
    op = Operation(
        operation="op", method="freeze", budget_s=10.0, vms=(), deadlines=PauseDeadlines.of(100.0, 10.0)
    )
    stored = msgspec.json.encode(op)
    assert msgspec.json.decode(stored)["schedule"] == {"started_at": 100.0, "budget_s": 10.0, "margin_s": 1.0}
    assert msgspec.json.decode(stored, type=Operation) == op
