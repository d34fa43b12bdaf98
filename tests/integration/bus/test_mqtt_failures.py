"""What goes wrong between a client and a real broker: said in words, retried without haste, never fatal."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from structlog.testing import capture_logs

from caesura.bus.local_broker import LocalBroker, free_port
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Delivery, Will
from caesura.runtime.settings import Secret
from caesura_testing.broker import Certificates, mosquitto, mosquitto_installed
from caesura_testing.collector import PATIENCE_S, Collector, eventually, running
from caesura_testing.patience import patient
from caesura_testing.proxy import TcpProxy

Logs = Sequence[MutableMapping[str, Any]]

needs_mosquitto = pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")


@asynccontextmanager
async def trying(options: BrokerOptions, *, attempts: int = 2) -> AsyncIterator[tuple[MqttBus, Logs]]:
    """A bus that has failed to connect ``attempts`` times, and what it said about it."""
    bus = MqttBus(options)
    with capture_logs() as logs:
        task = asyncio.create_task(bus.run(Collector().receive))
        try:
            await eventually(lambda: sum(each["event"] == "bus.connect_failed" for each in logs) >= attempts)
            assert not bus.stats.connected
            assert bus.stats.last_error
            yield bus, [each for each in logs if each["event"] == "bus.connect_failed"]
        finally:
            await bus.close()
            await task


def options(url: str, **more: Any) -> BrokerOptions:
    return BrokerOptions(url=url, reconnect_min_s=0.05, reconnect_max_s=0.1, **more)


@needs_mosquitto
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_wrong_password_names_the_user_and_never_the_password(tmp_path: Path, protocol: str) -> None:
    async with mosquitto(tmp_path, users={"agent": "right"}) as broker:
        wrong = options(broker.url, username="agent", password=Secret("wrong-one"), protocol=protocol)
        async with trying(wrong) as (bus, logs):
            assert "refused the connection" in bus.stats.last_error
            assert "password of user 'agent'" in logs[0]["advice"]
            assert logs[0]["log_level"] == "warning"
            assert "wrong-one" not in str(logs)
        right = options(broker.url, username="agent", password=Secret("right"), protocol=protocol)
        async with running(MqttBus(right)):
            pass


@needs_mosquitto
async def test_with_users_a_client_id_cannot_be_taken_over_by_another_user(tmp_path: Path) -> None:
    async with mosquitto(tmp_path, users={"a": "1", "b": "2"}) as broker:
        first = MqttBus(options(broker.url, client_id="same", username="a", password=Secret("1")))
        second = MqttBus(options(broker.url, client_id="same", username="b", password=Secret("2")))
        async with running(first), running(second):
            await first.publish("x", b"")
            await second.publish("x", b"")
        assert first.stats.connects == second.stats.connects == 1


@needs_mosquitto
async def test_tls_and_mutual_tls(tmp_path: Path, certificates: Certificates) -> None:
    got = Collector()
    async with mosquitto(tmp_path, tls=certificates, require_certificate=True) as broker:
        trusted = {"ca_file": str(certificates.ca_file)}
        ours = {"cert_file": str(certificates.cert_file), "key_file": str(certificates.key_file)}
        url = f"mqtts://localhost:{broker.port}"
        bus = MqttBus(options(url, **trusted, **ours), filters=["a"])
        async with running(bus, got.receive):
            # More than one TLS record, in both directions.
            payload = bytes(200_000)
            await bus.publish("a", payload)
            await got.until_payload(payload)
        async with trying(options(url, **trusted)) as (_, logs):
            assert "certificate" in logs[0]["advice"]
        shown = tmp_path / "shown.key"
        shown.write_bytes(certificates.key_file.read_bytes())
        shown.chmod(0o644)
        async with trying(options(url, **trusted, **ours | {"key_file": str(shown)})) as (_, logs):
            assert "every user of this machine can use the key" in logs[0]["error"]
            assert logs[0]["advice"] == f"chmod 600 {shown}"


async def test_certificates_on_a_disk_that_hangs_do_not_hold_up_the_event_loop(
    tmp_path: Path, certificates: Certificates
) -> None:
    silent, good = tmp_path / "ca.crt", tmp_path / "good.crt"
    os.mkfifo(silent)  # as a file on a mount that does not answer
    good.write_bytes(certificates.ca_file.read_bytes())
    hung = options(f"mqtts://127.0.0.1:{free_port()}", ca_file=str(silent), connect_timeout_s=0.2)
    async with trying(hung) as (bus, logs):
        assert "cannot be read within 0.2 s" in logs[0]["error"]
        assert "mount" in logs[0]["advice"]
        # It answers at last: what hangs returns, and the file is read at the next attempt.
        with silent.open("r+b", buffering=0):
            good.replace(silent)
        await eventually(lambda: "nothing listens" in bus.stats.last_error)


@needs_mosquitto
async def test_holding_back_works_over_tls_where_records_hold_several_messages(
    tmp_path: Path, certificates: Certificates
) -> None:
    got = Collector()

    async def receive(delivery: Delivery) -> None:
        await asyncio.sleep(0)
        await got.receive(delivery)

    async with mosquitto(tmp_path, tls=certificates) as broker:
        url = f"mqtts://localhost:{broker.port}"
        secure = options(url, ca_file=str(certificates.ca_file), backlog_limit=2)
        slow, sender = MqttBus(secure, filters=["a"]), MqttBus(secure)
        wanted = {b"%d" % number for number in range(300)}
        async with running(slow, receive), running(sender):
            await asyncio.gather(*(sender.publish("a", payload) for payload in sorted(wanted)))
            await got.until(lambda deliveries: {each.payload for each in deliveries} == wanted)
        assert slow.stats.connects == 1


@needs_mosquitto
async def test_a_broker_of_another_authority_or_name_is_not_trusted(
    tmp_path: Path, certificates: Certificates, other_certificates: Certificates
) -> None:
    async with mosquitto(tmp_path, tls=certificates) as broker:
        url = f"mqtts://localhost:{broker.port}"
        async with trying(options(url, ca_file=str(other_certificates.ca_file))) as (_, logs):
            assert "certificate was not accepted" in logs[0]["error"]
            assert "CA file" in logs[0]["advice"]
        by_address = options(f"mqtts://127.0.0.1:{broker.port}", ca_file=str(certificates.ca_file))
        async with trying(by_address) as (_, logs):
            assert "127.0.0.1" in logs[0]["error"]
            assert "host name" in logs[0]["advice"]


@needs_mosquitto
async def test_tls_to_a_plain_port_and_plain_to_a_tls_port(
    tmp_path: Path, certificates: Certificates
) -> None:
    async with mosquitto(tmp_path, tls=certificates) as broker, trying(options(broker.url)) as (_, logs):
        assert "TLS" in logs[0]["advice"]
    async with LocalBroker(kind="mosquitto") as broker:
        url = f"mqtts://localhost:{broker.port}"
        async with trying(options(url, ca_file=str(certificates.ca_file))) as (_, logs):
            assert "TLS" in logs[0]["advice"]


@needs_mosquitto
async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "bus.sock"
    got = Collector()
    async with mosquitto(tmp_path, unix_path=path):
        bus = MqttBus(options(f"unix://{path}"), filters=["a"])
        async with running(bus, got.receive):
            await bus.publish("a", b"x")
            await got.until_payload(b"x")


@pytest.mark.parametrize(
    ("url", "error", "advice"),
    [
        ("mqtt://no-such-host.invalid", "'no-such-host.invalid' does not resolve", "DNS"),
        ("mqtt://two..dots", "'two..dots' does not resolve", "DNS"),
        ("mqtt://127.0.0.1:1", "nothing listens", "start the broker"),
        ("unix:///nowhere/bus.sock", "no socket at unix:///nowhere/bus.sock", "path"),
    ],
)
async def test_a_broker_that_is_not_there(url: str, error: str, advice: str) -> None:
    async with trying(options(url, connect_timeout_s=3)) as (bus, logs):
        assert error in logs[0]["error"]
        assert advice in logs[0]["advice"]
        assert error in bus.stats.last_error


async def test_a_missing_ca_file_is_named() -> None:
    async with trying(options("mqtts://localhost:8883", ca_file="/nowhere/ca.pem")) as (bus, _):
        assert "/nowhere/ca.pem" in bus.stats.last_error


async def test_a_broker_that_accepts_and_says_nothing() -> None:
    async with TcpProxy("127.0.0.1", 1) as proxy:
        proxy.stall()
        silent = options(proxy.url, connect_timeout_s=0.2, protocol="5")
        async with trying(silent) as (bus, logs):
            assert "does not answer" in bus.stats.last_error
            assert "load" in logs[0]["advice"]


async def test_a_broker_that_hangs_up() -> None:
    async with (
        TcpProxy("127.0.0.1", free_port()) as proxy,
        trying(options(proxy.url), attempts=3) as (bus, logs),
    ):
        assert "ended before the broker answered" in bus.stats.last_error
        assert "TLS" in logs[0]["advice"]


def _more(proxy: TcpProxy, than: int) -> bool:
    return proxy.connections > than


async def test_a_stalled_handshake_can_be_cancelled_at_once() -> None:
    async with TcpProxy("127.0.0.1", 1) as proxy:
        proxy.stall()
        for scheme in ("mqtt", "mqtts"):
            bus = MqttBus(options(f"{scheme}://127.0.0.1:{proxy.port}", connect_timeout_s=60))
            before = proxy.connections
            task = asyncio.create_task(bus.run(Collector().receive))
            await eventually(partial(_more, proxy, before))
            task.cancel()
            async with asyncio.timeout(patient(2)):
                await asyncio.wait({task})
            assert task.cancelled()


@needs_mosquitto
async def test_a_black_hole_is_noticed_by_keepalive_and_left() -> None:
    got = Collector()
    async with LocalBroker(kind="mosquitto") as broker, TcpProxy("127.0.0.1", broker.port) as proxy:
        bus = MqttBus(options(proxy.url, keepalive_s=1, connect_timeout_s=0.5), filters=["a"])
        async with running(bus, got.receive):
            proxy.stall()
            await eventually(lambda: not bus.stats.connected)
            proxy.flow()
            await eventually(lambda: bus.stats.connected)
            await bus.publish("a", b"x")
            await got.until_payload(b"x")
        assert bus.stats.connects == 2


@needs_mosquitto
async def test_a_handler_that_blocks_reading_longer_than_keepalive_keeps_the_connection() -> None:
    go = asyncio.Event()
    got = Collector()

    async def receive(delivery: Delivery) -> None:
        await go.wait()
        await got.receive(delivery)

    async with LocalBroker(kind="mosquitto") as broker:
        slow = MqttBus(options(broker.url, keepalive_s=1, backlog_limit=5), filters=["a"])
        sender = MqttBus(options(broker.url))
        async with running(slow, receive), running(sender):
            for number in range(50):
                await sender.publish("a", b"%d" % number)
            # Not an event: the point is that nothing happens for three keepalives.
            await asyncio.sleep(3.2)
            assert slow.stats.connected
            assert slow.stats.backlog <= 6
            go.set()
            await got.until(lambda deliveries: len(deliveries) == 50)
        assert slow.stats.connects == 1


@needs_mosquitto
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_fight_over_a_client_id_is_reported_and_slows_down(protocol: Literal["5", "3.1.1"]) -> None:
    """Mosquitto 2.0.11 does not say "session taken over" even in version 5: the pattern has to do."""
    async with LocalBroker(kind="mosquitto") as broker:
        quick = BrokerOptions(
            url=broker.url, client_id="twin", protocol=protocol, reconnect_min_s=0.02, reconnect_max_s=600
        )
        first, second = MqttBus(quick, uniform=min), MqttBus(quick, uniform=min)
        with capture_logs() as logs:
            async with running(first), running(second):
                await eventually(lambda: any(each["event"] == "bus.connection_unstable" for each in logs))
                await eventually(
                    lambda: [each for each in logs if each["event"] == "bus.reconnecting"][-1]["in_s"] >= 300
                )
        unstable = next(each for each in logs if each["event"] == "bus.connection_unstable")
        assert "same client id" in unstable["advice"]
        assert first.stats.connects + second.stats.connects <= 7


async def test_auto_finds_3_1_1_where_the_broker_cannot_read_version_5(tmp_path: Path) -> None:
    """amqtt refuses a plain CONNECT of version 5, and misreads one with a user or a will and waits for more."""
    async with LocalBroker(kind="embedded", data_dir=tmp_path) as broker:
        for will in (None, Will("gone", b"gone")):
            got = Collector()
            bus = MqttBus(
                options(broker.url, client_id="auto", connect_timeout_s=0.5), filters=["a"], will=will
            )
            with capture_logs() as logs:
                async with running(bus, got.receive):
                    await bus.publish("a", b"x")
                    await got.until_payload(b"x")
            spoken = [each["protocol"] for each in logs if each["event"] == "bus.connected"]
            assert spoken == ["3.1.1"]


async def test_the_learned_protocol_is_remembered(tmp_path: Path) -> None:
    async with (
        LocalBroker(kind="embedded", data_dir=tmp_path) as broker,
        TcpProxy(broker.host, broker.port) as proxy,
    ):
        bus = MqttBus(options(proxy.url))
        async with running(bus):
            assert proxy.connections == 2  # one for each version
            proxy.cut()
            await eventually(lambda: bus.stats.connects == 2)
            assert proxy.connections == 3


async def test_reconnect_delays_come_from_the_random_source_and_grow() -> None:
    asked: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        asked.append((low, high))
        return 0.0

    bus = MqttBus(
        BrokerOptions(url=f"mqtt://127.0.0.1:{free_port()}", reconnect_min_s=1, reconnect_max_s=5),
        uniform=uniform,
    )
    task = asyncio.create_task(bus.run(Collector().receive))
    await eventually(lambda: len(asked) >= 4)
    await bus.close()
    await task
    assert asked[:4] == [(1, 2), (1, 4), (1, 5), (1, 5)]


@needs_mosquitto
async def test_no_warning_of_the_libraries_for_a_burst_of_publishes(caplog: pytest.LogCaptureFixture) -> None:
    async with LocalBroker(kind="mosquitto") as broker:
        bus = MqttBus(options(broker.url, max_in_flight=100))
        async with running(bus):
            await asyncio.wait_for(
                asyncio.gather(*(bus.publish("a", b"x") for _ in range(500))), timeout=PATIENCE_S
            )
    assert [each.message for each in caplog.records if each.name != "caesura.bus"] == []
