"""Rules about requests as such: the header, verbs, connections, error bodies."""

from __future__ import annotations

from caesura_metadata_conformance.exchange import Ask, Reply
from caesura_metadata_conformance.probe import EVENTS, EVENTS_VERSION, INSTANCE, MARK, Probe, start_requests
from caesura_metadata_conformance.rule import RuleBook, expect, expect_status, need

REQUESTS = RuleBook("R", "requests")
_IMDS = "instance-metadata-service.md"
_EVENTS = "scheduled-events.md"


def expect_error_body(reply: Reply) -> str:
    """The text of a documented error body."""
    body = reply.json()
    expect(
        isinstance(body, dict) and isinstance(body.get("error"), str) and body["error"],
        f'the body is not {{"error": "<text>"}}: {reply.text[:200]!r}',
    )
    kind = reply.headers.get("content-type", "")
    expect(kind.startswith("application/json"), f"Content-Type {kind!r} instead of application/json")
    return str(body["error"])


@REQUESTS.rule("GET of events is served", _EVENTS)
def _served(probe: Probe) -> None:
    expect_status(probe.get(), 200)


@REQUESTS.rule("GET of events without the Metadata header is 400", _EVENTS)
def _no_header(probe: Probe) -> None:
    expect_status(probe.get(headers=()), 400)


@REQUESTS.rule("POST without the Metadata header is 400", _EVENTS)
def _no_header_post(probe: Probe) -> None:
    expect_status(probe.post(start_requests(), headers=()), 400)


@REQUESTS.rule("GET of the instance without the Metadata header is 400", _IMDS)
def _no_header_instance(probe: Probe) -> None:
    expect_status(probe.get(INSTANCE, headers=()), 400)


@REQUESTS.rule("GET of the versions without the Metadata header is 400", _IMDS)
def _no_header_versions(probe: Probe) -> None:
    expect_status(probe.get("/metadata/versions", version="", headers=()), 400)


@REQUESTS.rule("Metadata: false is 400", _IMDS)
def _false(probe: Probe) -> None:
    expect_status(probe.get(headers=(("Metadata", "false"),)), 400)


@REQUESTS.rule("Metadata: True is accepted", "WALinuxAgent, azureimds, OpenTelemetry's detectors")
def _capital(probe: Probe) -> None:
    expect_status(probe.get(headers=(("Metadata", "True"),)), 200)


@REQUESTS.rule("The header's name counts in any case", "RFC 9110; samples of Azure")
def _lower(probe: Probe) -> None:
    expect_status(probe.get(headers=(("metadata", "true"),)), 200)


@REQUESTS.rule("The error about the header says so, in the documented body", _IMDS)
def _header_error(probe: Probe) -> None:
    text = expect_error_body(probe.get(headers=()))
    expect("required metadata header not specified" in text.lower(), f"it says {text!r}")


@REQUESTS.rule("A request with X-Forwarded-For is refused", _IMDS)
def _forwarded(probe: Probe) -> None:
    reply = probe.get(headers=(MARK, ("X-Forwarded-For", "192.0.2.1")))
    expect(400 <= reply.status < 500, f"status {reply.status}")


@REQUESTS.rule("A repeated query parameter is refused", _IMDS)
def _repeated(probe: Probe) -> None:
    reply = probe.get(query=f"api-version={EVENTS_VERSION}")
    expect(400 <= reply.status < 500, f"status {reply.status}")


@REQUESTS.rule("An unknown query parameter is ignored", "cloud-init, azure-init: extended=true")
def _unknown(probe: Probe) -> None:
    expect_status(probe.get(query="extended=true"), 200)


@REQUESTS.rule("PUT of events is 405", _IMDS)
def _put(probe: Probe) -> None:
    expect_status(probe.get(method="PUT"), 405)


@REQUESTS.rule("DELETE of events is 405", _IMDS)
def _delete(probe: Probe) -> None:
    expect_status(probe.get(method="DELETE"), 405)


@REQUESTS.rule("POST to the instance is 405", _IMDS)
def _post_instance(probe: Probe) -> None:
    expect_status(probe.get(INSTANCE, method="POST"), 405)


@REQUESTS.rule("405 has the documented body", _IMDS)
def _405_body(probe: Probe) -> None:
    reply = probe.get(method="PUT")
    expect_status(reply, 405)
    expect_error_body(reply)


@REQUESTS.rule("An endpoint that does not exist is 404", _IMDS)
def _404(probe: Probe) -> None:
    expect_status(probe.get("/metadata/nothing"), 404)


@REQUESTS.rule("404 has the documented body", _IMDS)
def _404_body(probe: Probe) -> None:
    reply = probe.get("/metadata/nothing")
    expect_status(reply, 404)
    expect_error_body(reply)


@REQUESTS.rule("A request without a Host header is 400", "RFC 9112, section 3.2")
def _no_host(probe: Probe) -> None:
    expect_status(probe.get(headers=(("Host", "-"), MARK)), 400)


@REQUESTS.rule("What is not HTTP is 400, in the documented body", "RFC 9110; no client gets a page to parse")
def _garbage(probe: Probe) -> None:
    reply = probe.send(Ask(target="", raw=b"NONSENSE\r\n\r\n"))[0]
    expect_status(reply, 400)
    expect_error_body(reply)


@REQUESTS.rule(
    "Two requests are answered on one connection, unless it is said to close", "RFC 9112, section 9.3"
)
def _kept(probe: Probe) -> None:
    closing = probe.get().headers.get("connection", "").lower() == "close"
    need(not closing, "it closes each connection, and says so")
    one = Ask(target=f"{EVENTS}?api-version={EVENTS_VERSION}", headers=(MARK,))
    for reply in probe.send(one, one):
        expect_status(reply, 200)


@REQUESTS.rule(
    "Connection: close is answered by Connection: close", "node-fetch 2 reuses a dead socket otherwise"
)
def _close(probe: Probe) -> None:
    reply = probe.get(headers=(MARK, ("Connection", "close")))
    said = reply.headers.get("connection", "")
    expect(said.lower() == "close", f"Connection: {said!r}")
