"""The rules of a request, as Azure states them and as real clients use them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura_metadata_publisher.api_versions import EVENTS_VERSIONS, INSTANCE_VERSIONS
from caesura_metadata_publisher.request import (
    ApproveEvents,
    HttpResponse,
    ReadEvents,
    ReadInstance,
    ReadVersions,
    Request,
    parse,
)

EVENTS = "/metadata/scheduledevents"
INSTANCE = "/metadata/instance"
V = ("api-version", "2020-07-01")
VI = ("api-version", "2021-02-01")
OK = {"metadata": "true"}


def ask(
    path: str = EVENTS,
    *query: tuple[str, str],
    method: str = "GET",
    headers: Mapping[str, str] = OK,
    body: bytes | None = b"",
) -> Request | HttpResponse:
    return parse(method, path, query, headers, body)


def refused(answer: Request | HttpResponse, status: int = 400) -> dict[str, object]:
    assert isinstance(answer, HttpResponse)
    assert answer.status == status
    assert answer.content_type == "application/json; charset=utf-8"
    body = json.loads(answer.body)
    assert isinstance(body, dict)
    return body


def test_the_documented_calls_pass() -> None:
    read = ask(EVENTS, V)
    assert isinstance(read, ReadEvents)
    assert read.version.version == "2020-07-01"
    assert ask(INSTANCE, VI) == ReadInstance("2021-02-01", (), "json")
    assert ask("/metadata/versions") == ReadVersions()


@pytest.mark.parametrize("value", ["true", "True", "TRUE", " true "])
def test_the_header_is_compared_without_case(value: str) -> None:
    assert isinstance(ask(EVENTS, V, headers={"metadata": value}), ReadEvents)


@pytest.mark.parametrize("headers", [{}, {"metadata": ""}, {"metadata": "false"}, {"x-metadata": "true"}])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_the_header_nothing_is_served(method: str, headers: dict[str, str]) -> None:
    body = refused(ask(EVENTS, V, method=method, headers=headers))
    assert body == {"error": "Bad request. Required metadata header not specified."}
    refused(ask(INSTANCE, VI, headers=headers))
    refused(ask("/metadata/versions", headers=headers))


def test_the_preview_version_asked_for_no_header() -> None:
    assert isinstance(ask(EVENTS, ("api-version", "2017-03-01"), headers={}), ReadEvents)


def test_a_forwarded_request_is_refused() -> None:
    refused(ask(EVENTS, V, headers={**OK, "x-forwarded-for": "10.0.0.1"}))


def test_a_repeated_query_parameter_is_refused_and_an_unknown_one_is_not() -> None:
    refused(ask(EVENTS, V, V))
    refused(ask(INSTANCE, VI, ("extended", "true"), ("extended", "true")))
    assert isinstance(ask(INSTANCE, VI, ("extended", "true")), ReadInstance)


@pytest.mark.parametrize("query", [(), (("api-version", ""),), (("api-version", "2021-02-01"),)])
def test_a_bad_events_version_names_the_newest(query: Sequence[tuple[str, str]]) -> None:
    body = refused(ask(EVENTS, *query))
    assert body["newest-versions"] == ["2020-07-01", "2019-08-01", "2019-04-01"]
    assert str(body["error"]).startswith("Bad request. api-version is invalid or was not specified")


@pytest.mark.parametrize("query", [(), (("api-version", "2020-07-01"),), (("api-version", "latest"),)])
def test_a_bad_instance_version_names_the_newest_of_its_own_set(query: Sequence[tuple[str, str]]) -> None:
    body = refused(ask(INSTANCE, *query))
    assert body["newest-versions"] == ["2025-04-07", "2024-07-17", "2024-03-15"]


def test_both_version_tables_are_newest_first_without_repetition() -> None:
    for names in ([each.version for each in EVENTS_VERSIONS], list(INSTANCE_VERSIONS)):
        assert names == sorted(set(names), reverse=True)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "/metadata/latest/scheduledevents",
        "/metadata/scheduledevents/more",
        "/other/scheduledevents",
    ],
)
def test_what_is_not_there_is_404(path: str) -> None:
    refused(ask(path, V), 404)


@pytest.mark.parametrize("path", ["/metadata", "/metadata/"])
def test_the_root_names_the_newest_versions(path: str) -> None:
    for query in ((), (VI,)):
        assert refused(ask(path, *query))["newest-versions"] == ["2025-04-07", "2024-07-17", "2024-03-15"]
    assert "metadata header" in str(refused(ask(path, headers={}))["error"])
    refused(ask(path, method="POST"), 405)


@pytest.mark.parametrize(
    "path", ["/metadata/identity/oauth2/token", "/metadata/identity/info", "/metadata/identity"]
)
def test_a_vm_has_no_identity_and_an_sdk_understands_that(path: str) -> None:
    body = refused(ask(path, ("api-version", "2018-02-01"), ("resource", "https://vault.azure.net")))
    assert body == {"error": "invalid_request", "error_description": "Identity not found"}
    assert "metadata header" in str(refused(ask(path, VI, headers={}))["error"])


@pytest.mark.parametrize("path", ["/metadata/attested/document", "/metadata/loadbalancer"])
def test_what_is_not_offered_is_400_which_no_client_repeats(path: str) -> None:
    refused(ask(path, VI))


def test_a_compressed_payload_is_refused() -> None:
    body = b'{"StartRequests": [{"EventId": "a"}]}'
    refused(ask(EVENTS, V, method="POST", body=body, headers={**OK, "content-encoding": "gzip"}))
    plain = ask(EVENTS, V, method="POST", body=body, headers={**OK, "content-encoding": "identity"})
    assert plain == ApproveEvents(("a",))


def test_a_slash_at_the_end_and_upper_case_are_forgiven() -> None:
    assert isinstance(ask("/metadata/scheduledevents/", V), ReadEvents)
    assert isinstance(ask("/metadata/scheduledEvents", V), ReadEvents)
    assert ask("/metadata/instance/compute/", VI) == ReadInstance("2021-02-01", ("compute",), "json")


@pytest.mark.parametrize(
    ("path", "method", "allow"),
    [
        (EVENTS, "PUT", "GET, POST"),
        (EVENTS, "DELETE", "GET, POST"),
        (EVENTS, "HEAD", "GET, POST"),
        (INSTANCE, "POST", "GET"),
        ("/metadata/versions", "POST", "GET"),
    ],
)
def test_a_wrong_verb_is_405_and_says_which_are_right(path: str, method: str, allow: str) -> None:
    answer = ask(path, V, method=method)
    refused(answer, 405)
    assert isinstance(answer, HttpResponse)
    assert answer.headers == {"Allow": allow}


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        (b'{"StartRequests": [{"EventId": "a"}]}', ("a",)),
        (b'{"StartRequests": [{"EventId": "a"}, {"EventId": "b"}]}', ("a", "b")),
        (b'{"DocumentIncarnation": 5, "StartRequests": [{"EventId": "a", "more": 1}]}', ("a",)),
        (b'{"StartRequests": []}', ()),
        (b'\xef\xbb\xbf{"StartRequests": [{"EventId": "a"}]}', ("a",)),
        (b'{"StartRequests": {"EventId": "a"}}', ("a",)),
        (b'{"startRequests": [{"eventId": "a"}, {"EVENTID": "b"}]}', ("a", "b")),
        (b'{"startrequests": [], "StartRequests": [{"eventid": "x", "EventId": "a"}]}', ("a",)),
    ],
)
def test_a_payload_says_which_events_may_start(body: bytes, ids: tuple[str, ...]) -> None:
    assert ask(EVENTS, V, method="POST", body=body) == ApproveEvents(ids)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"{}",
        b'{"StartRequests": null}',
        b'{"StartRequests": {"EventId": 5}}',
        b'{"StartRequests": "a"}',
        b'{"StartRequests": [{"EventId": 5}]}',
        b'{"StartRequests": [{}]}',
        b'{"StartRequests": ["a"]}',
        b"StartRequests=a",
        b"[" * 100_000,
        None,
    ],
)
def test_a_malformed_or_oversized_payload_is_400(body: bytes | None) -> None:
    refused(ask(EVENTS, V, method="POST", body=body))


def test_a_post_needs_a_version_too_and_ignores_if_none_match() -> None:
    body = b'{"StartRequests": [{"EventId": "a"}]}'
    refused(ask(EVENTS, method="POST", body=body))
    assert ask(EVENTS, V, method="POST", body=body, headers={**OK, "if-none-match": '"1"'}) == ApproveEvents(
        ("a",)
    )


def test_an_unknown_format_is_refused() -> None:
    refused(ask(INSTANCE, VI, ("format", "xml")))
    assert ask(INSTANCE, VI, ("format", "TEXT")) == ReadInstance("2021-02-01", (), "text")


@given(
    st.sampled_from(["GET", "POST", "PUT", "HEAD", "X"]),
    st.text(max_size=40) | st.sampled_from([EVENTS, INSTANCE, "/metadata/versions"]),
    st.lists(st.tuples(st.text(max_size=12) | st.just("api-version"), st.text(max_size=12))),
    st.dictionaries(st.text(max_size=12) | st.just("metadata"), st.text(max_size=12)),
    st.binary(max_size=40) | st.none(),
)
def test_whatever_comes_in_there_is_an_answer(
    method: str,
    path: str,
    query: list[tuple[str, str]],
    headers: dict[str, str],
    body: bytes | None,
) -> None:
    answer = parse(method, path, query, headers, body)
    if isinstance(answer, HttpResponse):
        assert answer.status in {400, 404, 405}
        assert json.loads(answer.body)["error"]
