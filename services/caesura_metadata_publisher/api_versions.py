"""The api-versions of the two endpoint families, as data.

Source: Microsoft's "Scheduled Events for Linux VMs" (version table) and "Azure Instance Metadata Service"
(supported API versions), azure-compute-docs 2026. The two sets differ: 2020-07-01 is an events version only,
2021-02-01 an instance version only.
"""

from __future__ import annotations

import msgspec

_FIRST_MEMBERS = ("EventId", "EventStatus", "EventType", "ResourceType", "Resources", "NotBefore")
_FIRST_TYPES = ("Freeze", "Reboot", "Redeploy")


class EventsVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What one api-version of ``/metadata/scheduledevents`` shows and asks for."""

    version: str
    members: tuple[str, ...]
    types: tuple[str, ...]
    header_required: bool = True
    name_prefix: str = ""
    """The prefix of each resource name."""


EVENTS_VERSIONS: tuple[EventsVersion, ...] = (
    EventsVersion(
        version="2020-07-01",
        members=(*_FIRST_MEMBERS, "Description", "EventSource", "DurationInSeconds"),
        types=(*_FIRST_TYPES, "Preempt", "Terminate"),
    ),
    EventsVersion(
        version="2019-08-01",
        members=(*_FIRST_MEMBERS, "Description", "EventSource"),
        types=(*_FIRST_TYPES, "Preempt", "Terminate"),
    ),
    EventsVersion(
        version="2019-04-01",
        members=(*_FIRST_MEMBERS, "Description"),
        types=(*_FIRST_TYPES, "Preempt", "Terminate"),
    ),
    EventsVersion(
        version="2019-01-01", members=_FIRST_MEMBERS, types=(*_FIRST_TYPES, "Preempt", "Terminate")
    ),
    EventsVersion(version="2017-11-01", members=_FIRST_MEMBERS, types=(*_FIRST_TYPES, "Preempt")),
    EventsVersion(version="2017-08-01", members=_FIRST_MEMBERS, types=_FIRST_TYPES),
    EventsVersion(
        version="2017-03-01",
        members=_FIRST_MEMBERS,
        types=_FIRST_TYPES,
        header_required=False,
        name_prefix="_",
    ),
)
"""Newest first."""

INSTANCE_VERSIONS: tuple[str, ...] = (
    "2025-04-07",
    "2024-07-17",
    "2024-03-15",
    "2023-11-15",
    "2023-07-01",
    "2021-12-13",
    "2021-11-15",
    "2021-11-01",
    "2021-10-01",
    "2021-08-01",
    "2021-05-01",
    "2021-03-01",
    "2021-02-01",
    "2021-01-01",
    "2020-12-01",
    "2020-10-01",
    "2020-09-01",
    "2020-07-15",
    "2020-06-01",
    "2019-11-01",
    "2019-08-15",
    "2019-08-01",
    "2019-06-04",
    "2019-06-01",
    "2019-04-30",
    "2019-03-11",
    "2019-02-01",
    "2018-10-01",
    "2018-04-02",
    "2018-02-01",
    "2017-12-01",
    "2017-10-01",
    "2017-08-01",
    "2017-04-02",
    "2017-03-01",
)
"""Newest first; all are dates, so text order is age order."""


def events_version(version: str) -> EventsVersion | None:
    """The events version of this name, None for an unknown one."""
    return next((each for each in EVENTS_VERSIONS if each.version == version), None)
