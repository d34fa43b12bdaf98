"""The documents of all sets, in memory as in the store: each change is stored together with the message that publishes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from caesura.contract.messages import SetDocument
from caesura.lifecycle import document as documents
from caesura.runtime.logs import get_logger
from caesura_coordinator.store import CoordinatorStore

_log = get_logger("caesura.coordinator")


class DocumentRepository:
    """See the module.

    Args:
        store: where they are kept; read completely at start.
    """

    def __init__(self, store: CoordinatorStore) -> None:
        self._store = store
        self.all: dict[str, SetDocument] = store.documents()
        """Maps a set to its document."""
        self._before: dict[str, SetDocument | None] = {}
        """Documents as they were before the transaction under way."""

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Store everything in the block or nothing, and the documents in memory likewise."""
        self._before.clear()
        try:
            with self._store.transaction():
                yield
        except BaseException:
            for name, document in self._before.items():
                if document is None:
                    del self.all[name]
                else:
                    self.all[name] = document
            raise

    def of(self, name: str) -> SetDocument:
        """The document of a set; an empty one if it has none yet."""
        return self.all.get(name, documents.first_document(name))

    def save(self, document: SetDocument) -> None:
        """Store and publish a document, if it changed. Call inside ``transaction``."""
        if self.all.get(document.set) != document:
            self.replace(document)

    def replace(self, document: SetDocument) -> None:
        """Store and publish a document. Call inside ``transaction``."""
        self._store.save_document(document)
        self._store.enqueue(document, set=document.set)
        self._before.setdefault(document.set, self.all.get(document.set))
        self.all[document.set] = document

    def republish(self) -> None:
        """Add all documents to the outbox again. Call inside a transaction."""
        for document in self.all.values():
            self._store.enqueue(document, set=document.set)

    def republish_above(self, published: SetDocument) -> None:
        """Another coordinator's document is on the bus although we lead: publish ours again, above it.

        Raises:
            StoreError: nothing changed.
        """
        ours = self.all.get(published.set)
        if ours is None or ours == published:
            return
        ours = documents.above(ours, published)
        with self.transaction():
            self.replace(ours)
        _log.warning("document.reasserted", set=ours.set, incarnation=ours.incarnation)

    def ensure(self, sets: Iterable[str]) -> bool:
        """Give every set a document, empty at first, so that workloads can poll before the first event.

        True when there was a new one.

        Raises:
            StoreError: nothing changed.
        """
        new = sorted({name for name in sets if name not in self.all})
        if new:
            with self.transaction():
                for name in new:
                    self.replace(documents.first_document(name))
        return bool(new)
