"""Rules about api-versions."""

from __future__ import annotations

from typing import Any

from caesura_metadata_conformance.exchange import Reply
from caesura_metadata_conformance.probe import INSTANCE, Probe, start_requests
from caesura_metadata_conformance.requests import expect_error_body
from caesura_metadata_conformance.rule import RuleBook, expect, expect_status

VERSIONS = RuleBook("V", "api-versions")
_IMDS = "instance-metadata-service.md"
_EVENTS = "scheduled-events.md"

EVENTS_VERSIONS = (
    "2017-03-01",
    "2017-08-01",
    "2017-11-01",
    "2019-01-01",
    "2019-04-01",
    "2019-08-01",
    "2020-07-01",
)
_INSTANCE_VERSIONS = ("2017-04-02", "2019-06-01", "2021-02-01", "2025-04-07")
"""Some that clients use, and the newest."""


def _accepts(version: str) -> Any:
    def check(probe: Probe) -> None:
        reply = probe.get(version=version)
        expect_status(reply, 200)
        expect(isinstance(reply.json(), dict), "the body is not a document")

    return check


for _each in EVENTS_VERSIONS:
    VERSIONS.add(f"Events are served with api-version {_each}", _EVENTS, _accepts(_each))


def _expect_newest(reply: Reply) -> None:
    expect_status(reply, 400)
    body = reply.json()
    newest = body.get("newest-versions") if isinstance(body, dict) else None
    expect(isinstance(newest, list) and len(newest) == 3, f"newest-versions is {newest!r}")
    expect(
        newest == sorted(map(str, newest or []), reverse=True),
        f"newest-versions is not newest first: {newest!r}",
    )


@VERSIONS.rule("Events without an api-version are 400", _EVENTS)
def _missing(probe: Probe) -> None:
    expect_status(probe.get(version=""), 400)


@VERSIONS.rule("Events with an unknown api-version are 400", _EVENTS)
def _unknown(probe: Probe) -> None:
    expect_status(probe.get(version="1999-01-01"), 400)


@VERSIONS.rule("The error about the api-version says so, in the documented body", _IMDS)
def _said(probe: Probe) -> None:
    text = expect_error_body(probe.get(version=""))
    expect("api-version" in text, f"it says {text!r}")


@VERSIONS.rule("It names the three newest versions, newest first", "MSAL for .NET and Node, Chef Ohai")
def _newest(probe: Probe) -> None:
    _expect_newest(probe.get(version=""))


@VERSIONS.rule("POST without an api-version is 400", _EVENTS)
def _post(probe: Probe) -> None:
    expect_status(probe.post(start_requests(), version=""), 400)


@VERSIONS.rule("The instance without an api-version is 400 and names the newest versions", _IMDS)
def _instance(probe: Probe) -> None:
    _expect_newest(probe.get(INSTANCE, version=""))


@VERSIONS.rule("The instance does not take an api-version that only events have (2020-07-01)", _IMDS)
def _other_set(probe: Probe) -> None:
    expect_status(probe.get(INSTANCE, version="2020-07-01"), 400)


def _instance_accepts(version: str) -> Any:
    def check(probe: Probe) -> None:
        expect_status(probe.get(INSTANCE, version=version), 200)

    return check


for _each in _INSTANCE_VERSIONS:
    VERSIONS.add(f"The instance is served with api-version {_each}", _IMDS, _instance_accepts(_each))


@VERSIONS.rule("The versions are listed without an api-version, oldest first", _IMDS)
def _list(probe: Probe) -> None:
    reply = probe.get("/metadata/versions", version="")
    expect_status(reply, 200)
    body = reply.json()
    listed = body.get("apiVersions") if isinstance(body, dict) else None
    expect(
        isinstance(listed, list) and listed and listed == sorted(map(str, listed)),
        f"apiVersions is {listed!r}",
    )


@VERSIONS.rule("Every listed version is one of the instance", _IMDS)
def _list_true(probe: Probe) -> None:
    body = probe.get("/metadata/versions", version="").json()
    listed = body.get("apiVersions") if isinstance(body, dict) else None
    expect(isinstance(listed, list) and listed, f"apiVersions is {listed!r}")
    for version in (listed or [])[:: max(1, len(listed or []) // 3)]:
        reply = probe.get(INSTANCE, version=str(version))
        expect(reply.status == 200, f"{version} is listed and answered with {reply.status}")
