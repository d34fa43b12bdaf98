"""What a request must look like, and the error bodies where it does not. Pure.

The rules are Azure's (instance-metadata-service.md and scheduled-events.md of azure-compute-docs) as real
clients use them: ``Metadata: True`` passes, the Content-Type of a POST is ignored, unknown query
parameters are tolerated, repeated ones are not, and a request that came through a proxy is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from caesura_metadata_publisher.api_versions import (
    EVENTS_VERSIONS,
    INSTANCE_VERSIONS,
    EventsVersion,
    events_version,
)
from caesura_metadata_publisher.start_requests import MalformedPayload, event_ids

MAX_BODY_BYTES = 64 * 1024  # over a thousand approvals; a real client sends a handful

_JSON = "application/json; charset=utf-8"
_MOST_WHY = 200  # characters: a parser's message quotes what it did not understand
_MORE = "For more information refer to aka.ms/azureimds"


class HttpResponse(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP answer, independent of the HTTP library."""

    status: int
    body: bytes = b""
    content_type: str = _JSON
    headers: Mapping[str, str] = {}


class ReadEvents(msgspec.Struct, frozen=True):
    """GET /metadata/scheduledevents."""

    version: EventsVersion
    if_none_match: str = ""


class ApproveEvents(msgspec.Struct, frozen=True):
    """POST /metadata/scheduledevents."""

    event_ids: tuple[str, ...]


class ReadInstance(msgspec.Struct, frozen=True):
    """GET /metadata/instance, or an element below it."""

    version: str
    path: tuple[str, ...]
    format: Literal["json", "text"]


class ReadVersions(msgspec.Struct, frozen=True):
    """GET /metadata/versions."""


Request = ReadEvents | ApproveEvents | ReadInstance | ReadVersions


_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "scheduledevents": ("GET", "POST"),
    "instance": ("GET",),
    "versions": ("GET",),
    "identity": ("GET",),
    "attested": ("GET",),
    "loadbalancer": ("GET",),
}
"""Verbs by endpoint."""

_WITH_PATHS = frozenset({"instance", "identity", "attested"})
"""Endpoints that have elements below them."""


def parse(
    method: str,
    path: str,
    query: Sequence[tuple[str, str]],
    headers: Mapping[str, str],
    body: bytes | None,
) -> Request | HttpResponse:
    """The request, or the answer that refuses it.

    Args:
        path: decoded, without the query.
        query: name and value pairs in order, repeated names included.
        headers: names in lower case.
        body: None for one that is larger than ``MAX_BODY_BYTES``.
    """
    segments = path.split("/")
    while segments and segments[-1] == "":
        segments = segments[:-1]
    if len(segments) < 2 or segments[0] != "" or segments[1].lower() != "metadata":
        return not_found()
    if len(segments) == 2:
        return _root(method, query, headers)
    endpoint, rest = segments[2].lower(), tuple(segments[3:])
    allowed = _ALLOWED.get(endpoint)
    if allowed is None or (rest and endpoint not in _WITH_PATHS):
        return not_found()
    if method not in allowed:
        return _wrong_method(method, allowed)
    refused = _refused(query, headers, header_required=_header_required(endpoint, query))
    if refused is not None:
        return refused
    match endpoint:
        case "versions":
            return ReadVersions()
        case "instance":
            return _instance(rest, query)
        case "scheduledevents":
            return _events(method, query, headers, body)
        case "identity":
            return _no_identity()
        case _:
            return _not_offered(endpoint)


def bad_request(why: str) -> HttpResponse:
    """400 with the reason."""
    return HttpResponse(status=400, body=error_body(f"Bad request. {why}"))


def not_http(why: str) -> HttpResponse:
    """400 for what is not HTTP, in the documented form. The connection ends with it."""
    text = " ".join(why.split())[:_MOST_WHY]
    return HttpResponse(status=400, body=error_body(f"Bad request. {text}"), headers={"Connection": "close"})


def too_slow() -> HttpResponse:
    """408: the body did not arrive in time. The connection ends with it."""
    return HttpResponse(
        status=408,
        body=error_body("Request Timeout. The payload did not arrive in time."),
        headers={"Connection": "close"},
    )


def foreign_host(host: str) -> HttpResponse:
    """421: a browser that was sent here by somebody else's host name must get nothing."""
    return HttpResponse(
        status=421,
        body=error_body(
            f"This is not known to be {host[:253]!r}. If it is: name it in CAESURA_METADATA_PUBLISHER_HTTP_HOSTS."
        ),
    )


