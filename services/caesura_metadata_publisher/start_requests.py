"""The payload of an approval: ``{"StartRequests": [{"EventId": "..."}]}``, as clients really write it. Pure.

Accepted beyond the documented form: a UTF-8 byte order mark (PowerShell's ``Out-File``), one object where a list of one is meant
(``ConvertTo-Json`` unrolls it), and names in other case. Whether the real service takes them is not documented; refusing them
would find no error in a program that works there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

_BOM = b"\xef\xbb\xbf"


class MalformedPayload(ValueError):
    """It is not a list of events to start."""


def event_ids(body: bytes) -> tuple[str, ...]:
    """The ids of the events that may start, as they were written.

    Raises:
        MalformedPayload: it is something else.
    """
    try:
        payload = msgspec.json.decode(body.removeprefix(_BOM))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedPayload(str(error)) from error
    requests = _member(payload, "StartRequests")
    if isinstance(requests, Mapping):
        requests = [requests]
    if not isinstance(requests, list):
        raise MalformedPayload("StartRequests is not a list")
    found = [_member(each, "EventId") for each in requests]
    if not all(isinstance(each, str) for each in found):
        raise MalformedPayload("an EventId is not a string")
    return tuple(found)


def _member(value: Any, name: str) -> Any:
    """A member by its name, in its own case if there is one, else in any; None if there is none."""
    if not isinstance(value, Mapping):
        return None
    if name in value:
        return value[name]
    wanted = name.lower()
    return next((member for key, member in value.items() if key.lower() == wanted), None)
