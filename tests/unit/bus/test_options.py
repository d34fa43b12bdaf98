from __future__ import annotations

import re
from typing import Any

import pytest

from caesura.bus.options import (
    Address,
    BrokerOptions,
    BrokerOptionsError,
    options_from,
    parse_address,
    parse_addresses,
)
from caesura.runtime.settings import Secret, ServiceSettings


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mqtt://broker", Address("mqtt", "broker", 1883)),
        ("mqtt://broker:1884", Address("mqtt", "broker", 1884)),
        ("mqtts://broker", Address("mqtts", "broker", 8883)),
        ("mqtt://[::1]:1883", Address("mqtt", "::1", 1883)),
        ("unix:///run/bus.sock", Address("unix", path="/run/bus.sock")),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert parse_address(url) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "broker:1883",
        "http://broker",
        "mqtt://",
        "mqtt://broker:port",
        "mqtt://broker:99999",
        "unix://bus.sock",
        "mqtt://[::1",
    ],
)
def test_an_address_that_makes_no_sense_is_answered_with_an_example(url: str) -> None:
    with pytest.raises(BrokerOptionsError, match="mqtts://host:8883"):
        BrokerOptions(url=url)


@pytest.mark.parametrize(
    ("url", "addresses"),
    [
        ("mqtt://a", ["mqtt://a:1883"]),
        ("mqtts://a,b:8884, c", ["mqtts://a:8883", "mqtts://b:8884", "mqtts://c:8883"]),
        ("mqtt://a,mqtt://[::1]:1884,mqtt://a:1883", ["mqtt://a:1883", "mqtt://[::1]:1884"]),
        ("unix:///run/a,b", ["unix:///run/a,b"]),
    ],
)
def test_the_addresses_of_a_cluster(url: str, addresses: list[str]) -> None:
    options = BrokerOptions(url=url)
    assert [str(each) for each in options.addresses] == addresses
    assert parse_addresses(",".join(addresses)) == options.addresses
    assert options.at(options.addresses[-1]).address == options.addresses[-1]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mqtts://a,mqtt://b", "mixes mqtts:// and mqtt://"),
        ("mqtt://a,", "not a broker url"),
        ("mqtt://a,,b", "not a broker url"),
        ("mqtt://a,unix:///b", "mixes mqtt:// and unix://"),
        ("mqtt://a,me:hunter2@b", "may not hold a user"),
    ],
)
def test_addresses_that_are_no_cluster(url: str, words: str) -> None:
    with pytest.raises(BrokerOptionsError, match=words) as error:
        BrokerOptions(url=url)
    assert "hunter2" not in str(error.value)


def test_a_password_in_the_url_is_refused_without_showing_it() -> None:
    with pytest.raises(BrokerOptionsError) as error:
        BrokerOptions(url="mqtt://user:hunter2@broker")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"clean": False}, "client_id"),
        ({"cert_file": "c.pem", "url": "mqtts://b"}, "key_file"),
        ({"ca_file": "ca.pem"}, "mqtts://"),
        ({"keepalive_s": 0}, "keepalive_s"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"backlog_limit": 0}, "backlog_limit"),
        ({"backlog_bytes": 0}, "backlog_bytes"),
        ({"reconnect_min_s": 0}, "reconnect_min_s"),
        ({"reconnect_min_s": 2, "reconnect_max_s": 1}, "reconnect_min_s"),
        ({"connect_timeout_s": 0}, "connect_timeout_s"),
    ],
)
def test_options_that_contradict_each_other(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(BrokerOptionsError, match=words):
        BrokerOptions(**wrong)


def test_the_password_is_not_shown() -> None:
    assert "hunter2" not in repr(BrokerOptions(username="u", password=Secret("hunter2")))


def test_options_come_from_a_services_settings() -> None:
    settings = ServiceSettings(
        broker_url="mqtts://b",
        broker_username="u",
        broker_password=Secret("p"),
        broker_protocol="5",
        broker_ca_file="/ca",
    )
    options = options_from(settings, client_id="me", clean=False)
    assert (options.url, options.username, options.password.reveal()) == ("mqtts://b", "u", "p")
    assert (options.client_id, options.clean, options.protocol, options.ca_file) == ("me", False, "5", "/ca")


def test_at_a_cluster_only_who_has_a_new_id_has_a_clean_session() -> None:
    """A clean session's queue is on one node of RabbitMQ: a host was off the bus for as long as the node that died."""
    one, cluster = ServiceSettings(broker_url="mqtt://a"), ServiceSettings(broker_url="mqtt://a,b")
    assert options_from(one, client_id="host").clean
    assert not options_from(cluster, client_id="host").clean
    assert options_from(cluster, client_id="ctl-1f", new_id=True).clean
    assert not options_from(one, client_id="agent", clean=False).clean


def test_without_tls_there_is_no_tls_context() -> None:
    assert BrokerOptions().tls() is None


def test_at_a_cluster_the_client_id_has_a_code_that_is_not_in_the_name_that_logs_have() -> None:
    settings = ServiceSettings(broker_url="mqtts://a,b", broker_password=Secret("x"))
    options = options_from(settings, client_id="me")
    assert options.client_id == "me"
    assert options.identifier.removeprefix("me-") not in repr(options)
    assert re.fullmatch("me-[0-9a-f]{16}", options.identifier)
    other = options_from(
        ServiceSettings(broker_url="mqtts://a,b", broker_password=Secret("y")), client_id="me"
    )
    assert options.identifier != other.identifier
    alone = options_from(ServiceSettings(broker_url="mqtts://a", broker_password=Secret("x")), client_id="me")
    assert alone.identifier == "me"
