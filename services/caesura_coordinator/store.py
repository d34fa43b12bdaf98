"""The coordinator's durable state: epoch, rollouts, documents, answers, and the outbox.

What is saved together is saved in one transaction with the messages that announce it (a transactional
outbox): after a crash nothing was announced that is not stored, and nothing stored stays unannounced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import msgspec

from caesura.contract.envelope import Message
from caesura.contract.messages import Epoch, RequestAnswered, SetDocument
from caesura.contract.names import Name
from caesura.contract.topics import CHANNELS, channel_of
from caesura.runtime.database import Database
from caesura.runtime.errors import CaesuraError
from caesura.runtime.identity import new_id
from caesura_coordinator.records import Rollout, Wave

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
)
_TYPES: Mapping[str, type[Message]] = {channel.message.TYPE: channel.message for channel in CHANNELS}
_T = TypeVar("_T")

_ANSWERS_KEPT = 1000
_ANSWERS_KEPT_BYTES = 64 * 1024 * 1024
"""A plan for 10,000 VMs has some 4 MB."""


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
        waves: dict[str, list[Wave]] = {}
        for name, body in self.database.run("SELECT rollout, body FROM wave ORDER BY rollout, number"):
            waves.setdefault(name, []).append(self._read(body, Wave, f"a wave of rollout {name}"))
        return [
            msgspec.structs.replace(
                self._read(body, Rollout, f"rollout {name}"), waves=tuple(waves.get(name, ()))
            )
            for name, body in self.database.run("SELECT id, body FROM rollout ORDER BY number")
        ]

    def save_rollout(self, rollout: Rollout, before: Rollout | None = None) -> None:
        """Insert or replace. Call inside a transaction.

        Args:
            before: what was saved last. Waves that are the same objects in it are not written again: a large
                rollout changes with every message, one wave at a time.
        """
        self.database.run(
            "INSERT INTO rollout (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
            rollout.id,
            msgspec.json.encode(msgspec.structs.replace(rollout, waves=())),
        )
        saved = {id(wave) for wave in before.waves} if before is not None else set()
        for wave in rollout.waves:
            if id(wave) not in saved:
                self.database.run(
                    "INSERT OR REPLACE INTO wave VALUES (?, ?, ?)",
                    rollout.id,
                    wave.index,
                    msgspec.json.encode(wave),
                )

    def forget(self, rollouts: Iterable[str]) -> None:
        """Drop these rollouts."""
        with self.transaction():
            for name in rollouts:
                self.database.run("DELETE FROM wave WHERE rollout = ?", name)
                self.database.run("DELETE FROM rollout WHERE id = ?", name)

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
        """Remember the answer, so that a repeated request gets the same one, and drop the oldest that are too many or too large."""
        self.database.run(
            "INSERT OR REPLACE INTO answer (client, request, body) VALUES (?, ?, ?)",
            client,
            answer.request,
            msgspec.json.encode(answer),
        )
        self.database.run(
            """
            DELETE FROM answer WHERE number IN (
                SELECT number FROM (
                    SELECT number, row_number() OVER newest AS place, sum(length(body)) OVER newest - length(body) AS newer_bytes
                    FROM answer WINDOW newest AS (ORDER BY number DESC)
                ) WHERE place > ? OR newer_bytes > ?
            )
            """,
            _ANSWERS_KEPT,
            _ANSWERS_KEPT_BYTES,
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
