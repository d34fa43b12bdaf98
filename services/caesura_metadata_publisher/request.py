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

MAX_BODY_BYTES = 64 * 1024  # over a thousand approvals; a real client sends a handful

_JSON = "application/json; charset=utf-8"
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


class _StartRequest(msgspec.Struct):
    event_id: str = msgspec.field(name="EventId")


class _StartRequests(msgspec.Struct):
    start_requests: list[_StartRequest] = msgspec.field(name="StartRequests")


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
    if segments[:1] != [""] or len(segments) < 3 or segments[1].lower() != "metadata":
        return not_found()
    endpoint, rest = segments[2].lower(), tuple(segments[3:])
    while rest and rest[-1] == "":
        rest = rest[:-1]
    allowed = {"scheduledevents": ("GET", "POST"), "instance": ("GET",), "versions": ("GET",)}.get(endpoint)
    if allowed is None or (rest and endpoint != "instance"):
        return not_found()
    if method not in allowed:
        return HttpResponse(
            status=405,
            body=error_body(f"Method Not Allowed. {method} is not supported on this endpoint."),
            headers={"Allow": ", ".join(allowed)},
        )
    refused = _refused(query, headers, header_required=_header_required(endpoint, query))
    if refused is not None:
        return refused
    if endpoint == "versions":
        return ReadVersions()
    if endpoint == "instance":
        return _instance(rest, query)
    return _events(method, query, headers, body)


def bad_request(why: str) -> HttpResponse:
    """400 with the reason."""
    return HttpResponse(status=400, body=error_body(f"Bad request. {why}"))


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
    try:
        asked = msgspec.json.decode(body, type=_StartRequests)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return bad_request('The payload must be {"StartRequests": [{"EventId": "..."}]}.')
    return ApproveEvents(tuple(each.event_id for each in asked.start_requests))


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
