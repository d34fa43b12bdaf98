"""The coordinator's durable state: epoch, rollouts, documents, answers, and the outbox.

What is saved together is saved in one transaction with the messages that announce it (a transactional
outbox): after a crash nothing was announced that is not stored, and nothing stored stays unannounced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from caesura.contract.envelope import Message
from caesura.contract.messages import Epoch, PlannedVm, RequestAnswered, SetDocument
from caesura.contract.names import Name
from caesura.contract.topics import CHANNELS, channel_of
from caesura.runtime.database import Database
from caesura.runtime.errors import CaesuraError
from caesura.runtime.identity import new_id
from caesura_coordinator.records import ClockVerdict, HostOperation, Readiness, Rollout, Wave

_MIGRATIONS = (
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
    CREATE INDEX outbox_topic ON outbox (type, parameters);
    """,
)
_READY, _CLOCK, _OPERATION = "ready", "clock", "operation"
"""What is kept of a wave by VM (its agent's answer, its clock), and by the place of a host's operation."""
_TYPES: Mapping[str, type[Message]] = {channel.message.TYPE: channel.message for channel in CHANNELS}
_T = TypeVar("_T")


class Outgoing(msgspec.Struct, frozen=True):
    """One message that waits in the outbox."""

    number: int
    event_id: str
    message: Message
    parameters: dict[str, str]


class Unsendable(CaesuraError):
    """A message in the outbox that nobody could read."""

    def __init__(self, number: int, why: str) -> None:
        self.number = number
        super().__init__(why)