def not_found() -> HttpResponse:
    """404: the element does not exist."""
    return HttpResponse(status=404, body=error_body("Not found. The requested element does not exist."))


def too_many() -> HttpResponse:
    """429: more requests than the real service takes. Its body is not documented."""
    return HttpResponse(
        status=429, body=error_body("Too Many Requests. At most 5 requests a second are served.")
    )


def service_error(why: str) -> HttpResponse:
    """500: retry after some time. Clients retry this one (cloud-init, azure-init, WALinuxAgent)."""
    return HttpResponse(status=500, body=error_body(f"Service Error. {why} Retry after some time."))


def error_body(text: str, **more: object) -> bytes:
    """``{"error": text}``, the shape of ErrorResponse in Azure's IMDS swagger."""
    return msgspec.json.encode({"error": text, **more})


def _refused(
    query: Sequence[tuple[str, str]], headers: Mapping[str, str], *, header_required: bool
) -> HttpResponse | None:
    if "x-forwarded-for" in headers:
        return bad_request("Requests through a proxy (X-Forwarded-For) are not served.")
    if header_required and headers.get("metadata", "").strip().lower() != "true":
        return bad_request("Required metadata header not specified.")
    names = [name.lower() for name, _ in query]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        return bad_request(f"Query parameter {repeated[0]} is given more than once.")
    return None


def _wrong_method(method: str, allowed: Sequence[str]) -> HttpResponse:
    return HttpResponse(
        status=405,
        body=error_body(f"Method Not Allowed. {method[:32]} is not supported on this endpoint."),
        headers={"Allow": ", ".join(allowed)},
    )


def _root(method: str, query: Sequence[tuple[str, str]], headers: Mapping[str, str]) -> HttpResponse:
    """``/metadata`` itself. What it answers with a good api-version is not documented: it lists nothing here."""
    if method != "GET":
        return _wrong_method(method, ("GET",))
    return _refused(query, headers, header_required=True) or _bad_version(INSTANCE_VERSIONS)


def _no_identity() -> HttpResponse:
    """What a VM without a managed identity gets: SDKs then try their next source at once, while they repeat a 404 for 24 s.

    In the form of OAuth (RFC 6749, section 5.2), as azure-identity and MSAL read it.
    """
    return HttpResponse(
        status=400, body=error_body("invalid_request", error_description="Identity not found")
    )


def _not_offered(endpoint: str) -> HttpResponse:
    """400, which no client repeats. A real load balancer's metadata is 404 where there is none; clients repeat that one.

    Attested data is signed by Azure, so nothing here could stand for it.
    """
    what = (
        "Attested data is signed by Azure, and this is not Azure."
        if endpoint == "attested"
        else "No load balancer metadata is found."
    )
    return bad_request(what)


def _header_required(endpoint: str, query: Sequence[tuple[str, str]]) -> bool:
    version = events_version(_value(query, "api-version")) if endpoint == "scheduledevents" else None
    return version is None or version.header_required


def _events(
    method: str, query: Sequence[tuple[str, str]], headers: Mapping[str, str], body: bytes | None
) -> Request | HttpResponse:
    version = events_version(_value(query, "api-version"))
    if version is None:
        return _bad_version([each.version for each in EVENTS_VERSIONS])
    if method == "GET":
        return ReadEvents(version, headers.get("if-none-match", ""))
    if body is None:
        return bad_request(f"The payload is larger than {MAX_BODY_BYTES} bytes.")
    if headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
        # No client compresses some hundred bytes. The real answer is not documented.
        return bad_request("A payload with a Content-Encoding is not read.")
    try:
        return ApproveEvents(event_ids(body))
    except MalformedPayload:
        return bad_request('The payload must be {"StartRequests": [{"EventId": "..."}]}.')


def _instance(path: tuple[str, ...], query: Sequence[tuple[str, str]]) -> Request | HttpResponse:
    version = _value(query, "api-version")
    if version not in INSTANCE_VERSIONS:
        return _bad_version(INSTANCE_VERSIONS)
    match _value(query, "format").lower():
        case "" | "json":
            return ReadInstance(version, path, "json")
        case "text":
            return ReadInstance(version, path, "text")
        case other:
            return bad_request(f"Format {other!r} is not supported: json or text.")


def _bad_version(known: Sequence[str]) -> HttpResponse:
    text = f"Bad request. api-version is invalid or was not specified in the request. {_MORE}"
    return HttpResponse(status=400, body=error_body(text, **{"newest-versions": list(known[:3])}))


def _value(query: Sequence[tuple[str, str]], name: str) -> str:
    return next((value for key, value in query if key.lower() == name), "")
