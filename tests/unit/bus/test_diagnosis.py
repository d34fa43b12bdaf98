"""Every failure has words of its own, and advice; the words of real failures are in the integration tests."""

from __future__ import annotations

import pytest

from caesura.bus import diagnosis
from caesura.bus.diagnosis import (
    ClosedEarly,
    ConnectionLost,
    ConnectRefused,
    ConnectTimeout,
    NoBrokerReached,
    SubscribeRefused,
    explain,
)
from caesura.bus.options import BrokerOptions, parse_address

OPTIONS = BrokerOptions(url="mqtt://broker:1883", client_id="host-1", username="updater")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectRefused(diagnosis.BAD_USER_OR_PASSWORD, "x"), "password of user 'updater'"),
        (ConnectRefused(diagnosis.NOT_AUTHORIZED, "x"), "password of user 'updater'"),
        (ConnectRefused(diagnosis.UNSUPPORTED_PROTOCOL, "x"), "protocol to 'auto'"),
        (ConnectRefused(diagnosis.CLIENT_ID_NOT_VALID, "x"), "client id 'host-1'"),
        (ConnectRefused(diagnosis.SERVER_UNAVAILABLE, "x"), "its log"),
        (ConnectRefused(0x80, "x"), "broker's log"),
        (ConnectionLost(diagnosis.SESSION_TAKEN_OVER, "x"), "id 'host-1'"),
        (ConnectionLost(0, "x"), "broker's log"),
        (SubscribeRefused(["a/#"]), "read access"),
        (ClosedEarly("x"), "mqtts://"),
        (ConnectTimeout(), "load"),
        (TimeoutError(), "firewall"),
        (ConnectionResetError(), "TLS"),
        (PermissionError(13, "denied", "/run/bus.sock"), "access"),
        (OSError(113, "No route to host"), "network"),
    ],
)
def test_advice(error: BaseException, words: str) -> None:
    explained = explain(error, OPTIONS)
    assert words in explained.hint
    assert explained.summary


def test_what_was_refused_is_named() -> None:
    assert "a/#, b" in explain(SubscribeRefused(["a/#", "b"]), OPTIONS).summary


def test_of_several_brokers_each_is_named_with_its_reason_and_advice_comes_once() -> None:
    a, b, c = (parse_address(f"mqtt://{each}") for each in "abc")
    refused = ConnectionRefusedError()
    error = NoBrokerReached({a: refused, b: ConnectRefused(diagnosis.SERVER_UNAVAILABLE, "busy"), c: refused})
    problem = explain(error, OPTIONS)
    assert problem.summary == (
        "nothing listens at mqtt://a:1883; mqtt://b:1883: the broker refused the connection: busy; nothing listens at mqtt://c:1883"
    )
    assert problem.hint.count("start the broker") == 1
    assert "not serving" in problem.hint
