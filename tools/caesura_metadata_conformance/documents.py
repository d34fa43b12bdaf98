"""Rules about the document of scheduled events and its conditional requests."""

from __future__ import annotations

from caesura_metadata_conformance.probe import MARK, Probe
from caesura_metadata_conformance.rule import RuleBook, expect, expect_status, need

DOCUMENTS = RuleBook("D", "documents")
_EVENTS = "scheduled-events.md"
_ETAG = "scheduled-events.md of 2020: the DocumentIncarnation is an ETag; Azure/vm-scheduled-events"


def _tag(probe: Probe) -> str:
    tag = probe.get().headers.get("etag", "")
    need(tag, "there is no ETag")
    return tag


@DOCUMENTS.rule("The Content-Type is application/json", _EVENTS)
def _type(probe: Probe) -> None:
    reply = probe.get()
    expect_status(reply, 200)
    kind = reply.headers.get("content-type", "")
    expect(kind.partition(";")[0].strip().lower() == "application/json", f"Content-Type {kind!r}")


@DOCUMENTS.rule("DocumentIncarnation is a number without a fraction", "Go clients decode into int")
def _incarnation(probe: Probe) -> None:
    document = probe.document()
    value = document.get("DocumentIncarnation") if isinstance(document, dict) else None
    expect(isinstance(value, int) and not isinstance(value, bool) and value >= 0, f"it is {value!r}")


@DOCUMENTS.rule("Events is always an array", _EVENTS)
def _array(probe: Probe) -> None:
    document = probe.document()
    value = document.get("Events") if isinstance(document, dict) else None
    expect(isinstance(value, list), f"it is {value!r:.100}")


@DOCUMENTS.rule("A document has these two members and no other", _EVENTS)
def _members(probe: Probe) -> None:
    document = probe.document()
    found = sorted(document) if isinstance(document, dict) else document
    expect(found == ["DocumentIncarnation", "Events"], f"it has {found!r:.200}")


@DOCUMENTS.rule("The answer has an ETag", _ETAG)
def _has_tag(probe: Probe) -> None:
    expect(probe.get().headers.get("etag"), "there is no ETag")


@DOCUMENTS.rule("If-None-Match with the current ETag is 304", _ETAG)
def _304(probe: Probe) -> None:
    # An event may change the document between the two: then the tag is asked for again.
    for _ in range(3):
        tag = _tag(probe)
        reply = probe.get(headers=(MARK, ("If-None-Match", tag)))
        if reply.status == 304:
            return
    expect_status(reply, 304)


@DOCUMENTS.rule("304 has no body and the ETag", "RFC 9110, section 15.4.5")
def _304_empty(probe: Probe) -> None:
    tag = _tag(probe)
    reply = probe.get(headers=(MARK, ("If-None-Match", tag)))
    need(reply.status == 304, f"there is no 304 but {reply.status}")
    expect(reply.body == b"", "it has a body")
    expect(reply.headers.get("etag") == tag, f"its ETag is {reply.headers.get('etag')!r} instead of {tag!r}")


@DOCUMENTS.rule("If-None-Match with another ETag is 200 with the document", _ETAG)
def _changed(probe: Probe) -> None:
    reply = probe.get(headers=(MARK, ("If-None-Match", '"conformance-no-such-tag"')))
    expect_status(reply, 200)
    expect(isinstance(reply.json(), dict), "the body is not a document")
