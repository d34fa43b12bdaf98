"""The coordinator's durable state: epoch, rollouts, documents, answers, and the outbox.

Changes are saved in one transaction with the messages that announce them (a transactional
outbox): after a crash nothing was announced that is not stored, and nothing stored stays unannounced. Messages are
encoded here, once; ``stored`` passes them to the publisher once their transaction is on disk, and not before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec

from caesura.contract.codec import ContractError
from caesura.contract.envelope import Message, source_of
from caesura.contract.messages import Epoch, PlannedVm, RequestAnswered, SetDocument
from caesura.contract.names import Name
from caesura.contract.topics import TopicError
from caesura.delivery.message import OutboxMessage, clearing, from_body, is_state, prepare
from caesura.delivery.sqlite_outbox import SCHEMA, OffLoop, OutboxTable, SqliteOutbox
from caesura.runtime.commits import DurableCommits
from caesura.runtime.database import Database
from caesura.runtime.errors import CaesuraError
from caesura.runtime.identity import new_id
from caesura.runtime.logs import get_logger
from caesura_coordinator.records import (
    AgentReadiness,
    ClockVerdict,
    HostOperation,
    Rollout,
    Wave,
    WaveEvent,
    without_waves,
)

MIGRATIONS = (
    """
    CREATE TABLE epoch (value INTEGER NOT NULL);
    INSERT INTO epoch VALUES (0);
    CREATE TABLE rollout (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, body BLOB NOT NULL);
    CREATE TABLE wave (
        rollout TEXT NOT NULL, number INTEGER NOT NULL, body BLOB NOT NULL,
        PRIMARY KEY (rollout, number)
    );
    CREATE TABLE document (set_name TEXT PRIMARY KEY, body BLOB NOT NULL);
    CREATE TABLE answer (
        number INTEGER PRIMARY KEY AUTOINCREMENT, client TEXT NOT NULL, request TEXT NOT NULL, body BLOB NOT NULL,
        UNIQUE (client, request)
    );
    CREATE TABLE outbox (
        number INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL, type TEXT NOT NULL,
        parameters TEXT NOT NULL, body BLOB NOT NULL
    );
    """,
    "CREATE TABLE owner (vm TEXT PRIMARY KEY, host TEXT NOT NULL, epoch INTEGER NOT NULL);",
    f"ALTER TABLE outbox RENAME TO outbox_1; {SCHEMA}",
    """
    CREATE TABLE wave_vms (
        rollout TEXT NOT NULL, number INTEGER NOT NULL, body BLOB NOT NULL,
        PRIMARY KEY (rollout, number)
    );
    CREATE TABLE wave_part (
        row INTEGER PRIMARY KEY AUTOINCREMENT,
        rollout TEXT NOT NULL, number INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL,
        UNIQUE (rollout, number, kind, name)
    );
    """,
)
_READY, _CLOCK, _OPERATION, _APPROVED = "ready", "clock", "operation", "approved"
"""The parts of a wave stored by VM (its agent's answer, its clock), by the index of a host's operation, and by the id of an approved event."""
_T = TypeVar("_T")

_ANSWERS_KEPT = 1000
_ANSWERS_KEPT_BYTES = 64 * 1024 * 1024
"""A plan for 10,000 VMs has some 4 MB."""

_log = get_logger("caesura.coordinator")


class CoordinatorStore:
    """See the module. Raises StoreError from every method when the disk or the file refuses."""

    def __init__(self, path: str, *, any_thread: bool = False) -> None:
        self.database = Database(path, MIGRATIONS, any_thread=any_thread)
        self.outbox = OutboxTable(self.database)
        self._source = source_of("default", "coordinator")
        self.left_over = 0
        """Messages that a previous run did not publish and the publisher has not loaded yet."""
        self._fresh: list[OutboxMessage] = []
        self._stored: deque[tuple[int, OutboxMessage]] = deque()
        """Committed messages, each with the number of its commit."""
        self._writing = False

    def write_as(self, source: str) -> None:
        """Encode messages with this CloudEvents source, including those that an earlier version left unencoded."""
        self._source = source
        self._upgrade_outbox()
        self.left_over = self.outbox.count()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, including the messages enqueued in it; see ``Database.transaction``."""
        self._fresh = []
        self._writing = True
        try:
            with self.database.transaction():
                yield
        finally:
            self._writing = False
        self._stored.extend((self.database.commits, each) for each in self._fresh)

    def stored(self, on_disk: int) -> list[OutboxMessage]:
        """The messages enqueued by the first ``on_disk`` commits and not returned before, oldest first; of a retained topic only the newest.

        An older one is no longer in the table. Passed after a newer one that was loaded from there, it would cause that one's removal.
        """
        stored = []
        while self._stored and self._stored[0][0] <= on_disk:
            stored.append(self._stored.popleft()[1])
        newest = {each.topic: each.event_id for each in stored if each.retain}
        return [each for each in stored if not each.retain or newest[each.topic] == each.event_id]

    @property
    def unread(self) -> int:
        """How many messages were committed and not returned by ``stored``."""
        return len(self._stored)

    def epoch(self) -> int:
        """The last epoch claimed from this store."""
        with self.database.reading("the epoch"):
            ((value,),) = self.database.run("SELECT value FROM epoch")
            return msgspec.convert(value, Epoch)

    def save_epoch(self, epoch: int) -> None:
        """Store a claimed epoch before it is used."""
        with self.transaction():
            self.database.run("UPDATE epoch SET value = ?", epoch)

    def rollouts(self) -> list[Rollout]:
        """Every rollout kept, oldest first."""
        vms = {
            (name, number): self._read(body, tuple[PlannedVm, ...], f"the VMs of a wave of rollout {name}")
            for name, number, body in self.database.run("SELECT rollout, number, body FROM wave_vms")
        }
        parts: dict[tuple[str, int], dict[str, dict[str, bytes]]] = {}
        rows = self.database.run("SELECT rollout, number, kind, name, body FROM wave_part ORDER BY row")
        for name, number, kind, part, body in rows:
            parts.setdefault((name, number), {}).setdefault(kind, {})[part] = body
        waves: dict[str, list[Wave]] = {}
        for name, number, body in self.database.run(
            "SELECT rollout, number, body FROM wave ORDER BY rollout, number"
        ):
            wave = self._read(body, Wave, f"a wave of rollout {name}")
            if (name, number) in vms:
                wave = self._whole(wave, vms[name, number], parts.get((name, number), {}), name)
            waves.setdefault(name, []).append(wave)
        return [
            msgspec.structs.replace(
                self._read(body, Rollout, f"rollout {name}"), waves=tuple(waves.get(name, ()))
            )
            for name, body in self.database.run("SELECT id, body FROM rollout ORDER BY number")
        ]

    def _whole(
        self, wave: Wave, vms: tuple[PlannedVm, ...], parts: Mapping[str, Mapping[str, bytes]], name: str
    ) -> Wave:
        what = f"a wave of rollout {name}"
        operations = {
            place: self._read(body, HostOperation, what) for place, body in parts.get(_OPERATION, {}).items()
        }
        approved = {
            event: self._read(body, WaveEvent, what) for event, body in parts.get(_APPROVED, {}).items()
        }
        events = tuple(
            msgspec.structs.replace(
                each,
                approved_by=approved[each.event_id].approved_by,
                approved_at=approved[each.event_id].approved_at,
            )
            if each.event_id in approved and not each.approved_by
            else each
            for each in wave.events
        )
        return msgspec.structs.replace(
            wave,
            vms=vms,
            events=events,
            readiness={
                vm: self._read(body, AgentReadiness, what) for vm, body in parts.get(_READY, {}).items()
            },
            clocks={vm: self._read(body, ClockVerdict, what) for vm, body in parts.get(_CLOCK, {}).items()},
            operations=tuple(operations[place] for place in sorted(operations)),
        )

    def save_rollout(self, rollout: Rollout, before: Rollout | None = None) -> None:
        """Insert or replace. Call inside a transaction.

        A message about one VM writes only its changes, not the whole wave: the state of each VM and host has a row of its own.

        Args:
            before: the last saved version; parts of it that are the same objects are not written again.
        """
        if before is None or without_waves(before) != without_waves(rollout):
            self.database.run(
                "INSERT INTO rollout (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
                rollout.id,
                msgspec.json.encode(without_waves(rollout)),
            )
        old = before.waves if before is not None else (None,) * len(rollout.waves)
        for wave, known in zip(rollout.waves, old, strict=True):
            if wave is not known:
                self._save_wave(rollout.id, wave, known)

    def _save_wave(self, rollout: str, wave: Wave, before: Wave | None) -> None:
        stored = before is not None and self.database.run(
            "SELECT 1 FROM wave_vms WHERE rollout = ? AND number = ?", rollout, wave.index
        )
        if not stored:
            before = None  # a new one, or one that an earlier version wrote in one row
            body = msgspec.json.encode(wave.vms)
            self.database.run("INSERT INTO wave_vms VALUES (?, ?, ?)", rollout, wave.index, body)
        approved = _newly_approved(before, wave)
        if approved:
            self._save_parts(rollout, wave.index, _APPROVED, {}, approved)
            before = msgspec.structs.replace(before, events=wave.events) if before is not None else None
        if before is None or _bare_wave(before) != _bare_wave(wave):
            body = msgspec.json.encode(_bare_wave(wave))
            self.database.run("INSERT OR REPLACE INTO wave VALUES (?, ?, ?)", rollout, wave.index, body)
        parts: tuple[tuple[str, dict[str, Any], dict[str, Any] | None], ...] = (
            (_READY, wave.readiness, before.readiness if before else None),
            (_CLOCK, wave.clocks, before.clocks if before else None),
        )
        for kind, now, known in parts:
            if now is not known:
                self._save_parts(rollout, wave.index, kind, now, newer_entries(known, now))
        if before is None or wave.operations is not before.operations:
            numbered = {f"{place:06}": each for place, each in enumerate(wave.operations)}
            newer = None
            if before is not None and len(before.operations) == len(wave.operations):
                pairs = zip(numbered.items(), before.operations, strict=True)
                newer = {place: each for (place, each), known in pairs if each is not known}
            self._save_parts(rollout, wave.index, _OPERATION, numbered, newer)

    def _save_parts(
        self,
        rollout: str,
        wave: int,
        kind: str,
        every: Mapping[str, object],
        newer: Mapping[str, object] | None,
    ) -> None:
        """Write the newer entries; if they are not known, replace all."""
        if newer is None:
            self.database.run(
                "DELETE FROM wave_part WHERE rollout = ? AND number = ? AND kind = ?", rollout, wave, kind
            )
        for name, part in (every if newer is None else newer).items():
            self.database.run(
                "INSERT OR REPLACE INTO wave_part (rollout, number, kind, name, body) VALUES (?, ?, ?, ?, ?)",
                rollout,
                wave,
                kind,
                name,
                msgspec.json.encode(part),
            )

    def forget(self, rollouts: Iterable[str]) -> None:
        """Drop these rollouts."""
        with self.transaction():
            for name in rollouts:
                for table in ("wave", "wave_vms", "wave_part"):
                    self.database.run(f"DELETE FROM {table} WHERE rollout = ?", name)  # noqa: S608 - our own three
                self.database.run("DELETE FROM rollout WHERE id = ?", name)

    def forget_parts(self, rollout: str) -> None:
        """Drop what is stored of each VM and host in the waves of a rollout that has ended."""
        with self.transaction():
            self.database.run("DELETE FROM wave_part WHERE rollout = ?", rollout)

    def documents(self) -> dict[str, SetDocument]:
        """The document of every set that ever had an event."""
        rows = self.database.run("SELECT set_name, body FROM document")
        return {name: self._read(body, SetDocument, f"the document of set {name}") for name, body in rows}

    def save_document(self, document: SetDocument) -> None:
        """Insert or replace."""
        self.database.run(
            "INSERT INTO document VALUES (?, ?) ON CONFLICT (set_name) DO UPDATE SET body = excluded.body",
            document.set,
            msgspec.json.encode(document),
        )

    def owners(self) -> dict[str, tuple[str, int]]:
        """Maps a VM to the host that it belongs to and the epoch of the record."""
        with self.database.reading("the owner of a VM"):
            rows = self.database.run("SELECT vm, host, epoch FROM owner")
            return {
                msgspec.convert(vm, Name): (msgspec.convert(host, Name), msgspec.convert(epoch, Epoch))
                for vm, host, epoch in rows
            }

    def save_owner(self, vm: str, host: str | None, epoch: int) -> None:
        """Insert or replace, or without a host remove. Call inside a transaction."""
        if host is None:
            self.database.run("DELETE FROM owner WHERE vm = ?", vm)
        else:
            self.database.run(
                "INSERT INTO owner VALUES (?, ?, ?) ON CONFLICT (vm) DO UPDATE SET host = excluded.host, epoch = excluded.epoch",
                vm,
                host,
                epoch,
            )

    def answer(self, client: str, request: str) -> RequestAnswered | None:
        """The earlier answer to this request of this client."""
        rows = self.database.run("SELECT body FROM answer WHERE request = ? AND client = ?", request, client)
        return self._read(rows[0][0], RequestAnswered, f"the answer to request {request}") if rows else None

    def save_answer(self, client: str, answer: RequestAnswered) -> None:
        """Store the answer, so that a repeated request gets the same one, and drop the oldest beyond the limits of number and size."""
        self.database.run(
            "INSERT OR REPLACE INTO answer (client, request, body) VALUES (?, ?, ?)",
            client,
            answer.request,
            msgspec.json.encode(answer),
        )
        # The sizes first: a window over the bodies would read and copy every plan that is kept, for each answer.
        self.database.run(
            """
            DELETE FROM answer WHERE number IN (
                SELECT number FROM (
                    SELECT number, row_number() OVER newest AS place, sum(bytes) OVER newest - bytes AS newer_bytes
                    FROM (SELECT number, length(body) AS bytes FROM answer) WINDOW newest AS (ORDER BY number DESC)
                ) WHERE place > ? OR newer_bytes > ?
            )
            """,
            _ANSWERS_KEPT,
            _ANSWERS_KEPT_BYTES,
        )

    def enqueue(self, message: Message, **parameters: str | int) -> None:
        """Append to the outbox. A newer retained message replaces older ones of its topic that still wait.

        A message that can never be sent is dropped and logged: the change that it announces stands.
        """
        try:
            outgoing = prepare(
                message, source=self._source, event_id=new_id(), at=datetime.now(UTC), **parameters
            )
        except (ContractError, TopicError) as error:
            _log.error("outbox.unsendable", type=type(message).TYPE, why=str(error))
            return
        self._append(outgoing)

    def enqueue_removal(self, kind: type[Message], **parameters: str | int) -> None:
        """Append the removal of a retained message from the bus; it replaces messages that wait on its topic.

        Raises:
            TopicError: the parameters do not fit the topic.
        """
        self._append(clearing(kind, event_id=new_id(), **parameters))

    def _append(self, outgoing: OutboxMessage) -> None:
        if self._writing:
            self.outbox.add([outgoing])
            self._fresh.append(outgoing)
        else:
            with self.transaction():
                self.outbox.add([outgoing])
                self._fresh.append(outgoing)

    def _upgrade_outbox(self) -> None:
        """Encode the messages that an earlier version kept unencoded."""
        rows = self.database.run(
            "SELECT number, event_id, type, parameters, body FROM outbox_1 ORDER BY number"
        )
        if not rows:
            return
        with self.database.transaction():
            for number, event_id, kind, parameters, body in rows:
                try:
                    where = msgspec.json.decode(parameters, type=dict[str, str])
                    message = from_body(
                        kind, where, body, source=self._source, event_id=event_id, at=datetime.now(UTC)
                    )
                except (CaesuraError, ValueError, TypeError, KeyError) as error:
                    _log.error("outbox.unreadable", store=self.database.path, number=number, why=str(error))
                    if not is_state(kind):
                        continue  # keep a fact: nobody publishes it again
                else:
                    self.outbox.add([message])
                self.database.run("DELETE FROM outbox_1 WHERE number = ?", number)

    def _read(self, body: bytes, kind: type[_T], what: str) -> _T:
        with self.database.reading(what):
            return msgspec.json.decode(body, type=kind)


class SyncedOutbox(SqliteOutbox):
    """The outbox as the publisher reads it: everything it loads is on disk.

    Args:
        commits: those of the connection that fills it.
    """

    def __init__(self, off_loop: OffLoop, commits: DurableCommits) -> None:
        super().__init__(off_loop)
        self._commits = commits

    async def load(self) -> list[OutboxMessage]:
        """See ``OutboxStore.load``."""
        found = await super().load()
        await self._commits.reached()
        return found


def newer_entries(before: dict[str, _T] | None, now: dict[str, _T]) -> dict[str, _T] | None:
    """The entries that changed; None if that is unknown, since some were removed.

    The newest entry is the last one (``rollout.newest_last``), so only the new entries are compared.
    """
    if before is None or len(now) < len(before):
        return None
    newer: dict[str, _T] = {}
    for name in reversed(now):
        if name in before and before[name] is now[name]:
            break
        newer[name] = now[name]
    return dict(reversed(newer.items()))


def _newly_approved(before: Wave | None, wave: Wave) -> dict[str, WaveEvent]:
    """The events that were approved, if nothing else has changed about the wave's events."""
    if before is None or before.events is wave.events or len(before.events) != len(wave.events):
        return {}
    approved = {}
    for old, new in zip(before.events, wave.events, strict=True):
        if new is old:
            continue
        if msgspec.structs.replace(old, approved_by=new.approved_by, approved_at=new.approved_at) != new:
            return {}
        approved[new.event_id] = new
    return approved


def _bare_wave(wave: Wave) -> Wave:
    """Without the parts that have rows of their own."""
    return msgspec.structs.replace(wave, vms=(), readiness={}, clocks={}, operations=())
