"""Every rule of the conformance command passes for a faithful server, and fails for a wrong one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest

from caesura.contract.messages import SetDocument
from caesura_metadata_conformance.exchange import Ask, BadServerUrl, HttpTransport, Reply
from caesura_metadata_conformance.probe import Probe
from caesura_metadata_conformance.rule import RuleResult
from caesura_metadata_conformance.run import BOOKS, check_server, count
from caesura_testing.metadata_servers import LIFE, ONE, TWO, Answering, Change, PlayedServer, event

NUMBERS = [rule.number for book in BOOKS for rule in book.rules]
WATCH_S = 0.25 * (len(LIFE) + 1)


def checked(server: PlayedServer, *, approve: bool = True, watch_s: float = WATCH_S) -> list[RuleResult]:
    probe = Probe(server, watch_s=watch_s, approve=approve, clock=lambda: server.now, sleep=server.sleep)
    return check_server(probe)


def test_numbers_are_unique_and_titles_too() -> None:
    titles = [rule.title for book in BOOKS for rule in book.rules]
    assert len(set(NUMBERS)) == len(NUMBERS) >= 75
    assert len(set(titles)) == len(titles)


def test_a_faithful_server_passes_every_rule() -> None:
    wrong = [
        (each.number, each.verdict, each.why) for each in checked(PlayedServer()) if each.verdict != "passes"
    ]
    assert wrong == []


def test_without_events_nothing_is_told_about_them() -> None:
    results = checked(PlayedServer(LIFE[:1]), approve=False, watch_s=0.0)
    passed, failed, unknown = count(results)
    assert failed == 0
    told = {each.number for each in results if each.verdict == "passes"}
    assert passed + unknown == len(NUMBERS)
    assert not {each for each in told if each.startswith("E")}


def test_nothing_is_approved_unasked() -> None:
    posted: list[bytes] = []

    def note(ask: Ask, reply: Reply) -> Reply:
        posted.append(ask.body)
        return reply

    checked(PlayedServer(answering=note), approve=False)
    assert not [each for each in posted if ONE.encode() in each or TWO.encode() in each]


def test_a_server_that_says_429_is_asked_again() -> None:
    asked = 0

    def limited(_: Ask, reply: Reply) -> Reply:
        nonlocal asked
        asked += 1
        return reply if asked % 3 else Reply(status=429)

    server = PlayedServer(LIFE[:1], answering=limited)
    assert count(checked(server, approve=False, watch_s=0.0))[1] == 0


# -- wrong servers ----------------------------------------------------------------------------------------------


def always(status: int, body: bytes | None = None, **headers: str) -> Answering:
    """Every answer has this status; ``body`` replaces its own."""

    def answer(_: Ask, reply: Reply) -> Reply:
        return Reply(
            status=status,
            headers={**reply.headers, **headers},
            body=reply.body if body is None else body,
        )

    return answer


def without_headers(_: Ask, reply: Reply) -> Reply:
    return msgspec.structs.replace(reply, headers={})


def with_body(body: bytes, kind: str = "application/json") -> Answering:
    def answer(_: Ask, reply: Reply) -> Reply:
        return msgspec.structs.replace(reply, body=body, headers={**reply.headers, "content-type": kind})

    return answer


def in_instance(change: Callable[[dict[str, Any]], None]) -> Answering:
    """Changes compute in whole trees."""

    def answer(ask: Ask, reply: Reply) -> Reply:
        tree = reply.json() if ask.target.startswith("/metadata/instance?") else None
        if not isinstance(tree, dict) or "compute" not in tree:
            return reply
        change(tree)
        return msgspec.structs.replace(reply, body=json.dumps(tree).encode())

    return answer


def posted(kind: str | None) -> Answering:
    """Refuses a POST by its Content-Type; None: one without."""

    def answer(ask: Ask, reply: Reply) -> Reply:
        said = dict(ask.headers).get("Content-Type")
        return Reply(status=415) if ask.method == "POST" and said == kind else reply

    return answer


def post_with(part: bytes, status: int) -> Answering:
    def answer(ask: Ask, reply: Reply) -> Reply:
        return Reply(status=status) if ask.method == "POST" and part in ask.body else reply

    return answer


def each_event(**members: Any) -> Change:
    def change(document: dict[str, Any], _: str) -> None:
        for each in document["Events"]:
            each.update(members)

    return change


def only_status(status: str, **members: Any) -> Change:
    def change(document: dict[str, Any], _: str) -> None:
        for each in document["Events"]:
            if each["EventStatus"] == status:
                each.update(members)

    return change


def document_with(**members: Any) -> Change:
    def change(document: dict[str, Any], _: str) -> None:
        document.update(members)

    return change


def newest_members(document: dict[str, Any], _: str) -> None:
    """The version counts for nothing."""
    for each in document["Events"]:
        each.update(Description="", EventSource="Platform", DurationInSeconds=9)
        each["Resources"] = [name.removeprefix("_") for name in each["Resources"]]


def newest_types(document: dict[str, Any], _: str) -> None:
    ids = [each["EventId"] for each in document["Events"]]
    if ONE in ids and TWO not in ids:
        document["Events"].append({"EventId": TWO})


def new_id_when_started(document: dict[str, Any], _: str) -> None:
    for each in document["Events"]:
        if each["EventStatus"] == "Started":
            each["EventId"] = ONE.replace("c", "d")


class Moving:
    """Another NotBefore each time."""

    def __init__(self) -> None:
        self._times = 0

    def __call__(self, document: dict[str, Any], _: str) -> None:
        self._times += 1
        for each in document["Events"]:
            if each["NotBefore"]:
                each["NotBefore"] = f"Mon, 20 Apr 2026 22:26:{self._times % 60:02} GMT"


BACK = (LIFE[1], LIFE[3], LIFE[1], LIFE[4])
"""A document, an event and an incarnation that go back."""
TWO_CONTENTS = (LIFE[1], SetDocument(set="web", incarnation=4, events=(event(TWO),)), LIFE[4])

WRONG: Mapping[str, PlayedServer] = {
    "nothing answers": PlayedServer(down=True),
    "all is well": PlayedServer(answering=always(200)),
    "all is 200 without a body": PlayedServer(answering=always(200, b"")),
    "all is 404": PlayedServer(answering=always(404)),
    "all is 500": PlayedServer(answering=always(500)),
    "bodies are text": PlayedServer(answering=with_body(b"OK", "text/html")),
    "bodies are empty objects": PlayedServer(answering=with_body(b"{}")),
    "bodies are arrays": PlayedServer(answering=with_body(b"[]")),
    "errors say nothing": PlayedServer(answering=with_body(b'{"error": "no"}')),
    "headers are missing": PlayedServer(answering=without_headers),
    "ETags never match": PlayedServer(answering=always(200, ETag='"x"')),
    "304 has a body": PlayedServer(answering=always(304, b"x")),
    "all changes are the same": PlayedServer(changed=document_with(DocumentIncarnation=4)),
    "numbers are strings": PlayedServer(changed=document_with(DocumentIncarnation="4")),
    "no events is null": PlayedServer(changed=document_with(Events=None)),
    "documents have more": PlayedServer(changed=document_with(Version=1)),
    "EventId is a number": PlayedServer(changed=each_event(EventId="7")),
    "Completed is shown": PlayedServer(changed=each_event(EventStatus="Completed")),
    "Pause, as in 2016": PlayedServer(changed=each_event(EventType="Pause")),
    "other resources": PlayedServer(changed=each_event(ResourceType="VM")),
    "nobody is concerned": PlayedServer(changed=each_event(Resources=[])),
    "ISO 8601": PlayedServer(changed=only_status("Scheduled", NotBefore="2026-04-20T22:26:58Z")),
    "NotBefore stays": PlayedServer(
        changed=only_status("Started", NotBefore="Mon, 20 Apr 2026 22:26:58 GMT")
    ),
    "Description is null": PlayedServer(changed=each_event(Description=None)),
    "EventSource is Azure": PlayedServer(changed=each_event(EventSource="Azure")),
    "seconds are a string": PlayedServer(changed=each_event(DurationInSeconds="9")),
    "events have more": PlayedServer(changed=each_event(Approved=True)),
    "versions have the same members": PlayedServer(changed=newest_members),
    "versions have the same types": PlayedServer(changed=newest_types),
    "ids change": PlayedServer(changed=new_id_when_started),
    "NotBefore moves": PlayedServer(changed=Moving()),
    "it goes back": PlayedServer(BACK),
    "one incarnation, two contents": PlayedServer(TWO_CONTENTS),
    "forms are refused": PlayedServer(answering=posted("application/x-www-form-urlencoded")),
    "text is refused": PlayedServer(answering=posted("text/plain;charset=UTF-8")),
    "no type is refused": PlayedServer(answering=posted(None)),
    "more members are refused": PlayedServer(answering=post_with(b"DocumentIncarnation", 400)),
    "two at once are refused": PlayedServer(answering=post_with(b"}, {", 400)),
    "an approval is 204": PlayedServer(answering=post_with(ONE.encode(), 204)),
    "another approval is 204": PlayedServer(answering=post_with(TWO.encode(), 204)),
    "POST is conditional": PlayedServer(
        answering=lambda ask, reply: (
            Reply(status=304) if ask.method == "POST" and "If-None-Match" in dict(ask.headers) else reply
        )
    ),
    "an approval is answered by OK": PlayedServer(
        answering=lambda ask, reply: (
            msgspec.structs.replace(reply, body=b"OK")
            if ask.method == "POST" and reply.status == 200
            else reply
        )
    ),
    "an approval makes an event": PlayedServer(
        changed=lambda document, _: document["Events"].append(
            {"EventId": "00000000-0000-4000-8000-000000000000", "EventStatus": "Started"}
        )
    ),
    "numbers in the instance": PlayedServer(
        answering=in_instance(lambda tree: tree["compute"].update(zone=1))
    ),
    "the identity is 404": PlayedServer(
        answering=lambda ask, reply: Reply(status=404) if "identity" in ask.target else reply
    ),
    "compute differs": PlayedServer(answering=in_instance(lambda tree: tree["compute"].update(name="x"))),
    "a new element in an old version": PlayedServer(
        answering=in_instance(lambda tree: tree["compute"].update(tagsList=[], userData=""))
    ),
}


@pytest.fixture(scope="module")
def failing() -> dict[str, set[str]]:
    """Rules to the wrong servers at which they fail."""
    found: dict[str, set[str]] = {number: set() for number in NUMBERS}
    for name, server in WRONG.items():
        for each in checked(server):
            if each.verdict == "fails":
                found[each.number].add(name)
    return found


@pytest.mark.parametrize("number", NUMBERS)
def test_each_rule_can_fail(number: str, failing: dict[str, set[str]]) -> None:
    # By a server that answers: one that is down fails nearly all of them.
    assert failing[number] - {"nothing answers"}, (
        "no wrong server breaks it: it may be a rule that always passes"
    )


def test_each_wrong_server_fails(failing: dict[str, set[str]]) -> None:
    caught = set().union(*failing.values())
    assert set(WRONG) - caught == set()


@pytest.mark.parametrize(
    "url", ["", "https://x", "http://", "ftp://x", "http://x:99999", "http://x/other", "unix:x"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(BadServerUrl):
        HttpTransport(url)
