"""Documents as they go over the wire, encoded once for each change and api-version. Pure.

A poll is answered from here: some thousand VMs ask for the same few documents every second.
"""

from __future__ import annotations

import msgspec

from caesura.contract.messages import SetDocument
from caesura_metadata_publisher.api_versions import EventsVersion
from caesura_metadata_publisher.events_document import entity_tag, wire_document


class EncodedDocument(msgspec.Struct, frozen=True, kw_only=True):
    """One document at one api-version."""

    document: SetDocument
    etag: str
    body: bytes


class EncodedDocuments:
    """The newest document of each set and api-version."""

    def __init__(self) -> None:
        self._encoded: dict[tuple[str, str], EncodedDocument] = {}

    def of(self, document: SetDocument, version: EventsVersion) -> EncodedDocument:
        """The document, encoded. It is taken for the same while it is the same object, as messages never change."""
        key = document.set, version.version
        known = self._encoded.get(key)
        if known is None or known.document is not document:
            known = EncodedDocument(
                document=document, etag=entity_tag(document), body=wire_document(document, version)
            )
            self._encoded[key] = known
        return known
