"""Faults that happen to events, as a client sees them, and the limit of five requests a second."""

from __future__ import annotations

import http.client
import json
import sys
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from caesura_rehearse import Rehearsal, RehearsalAssertion, RehearsalError
from caesura_testing.rehearsing import CLIENT

pytestmark = pytest.mark.e2e


def ask(url: str) -> Any:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request(
        "GET", "/metadata/scheduledevents?api-version=2020-07-01", headers={"Metadata": "true"}
    )
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    return body


@pytest.fixture
def program(caesura: Rehearsal, tmp_path: Path) -> Any:
    (tmp_path / "client.py").write_text(CLIENT, encoding="utf-8")
    return caesura.run([sys.executable, tmp_path / "client.py", "ignore", tmp_path])


def shown(caesura: Rehearsal) -> list[list[str]]:
    """The states of the documents that the program got, in order."""
    return [[each["EventStatus"] for each in document["events"]] for document in caesura.documents]


def shows(document: dict[str, Any], event_id: str) -> list[str]:
    return [each["EventStatus"] for each in document["events"] if each["EventId"] == event_id]


def test_an_event_that_vanishes_and_comes_all_the_same(caesura: Rehearsal, program: Any) -> None:
    caesura.fault("vanish x1")
    event = caesura.freeze(notice="2s", duration="0.2s")
    event.wait_ended()
    assert [each for each in shown(caesura) if each != []] == [["Scheduled"], ["Started"]]
    assert [] in shown(caesura)[shown(caesura).index(["Scheduled"]) : shown(caesura).index(["Started"])], (
        "in between"
    )
    assert event.gap >= 0.2
    second = caesura.freeze(notice="1s", duration=0).wait_ended()
    documents = caesura.documents
    first = next(at for at, each in enumerate(documents) if shows(each, second.event_id))
    assert [shows(each, second.event_id) for each in documents[first : first + 2]] == [
        ["Scheduled"],
        ["Started"],
    ], "only the first event vanishes"


def test_a_neighbour_approves(caesura: Rehearsal, program: Any) -> None:
    caesura.fault("neighbour")
    event = caesura.freeze(notice="4s", duration="0.2s").wait_ended()
    record = event.record
    assert record["approved_by"] == "neighbour"
    assert record["started"] < record["not_before"], "before its time"
    with pytest.raises(RehearsalAssertion, match="approved: the Freeze was seen"):
        caesura.expect("approved")


def test_not_before_moves(caesura: Rehearsal, program: Any) -> None:
    caesura.fault("moved 30s x1")
    caesura.fault("moved -30s x1")
    later = caesura.freeze(notice="2s", duration=0)
    before = later.record["not_before"]
    document = ask(caesura.url)
    while (moved := ask(caesura.url))["DocumentIncarnation"] == document["DocumentIncarnation"]:
        pass  # until the middle of its notice
    first, second = (parsedate_to_datetime(each["Events"][0]["NotBefore"]) for each in (document, moved))
    assert (second - first).total_seconds() == 30
    assert later.record["not_before"] - before == pytest.approx(30)
    later.cancel()
    earlier = caesura.freeze(notice="4s", duration=0).wait_ended()
    assert earlier.record["started"] - earlier.record["announced"] < earlier.record["notice_s"]


def test_incarnations_have_gaps(caesura: Rehearsal) -> None:
    caesura.fault("gap x1")
    seen = [ask(caesura.url)["DocumentIncarnation"]]
    event = caesura.freeze(notice="600s", duration=0)
    seen.append(ask(caesura.url)["DocumentIncarnation"])
    event.approve()
    event.wait_ended()
    seen.append(ask(caesura.url)["DocumentIncarnation"])
    assert seen == [1, 5, 13], "announced; started and ended"
    caesura.freeze(notice="600s", duration=0)
    assert ask(caesura.url)["DocumentIncarnation"] == 14


def test_a_client_that_asks_too_often(caesura: Rehearsal) -> None:
    caesura.fault("rate")
    served = 0
    while "Events" in (answer := ask(caesura.url)):
        served += 1
    assert served >= 5
    assert answer["error"].startswith("Too Many Requests")
    caesura.no_faults()
    assert all("Events" in ask(caesura.url) for _ in range(10))


def test_faults_of_one_vm(caesura: Rehearsal) -> None:
    programs = caesura.run(["sleep", "1000"], vms=2)
    caesura.fault("app-2: 500")
    one, two = (each.url for each in programs)
    assert "Events" in ask(one)
    assert ask(two)["error"].startswith("Service Error.")
    with pytest.raises(RehearsalError, match="there is no VM app-3 here"):
        caesura.fault("app-3: 500")
    caesura.no_faults()
    assert "Events" in ask(two)
