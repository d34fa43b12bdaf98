"""Rules about approvals (POST)."""

from __future__ import annotations

from caesura_metadata_conformance.exchange import Reply
from caesura_metadata_conformance.probe import MARK, NOBODYS_EVENT, Probe, events_of, start_requests
from caesura_metadata_conformance.requests import expect_error_body
from caesura_metadata_conformance.rule import RuleBook, expect, expect_status, need

APPROVALS = RuleBook("A", "approvals")
_DOC = "scheduled-events.md"
_UNASKED = "no open event, or --approve was not given"


def _harmless(probe: Probe) -> str:
    """A payload that changes nothing and that the server accepts: for an event that nobody has."""
    payload = start_requests(NOBODYS_EVENT)
    reply = probe.post(payload, headers=(MARK, ("Content-Type", "application/json")))
    need(
        reply.status == 200,
        f"a well-formed payload about an unknown event is {reply.status}; that is not documented",
    )
    return payload


def _refused(reply: Reply) -> None:
    expect_status(reply, 400)


@APPROVALS.rule("A payload that is not JSON is 400", _DOC)
def _not_json(probe: Probe) -> None:
    _refused(probe.post('{"StartRequests": [{"Event'))


@APPROVALS.rule("A payload without StartRequests is 400", _DOC)
def _without(probe: Probe) -> None:
    _refused(probe.post("{}"))


@APPROVALS.rule("An empty payload is 400", _DOC)
def _empty(probe: Probe) -> None:
    _refused(probe.post(b""))


@APPROVALS.rule("A start request without EventId is 400", _DOC)
def _no_id(probe: Probe) -> None:
    _refused(probe.post('{"StartRequests": [{}]}'))


@APPROVALS.rule("The error about a payload has the documented body", "instance-metadata-service.md")
def _error(probe: Probe) -> None:
    reply = probe.post("{")
    expect_status(reply, 400)
    expect_error_body(reply)


@APPROVALS.rule("A payload is read as JSON though it is called a form", "curl -d, urllib, Pacemaker's agents")
def _form(probe: Probe) -> None:
    payload = _harmless(probe)
    reply = probe.post(payload, headers=(MARK, ("Content-Type", "application/x-www-form-urlencoded")))
    expect_status(reply, 200)


@APPROVALS.rule("A payload is read as JSON without a Content-Type", "the documented Python sample")
def _no_type(probe: Probe) -> None:
    expect_status(probe.post(_harmless(probe)), 200)


@APPROVALS.rule("A payload is read as JSON though it is called text", "node-fetch")
def _text(probe: Probe) -> None:
    payload = _harmless(probe)
    expect_status(probe.post(payload, headers=(MARK, ("Content-Type", "text/plain;charset=UTF-8"))), 200)


@APPROVALS.rule("Members beside StartRequests are ignored", "older samples: DocumentIncarnation")
def _more(probe: Probe) -> None:
    _harmless(probe)
    expect_status(probe.post(start_requests(NOBODYS_EVENT, DocumentIncarnation=5)), 200)


@APPROVALS.rule("If-None-Match is ignored on POST", "Azure/vm-scheduled-events sends it")
def _conditional(probe: Probe) -> None:
    payload = _harmless(probe)
    tag = probe.get().headers.get("etag", '"1"')
    expect_status(probe.post(payload, headers=(MARK, ("If-None-Match", tag))), 200)


@APPROVALS.rule("Several events may be approved in one request", _DOC)
def _several(probe: Probe) -> None:
    _harmless(probe)
    expect_status(probe.post(start_requests(NOBODYS_EVENT, NOBODYS_EVENT.replace("8000", "8001"))), 200)


@APPROVALS.rule("The answer to an approval is empty or JSON", "Pacemaker's agents decode it")
def _answer(probe: Probe) -> None:
    reply = probe.post(_harmless(probe))
    expect_status(reply, 200)
    expect(not reply.body or reply.json() is not None, f"it is {reply.text[:100]!r}")


@APPROVALS.rule("Approving an event that nobody has changes nothing", _DOC)
def _nothing(probe: Probe) -> None:
    payload = _harmless(probe)
    before = probe.document()
    probe.post(payload)
    after = probe.document()
    need(isinstance(before, dict) and isinstance(after, dict), "there is no document")
    same = {str(each.get("EventId")) for each in events_of(before)} == {
        str(each.get("EventId")) for each in events_of(after)
    }
    need(before == after or same, "the events changed in between")
    expect(NOBODYS_EVENT not in {each.get("EventId") for each in events_of(after)}, "it is an event now")


def _open_event(probe: Probe, status: str) -> str:
    need(probe.approve, _UNASKED)
    found = [
        str(each.get("EventId")) for each in events_of(probe.document()) if each.get("EventStatus") == status
    ]
    need(found, _UNASKED if status == "Scheduled" else "no event is Started")
    return found[0]


@APPROVALS.rule("Approving a Scheduled event is exactly 200", "Go clients compare with 200")
def _approve(probe: Probe) -> None:
    expect_status(probe.post(start_requests(_open_event(probe, "Scheduled"))), 200)


@APPROVALS.rule("Approving it again is 200, also by another VM", _DOC)
def _again(probe: Probe) -> None:
    payload = start_requests(_open_event(probe, "Scheduled"))
    for _ in range(2):
        expect_status(probe.post(payload), 200)


@APPROVALS.rule("Approving a Started event is 200", "a real client does")
def _started(probe: Probe) -> None:
    expect_status(probe.post(start_requests(_open_event(probe, "Started"))), 200)
