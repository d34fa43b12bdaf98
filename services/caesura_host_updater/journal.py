"""What this host must not forget: the epoch it obeys, its operations, the facts not yet published.

One SQLite file, used by one thread of its own: an fsync on a busy disk must stall neither the event loop
nor a resume. Everything that must be on disk *before* an effect is awaited; the rest is posted in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec

from caesura.contract.envelope import source_of
from caesura.contract.messages import Epoch, OperationReported, StartOperation
from caesura.delivery.message import OutboxMessage, from_body
from caesura.delivery.sqlite_outbox import SCHEMA, OutboxTable
from caesura.runtime.database import Database
from caesura.runtime.errors import CaesuraError, StoreError
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import Worker
from caesura_host_updater.clocks.verdict import ClockCheck
from caesura_host_updater.epoch_authority import EpochAuthority
from caesura_host_updater.inventory.installs import Mark
from caesura_host_updater.operation.state import Operation

KEEP_FINISHED = 1000  # operations whose report is repeated when their command arrives again

_MIGRATIONS = (
    """
    CREATE TABLE authority (one INTEGER PRIMARY KEY CHECK (one = 1), epoch INTEGER NOT NULL, coordinator TEXT NOT NULL);
    CREATE TABLE operation (
      number INTEGER PRIMARY KEY AUTOINCREMENT,
      id TEXT NOT NULL UNIQUE,
      phase TEXT NOT NULL,
      boot_id TEXT NOT NULL DEFAULT '',
      command BLOB,
      state BLOB,
      report BLOB
    );
    CREATE INDEX unfinished ON operation (id) WHERE report IS NULL;
    CREATE TABLE update_process (operation TEXT NOT NULL, pid INTEGER NOT NULL, start_ticks INTEGER NOT NULL);
    CREATE TABLE outbox (number INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL UNIQUE, letter BLOB NOT NULL);
    CREATE TABLE clock_wait (vm TEXT PRIMARY KEY, body BLOB NOT NULL);
    CREATE TABLE verdict (vm TEXT PRIMARY KEY, operation TEXT NOT NULL, letter BLOB NOT NULL);
    """,
    """
    CREATE TABLE installed (name TEXT NOT NULL, vm TEXT NOT NULL, mark BLOB NOT NULL, PRIMARY KEY (name, vm));
    """,
    f"ALTER TABLE outbox RENAME TO outbox_1; {SCHEMA}",
)

_CLOSE_S = 5.0  # s: for what was posted last; what a disk does not write by then is lost as in a crash

T = TypeVar("T")
_log = get_logger("caesura.journal")


class _UnencodedFact(msgspec.Struct, frozen=True):
    """A message as earlier versions kept it: ``type`` is its CloudEvents type, ``body`` its data in JSON."""

    event_id: str
    type: str
    parameters: dict[str, Any]
    body: msgspec.Raw


class JournalEntry(msgspec.Struct, frozen=True):
    """An operation as the journal has it. ``command`` is None for one that was aborted before it arrived."""

    id: str
    phase: str
    boot_id: str
    command: StartOperation | None
    state: Operation | None
    report: OperationReported | None
    update_processes: tuple[tuple[int, int], ...] = ()


class Journal:
    """The synchronous side; raises StoreError from every method."""

    def __init__(self, path: str) -> None:
        self._db = Database(path, _MIGRATIONS)
        self._fleet = "default"
        self.outbox = OutboxTable(self._db)

    def upgrade_outbox(self, fleet: str) -> None:
        """Encode the facts that an earlier version kept unencoded."""
        self._fleet = fleet
        rows = self._db.run("SELECT number, letter FROM outbox_1 ORDER BY number")
        if not rows:
            return
        with self._db.transaction():
            for number, letter in rows:
                if (found := self._encoded(letter)) is not None:  # what cannot be read stays
                    self.outbox.add([found])
                    self._db.run("DELETE FROM outbox_1 WHERE number = ?", number)

    def _encoded(self, letter: bytes) -> OutboxMessage | None:
        try:
            old = msgspec.json.decode(letter, type=_UnencodedFact)
            return from_body(
                old.type,
                old.parameters,
                bytes(old.body),
                source=source_of(self._fleet, "host", old.parameters["host"]),
                event_id=old.event_id,
                at=datetime.now(UTC),
            )
        except (CaesuraError, ValueError, TypeError, KeyError) as error:
            _log.error("outbox.unreadable", store=self._db.path, why=str(error))
            return None

    def authority(self) -> EpochAuthority:
        """The epoch obeyed."""
        rows = self._db.run("SELECT epoch, coordinator FROM authority")
        if not rows:
            return EpochAuthority()
        with self._db.reading("the epoch that this host obeys"):
            epoch, coordinator = rows[0]
            return EpochAuthority(msgspec.convert(epoch, Epoch), msgspec.convert(coordinator, str))

    def obey(self, authority: EpochAuthority) -> None:
        """Hold this authority from now on."""
        with self._db.transaction():
            self._db.run(
                "INSERT INTO authority VALUES (1, ?, ?) ON CONFLICT (one) DO UPDATE SET "
                "epoch = excluded.epoch, coordinator = excluded.coordinator",
                authority.epoch,
                authority.coordinator,
            )

    def forget_authority(self) -> None:
        """Obey nobody: the next epoch that is announced is accepted, whatever it is."""
        with self._db.transaction():
            self._db.run("DELETE FROM authority")

    def accept(
        self, command: StartOperation, state: Operation, boot_id: str, facts: Sequence[OutboxMessage]
    ) -> None:
        """A new operation, before anything of it is done."""
        with self._db.transaction():
            self._db.run(
                "INSERT INTO operation (id, phase, boot_id, command, state) VALUES (?, ?, ?, ?, ?)",
                command.operation,
                state.phase,
                boot_id,
                msgspec.json.encode(command),
                msgspec.json.encode(state),
            )
            self.outbox.add(facts)

    def note(self, state: Operation, facts: Sequence[OutboxMessage] = ()) -> None:
        """The phase of an operation, together with the facts that this makes true."""
        with self._db.transaction():
            self._db.run(
                "UPDATE operation SET phase = ?, state = ? WHERE id = ? AND report IS NULL",
                state.phase,
                msgspec.json.encode(state),
                state.operation,
            )
            self.outbox.add(facts)

    def note_update(self, operation: str, pid: int, start_ticks: int) -> None:
        """A process of the update: killed at the next start if it outlives us."""
        with self._db.transaction():
            self._db.run("INSERT INTO update_process VALUES (?, ?, ?)", operation, pid, start_ticks)

    def finish(
        self,
        report: OperationReported,
        facts: Sequence[OutboxMessage],
        waits: Sequence[ClockCheck] = (),
        marks: Sequence[Mark] = (),
    ) -> None:
        """The one end of an operation; also for one that never began. A second end changes nothing."""
        with self._db.transaction():
            ended = self._db.run(
                "SELECT 1 FROM operation WHERE id = ? AND report IS NOT NULL", report.operation
            )
            for mark in () if ended else marks:
                self._remember(mark)
            self._db.run(
                "INSERT INTO operation (id, phase, report) VALUES (?, 'reported', ?) ON CONFLICT (id) DO UPDATE "
                "SET phase = 'reported', report = excluded.report WHERE report IS NULL",
                report.operation,
                msgspec.json.encode(report),
            )
            self._db.run("DELETE FROM update_process WHERE operation = ?", report.operation)
            self._db.run(
                "DELETE FROM operation WHERE report IS NOT NULL AND number <= "
                "(SELECT max(number) FROM operation) - ?",
                KEEP_FINISHED,
            )
            self.outbox.add(facts)
            for wait in waits:
                self._db.run(
                    "INSERT OR REPLACE INTO clock_wait VALUES (?, ?)", wait.vm, msgspec.json.encode(wait)
                )

    def _remember(self, mark: Mark) -> None:
        self._db.run("DELETE FROM installed WHERE name = ? AND vm = ?", mark.update, mark.vm)
        if mark.succeeded:
            self._db.run(
                "INSERT INTO installed VALUES (?, ?, ?)", mark.update, mark.vm, msgspec.json.encode(mark)
            )

    def installed(self) -> list[Mark]:
        """The updates that succeeded here last, by update and VM."""
        rows = self._db.run("SELECT mark FROM installed ORDER BY name, vm")
        with self._db.reading("an update that succeeded here"):
            return [msgspec.json.decode(row[0], type=Mark) for row in rows]

    def find(self, operation: str) -> JournalEntry | None:
        """What is known of an operation."""
        rows = self._db.run(
            "SELECT id, phase, boot_id, command, state, report FROM operation WHERE id = ?", operation
        )
        return self._entry(rows[0]) if rows else None

    def unfinished(self) -> list[JournalEntry]:
        """Operations without an end."""
        rows = self._db.run(
            "SELECT id, phase, boot_id, command, state, report FROM operation WHERE report IS NULL ORDER BY number"
        )
        return [self._entry(row) for row in rows]

    def _entry(self, row: tuple[str, str, str, bytes | None, bytes | None, bytes | None]) -> JournalEntry:
        name, phase, boot_id, command, state, report = row
        processes = self._db.run("SELECT pid, start_ticks FROM update_process WHERE operation = ?", name)
        with self._db.reading(f"operation {name}"):
            return JournalEntry(
                name,
                phase,
                boot_id,
                None if command is None else msgspec.json.decode(command, type=StartOperation),
                None if state is None else msgspec.json.decode(state, type=Operation),
                None if report is None else msgspec.json.decode(report, type=OperationReported),
                msgspec.convert(processes, tuple[tuple[int, int], ...]),
            )

    # -- clock waits ---------------------------------------------------------------------------------------

    def clock_waits(self) -> list[ClockCheck]:
        """VMs whose clock is not judged yet."""
        rows = self._db.run("SELECT body FROM clock_wait")
        with self._db.reading("a clock that was not judged yet"):
            return [msgspec.json.decode(row[0], type=ClockCheck) for row in rows]

    def judged(self, vm: str, operation: str, facts: Sequence[OutboxMessage]) -> None:
        """A VM's clock was judged. The verdict on the VM's newest operation is kept, to be published again."""
        with self._db.transaction():
            for fact in facts:
                self._db.run(
                    "INSERT OR REPLACE INTO verdict VALUES (?, ?, ?)",
                    vm,
                    operation,
                    msgspec.json.encode(fact),
                )
            self._db.run(
                "DELETE FROM clock_wait WHERE vm = ? AND json_extract(body, '$.operation') = ?", vm, operation
            )
            self.outbox.add(facts)

    def verdicts(self, operation: str) -> list[OutboxMessage]:
        """The verdicts on the clocks of an operation's VMs, where no newer operation touched them."""
        rows = self._db.run("SELECT letter FROM verdict WHERE operation = ? ORDER BY vm", operation)
        with self._db.reading(f"the clocks of operation {operation}"):
            found = [self._verdict(letter) for (letter,) in rows]
        return [each for each in found if each is not None]

    def _verdict(self, letter: bytes) -> OutboxMessage | None:
        try:
            return msgspec.json.decode(letter, type=OutboxMessage)
        except msgspec.ValidationError:
            return self._encoded(letter)  # kept by an earlier version

    def ping(self) -> str:
        """For the health probe."""
        return self._db.ping()

    def close(self) -> None:
        """Close the file."""
        self._db.close()