class Store:
    """See the module. Raises StoreError from every method when the disk or the file refuses."""

    def __init__(self, path: str) -> None:
        self.database = Database(path, _MIGRATIONS)
        self.transaction = self.database.transaction

    def epoch(self) -> int:
        """The last epoch claimed from this store."""
        with self.database.reading("the epoch"):
            ((value,),) = self.database.run("SELECT value FROM epoch")
            return msgspec.convert(value, Epoch)

    def save_epoch(self, epoch: int) -> None:
        """Remember a claimed epoch before it is used."""
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
        return msgspec.structs.replace(
            wave,
            vms=vms,
            readiness={vm: self._read(body, Readiness, what) for vm, body in parts.get(_READY, {}).items()},
            clocks={vm: self._read(body, ClockVerdict, what) for vm, body in parts.get(_CLOCK, {}).items()},
            operations=tuple(operations[place] for place in sorted(operations)),
        )

    def save_rollout(self, rollout: Rollout, before: Rollout | None = None) -> None:
        """Insert or replace. Call inside a transaction.

        A message about one VM writes what it changed, not its whole wave: what is kept of each VM and host has a row of its own.

        Args:
            before: what was saved last; parts of it that are the same objects are not written again.
        """
        if before is None or _bare_rollout(before) != _bare_rollout(rollout):
            self.database.run(
                "INSERT INTO rollout (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
                rollout.id,
                msgspec.json.encode(_bare_rollout(rollout)),
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
            before = None  # a new one, or one that a version before this wrote in one piece
            body = msgspec.json.encode(wave.vms)
            self.database.run("INSERT INTO wave_vms VALUES (?, ?, ?)", rollout, wave.index, body)
        bare = _bare_wave(wave)
        if before is None or _bare_wave(before) != bare:
            body = msgspec.json.encode(bare)
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
        """Write what is newer; if that is not known, everything, in place of what was there."""
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

    def forget(self, rollouts: Iterable[str], *, answers_kept: int) -> None:
        """Drop these rollouts, and all but the newest answers."""
        with self.transaction():
            for name in rollouts:
                for table in ("wave", "wave_vms", "wave_part"):
                    self.database.run(f"DELETE FROM {table} WHERE rollout = ?", name)  # noqa: S608 - our own three
                self.database.run("DELETE FROM rollout WHERE id = ?", name)
            self.database.run(
                "DELETE FROM answer WHERE number <= (SELECT max(number) FROM answer) - ?", answers_kept
            )

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
        """VM to the host that it belongs to and the epoch of the record."""
        with self.database.reading("whose VM it is"):
            rows = self.database.run("SELECT vm, host, epoch FROM owner")
            return {
                msgspec.convert(vm, Name): (msgspec.convert(host, Name), msgspec.convert(epoch, Epoch))
                for vm, host, epoch in rows
            }

    def save_owner(self, vm: str, host: str | None, epoch: int) -> None:
        """Insert, replace, or with no host remove. Call inside a transaction."""
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
        """The answer that this request of this client got before."""
        rows = self.database.run("SELECT body FROM answer WHERE request = ? AND client = ?", request, client)
        return self._read(rows[0][0], RequestAnswered, f"the answer to request {request}") if rows else None

    def save_answer(self, client: str, answer: RequestAnswered) -> None:
        """Remember the answer, so that a repeated request gets the same one."""
        self.database.run(
            "INSERT OR REPLACE INTO answer (client, request, body) VALUES (?, ?, ?)",
            client,
            answer.request,
            msgspec.json.encode(answer),
        )

    def enqueue(self, message: Message, **parameters: str | int) -> None:
        """Append to the outbox. A newer retained message replaces older ones of its topic that still wait."""
        shown = msgspec.json.encode({name: str(value) for name, value in parameters.items()}).decode()
        kind = type(message)
        if channel_of(kind).retain:
            self.database.run("DELETE FROM outbox WHERE type = ? AND parameters = ?", kind.TYPE, shown)
        self.database.run(
            "INSERT INTO outbox (event_id, type, parameters, body) VALUES (?, ?, ?, ?)",
            new_id(),
            kind.TYPE,
            shown,
            msgspec.json.encode(message),
        )

    def next_outgoing(self) -> Outgoing | None:
        """The oldest message that waits.

        Raises:
            Unsendable: it is not what its type allows; nobody could read it.
        """
        rows = self.database.run(
            "SELECT number, event_id, type, parameters, body FROM outbox ORDER BY number LIMIT 1"
        )
        if not rows:
            return None
        number, event_id, kind, parameters, body = rows[0]
        try:
            return Outgoing(
                number,
                event_id,
                msgspec.json.decode(body, type=_TYPES[kind]),
                msgspec.json.decode(parameters, type=dict[str, str]),
            )
        except (msgspec.DecodeError, ValueError, TypeError, KeyError) as error:
            raise Unsendable(
                number, f"a message of type {kind!r} in {self.database.path} cannot be read: {error}"
            ) from error

    def sent(self, number: int) -> None:
        """The broker accepted this message."""
        self.database.run("DELETE FROM outbox WHERE number = ?", number)

    def waiting(self) -> int:
        """How many messages wait."""
        ((count,),) = self.database.run("SELECT count(*) FROM outbox")
        return int(count)

    def _read(self, body: bytes, kind: type[_T], what: str) -> _T:
        with self.database.reading(what):
            return msgspec.json.decode(body, type=kind)


def newer_entries(before: dict[str, _T] | None, now: dict[str, _T]) -> dict[str, _T] | None:
    """The entries that are not as they were before; None if that cannot be told, since some were taken out.

    The newest entry is the last one (``rollout.newest_last``), so this looks at no more than what is new.
    """
    if before is None or len(now) < len(before):
        return None
    newer: dict[str, _T] = {}
    for name in reversed(now):
        if name in before and before[name] is now[name]:
            break
        newer[name] = now[name]
    return dict(reversed(newer.items()))


def _bare_rollout(rollout: Rollout) -> Rollout:
    return msgspec.structs.replace(rollout, waves=())


def _bare_wave(wave: Wave) -> Wave:
    """Without what has rows of its own."""
    return msgspec.structs.replace(wave, vms=(), readiness={}, clocks={}, operations=())