class JournalThread:
    """The journal and its thread."""

    def __init__(self) -> None:
        self._worker = Worker("journal")
        self._journal: Journal | None = None
        self.trouble = ""
        """Why the last write failed; empty when it succeeded."""

    async def open(self, path: str, fleet: str = "default") -> None:
        """Open the file. Raises StoreError."""

        def opened() -> Journal:
            journal = Journal(path)
            journal.upgrade_outbox(fleet)
            return journal

        self._journal = await self._worker.do(opened)

    async def do(self, work: Callable[[Journal], T]) -> T:
        """Run ``work`` after everything posted before and wait for it. Raises StoreError."""
        journal = self._opened()
        try:
            result = await self._worker.do(lambda: work(journal))
        except StoreError as error:
            self.trouble = str(error)
            raise
        self.trouble = ""
        return result

    async def outbox(self, work: Callable[[OutboxTable], T]) -> T:
        """``do`` with the facts that are not published yet."""
        return await self.do(lambda journal: work(journal.outbox))

    def post(self, work: Callable[[Journal], None]) -> None:
        """Run ``work`` later, in order; a failure is logged and shows in ``trouble``."""
        journal = self._opened()

        def attempt() -> None:
            try:
                work(journal)
            except StoreError as error:
                self.trouble = str(error)
                _log.error("journal.write_failed", why=str(error))

        self._worker.post(attempt)

    async def close(self) -> None:
        """Complete what was posted, close the file and the thread; one that hangs on a disk is not awaited longer."""
        journal, self._journal = self._journal, None
        if journal is not None:
            self._worker.post(journal.close)
        if not await self._worker.close(_CLOSE_S):
            _log.error("journal.not_closed", why=f"the disk does not answer within {_CLOSE_S:g} s")

    def _opened(self) -> Journal:
        if self._journal is None:
            raise StoreError("the journal is not open")
        return self._journal
