"""The publisher over real HTTP, with real clients; the bus is in memory and the coordinator is played here."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import aiohttp
import pytest

from caesura.bus.local_broker import LocalBroker, find_mosquitto, free_port
from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Bus, Delivery
from caesura.contract.codec import decode
from caesura.contract.envelope import Header
from caesura.contract.messages import (
    HostInventory,
    PublisherPresence,
    ScheduledEvent,
    SetDocument,
    VmApproved,
    VmDetails,
    VmInterface,
    VmRecord,
)
from caesura.runtime.health import ListenError
from caesura_metadata_publisher.http import serve_metadata
from caesura_metadata_publisher.listeners import Listener
from caesura_metadata_publisher.service import MetadataPublisher, filters
from caesura_metadata_publisher.settings import MetadataPublisherSettings
from caesura_testing.activated import activated
from caesura_testing.patience import patient

ID = "c7061bac-afdc-4513-b24b-aa5f13a16123"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
HEADERS = {"Metadata": "true"}


def event(
    status: Literal["scheduled", "started"] = "scheduled",
    *,
    approved: bool = False,
    event_id: str = ID,
    notice_s: float = 60,
) -> ScheduledEvent:
    return ScheduledEvent(
        event_id=event_id,
        event_type="Freeze",
        status=status,
        resources=("web-1", "web-2"),
        not_before=datetime.now(UTC) + timedelta(seconds=notice_s),
        duration_s=9,
        approved=approved,
    )


def start_request(*ids: str) -> str:
    return json.dumps({"StartRequests": [{"EventId": each} for each in ids]})


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that can only be polled, as clients of this API do."""
    async with asyncio.timeout(patient(15)):
        while not await condition():  # noqa: ASYNC110 - an HTTP answer has no event to wait for
            await asyncio.sleep(0.005)


class Fleet:
    """Plays the coordinator and a host, and hears approvals."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.post = MessageClient(bus, "/caesura/fleet")
        self.approvals: list[tuple[Header, VmApproved]] = []
        self.presence: list[bool] = []
        self._news = asyncio.Event()

    async def receive(self, delivery: Delivery) -> None:
        received = decode(delivery.topic, delivery.payload)
        if isinstance(received.message, VmApproved):
            self.approvals.append((received.header, received.message))
        elif isinstance(received.message, PublisherPresence):
            self.presence.append(received.message.online)
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(patient(15)):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def inventory(self) -> None:
        vms = tuple(
            VmRecord(vm=vm, set=set_name, update_domain=ud, state="running")
            for vm, set_name, ud in (("web-1", "web", 0), ("web-2", "web", 1), ("lone", "_lone", 0))
        )
        message = HostInventory(host="host-1", driver="process", epoch=1, vms=vms)
        await self.post.send(message, host="host-1")

    async def document(self, incarnation: int, *events: ScheduledEvent, set_name: str = "web") -> None:
        message = SetDocument(set=set_name, incarnation=incarnation, events=events)
        await self.post.send(message, set=set_name)


class Scene:
    """A publisher that serves web-1 and web-2 on ports and lone on a socket."""

    def __init__(
        self, fleet: Fleet, broker: MemoryBroker, publisher: MetadataPublisher, urls: list[str]
    ) -> None:
        self.fleet = fleet
        self.broker = broker
        self.publisher = publisher
        self.web_1, self.web_2, self.lone_socket = urls
        self.web_1 = f"http://{self.web_1}"
        self.web_2 = f"http://{self.web_2}"
        self.lone_socket = self.lone_socket.removeprefix("unix:")

    async def get(
        self, path: str = EVENTS, *, base: str = "", method: str = "GET", **more: Any
    ) -> tuple[int, Any, Any]:
        more = {"headers": HEADERS, **more}
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, (base or self.web_1) + path, **more) as answer,
        ):
            text = await answer.text()
            is_json = answer.headers.get("Content-Type", "").startswith("application/json")
            return answer.status, json.loads(text) if text and is_json else text, answer.headers

    async def shows(self, incarnation: int) -> dict[str, Any]:
        """Wait until the document of web-1 has this incarnation."""
        body: dict[str, Any] = {}

        async def shown() -> bool:
            nonlocal body
            status, body, _ = await self.get()
            return status == 200 and body["DocumentIncarnation"] == incarnation

        await eventually(shown)
        return body

    async def lone(self, method: str = "GET", **more: Any) -> int:
        """The status that the VM behind the socket gets."""
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(self.lone_socket)) as session,
            session.request(method, f"http://169.254.169.254{EVENTS}", headers=HEADERS, **more) as answer,
        ):
            return answer.status

    async def lone_served(self) -> bool:
        return await self.lone() == 200

    async def settled(self) -> bool:
        return self.publisher.pending == 0


@asynccontextmanager
async def running(*starts: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(start()) for start in starts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [each for each in ended if isinstance(each, Exception)]
        assert not failed, failed


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    broker = MemoryBroker()
    fleet = Fleet(MemoryBus(broker, client_id="fleet", filters=("caesura/v1/metadata/#",)))
    settings = MetadataPublisherSettings(
        listeners_file="unused", approval_repeat_s=0.05, approval_timeout_s=0.3
    )
    bus = MemoryBus(broker, client_id="publisher", filters=filters())
    publisher = MetadataPublisher(settings, bus)
    listeners = [
        Listener("web-1", "127.0.0.1:0"),
        Listener("web-2", "127.0.0.1:0"),
        Listener("lone", f"unix:{tmp_path}/lone.sock"),
    ]

    async def run() -> None:
        await fleet.bus.run(fleet.receive)

    async with (
        serve_metadata(publisher, listeners) as urls,
        running(run, publisher.run_bus, publisher.run_approvals),
    ):
        assert await fleet.bus.wait_connected(patient(5))
        await fleet.until(lambda: fleet.presence == [True])
        yield Scene(fleet, broker, publisher, list(urls))
        await publisher.drain()
        await fleet.until(lambda: not fleet.presence[-1])
        await fleet.bus.close()


# -- documents ------------------------------------------------------------------------------------------------


async def test_until_a_document_is_known_the_answer_is_to_retry(scene: Scene) -> None:
    status, body, _ = await scene.get()
    assert (status, body["error"]) == (
        500,
        "Service Error. No host has spoken of VM web-1 yet. Retry after some time.",
    )
    await scene.fleet.inventory()
    await scene.fleet.document(3, set_name="other")

    async def only_the_document_is_missing() -> bool:
        return "events of set web" in (await scene.get())[1]["error"]

    await eventually(only_the_document_is_missing)
    await scene.fleet.document(7)
    assert await scene.shows(7) == {"DocumentIncarnation": 7, "Events": []}


async def test_every_vm_of_the_set_sees_its_events_and_no_other_does(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(1, set_name="_lone")
    await scene.fleet.document(2, event())
    body = await scene.shows(2)
    assert body["Events"][0]["Resources"] == ["web-1", "web-2"]
    _, other, _ = await scene.get(base=scene.web_2)
    assert other == body
    connector = aiohttp.UnixConnector(scene.lone_socket)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(f"http://169.254.169.254{EVENTS}", headers=HEADERS) as answer,
    ):
        assert await answer.json() == {"DocumentIncarnation": 1, "Events": []}


async def test_an_incarnation_never_goes_back(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(9, event())
    before = await scene.shows(9)
    await scene.fleet.document(8)
    await scene.fleet.document(9)  # the same number with other content: what was shown stands
    await scene.fleet.document(1, set_name="_lone")
    # The bus delivers in order: when lone's document is there, the two others were looked at.
    await eventually(scene.lone_served)
    assert await scene.shows(9) == before


async def test_an_etag_saves_the_body_until_the_document_changes(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(4, event())
    await scene.shows(4)
    status, _, headers = await scene.get()
    assert (status, headers["ETag"], headers["Content-Type"]) == (
        200,
        '"4"',
        "application/json; charset=utf-8",
    )
    conditional = {**HEADERS, "If-None-Match": headers["ETag"]}
    status, body, headers = await scene.get(headers=conditional)
    assert (status, body, headers["ETag"]) == (304, "", '"4"')
    await scene.fleet.document(5, event("started"))
    await scene.shows(5)
    status, body, headers = await scene.get(headers=conditional)
    assert (status, headers["ETag"], body["Events"][0]["NotBefore"]) == (200, '"5"', "")


async def test_with_the_bus_lost_the_last_document_is_still_served(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(4, event())
    await scene.shows(4)
    scene.broker.down()
    assert (await scene.get())[1]["DocumentIncarnation"] == 4
    assert scene.publisher.broker_ping() != ""
    scene.broker.up()


async def test_the_rules_hold_over_http(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(4)
    await scene.shows(4)
    assert (await scene.get(headers={}))[0] == 400
    assert (await scene.get(headers={"metadata": "True"}))[0] == 200
    assert (await scene.get(headers={**HEADERS, "X-Forwarded-For": "1.2.3.4"}))[0] == 400
    assert (await scene.get(EVENTS + "&api-version=2020-07-01"))[0] == 400
    assert (await scene.get(EVENTS + "&extended=true"))[0] == 200
    status, body, _ = await scene.get("/metadata/scheduledevents?api-version=2021-02-01")
    assert (status, body["newest-versions"][0]) == (400, "2020-07-01")
    status, _, headers = await scene.get(method="PUT")
    assert (status, headers["Allow"]) == (405, "GET, POST")
    assert (await scene.get("/metadata/nothing"))[0] == 404
    status, body, _ = await scene.get("/metadata/versions")
    assert (status, body["apiVersions"][0]) == (200, "2017-03-01")


async def test_instance_metadata_says_who_and_where(scene: Scene) -> None:
    path = "/metadata/instance/compute/platformUpdateDomain?api-version=2021-02-01&format=text"
    assert (await scene.get(path))[0] == 500
    await scene.fleet.inventory()
    await scene.fleet.document(1)
    await scene.shows(1)
    status, text, headers = await scene.get(path, base=scene.web_2)
    assert (status, text) == (200, "1")
    assert headers["Content-Type"].startswith("text/plain")
    _, body, _ = await scene.get("/metadata/instance?api-version=2021-02-01")
    assert body["compute"]["name"] == "web-1"
    interface = body["network"]["interface"][0]
    assert interface["ipv4"]["ipAddress"][0]["privateIpAddress"].startswith("198."), "never the listener's"
    details = VmDetails(vm="web-1", host="host-1", size="tiny", interfaces=(VmInterface(ipv4="10.0.0.4/24"),))
    await scene.fleet.post.send(details, host="host-1", vm="web-1")

    async def size() -> str:
        return str(
            (await scene.get("/metadata/instance/compute/vmSize?api-version=2021-02-01&format=text"))[1]
        )

    async def has_details() -> bool:
        return await size() == "tiny"

    async def has_none() -> bool:
        return await size() == ""

    await eventually(has_details)
    address = "/metadata/instance/network/interface/0/ipv4/ipAddress/0/privateIpAddress"
    assert (await scene.get(f"{address}?api-version=2021-02-01&format=text"))[1] == "10.0.0.4"
    # Of a host that the VM does not belong to: not shown.
    await scene.fleet.post.send(VmDetails(vm="web-1", host="host-2", size="big"), host="host-2", vm="web-1")
    await scene.fleet.post.clear(VmDetails, host="host-1", vm="web-1")
    await eventually(has_none)
    assert (await scene.get("/metadata/instance/compute/name?api-version=2021-02-01"))[0] == 400


# -- approvals ------------------------------------------------------------------------------------------------


async def test_an_approval_is_passed_on_and_repeated_until_the_document_shows_it(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(1, event())
    await scene.shows(1)
    status, body, headers = await scene.get(method="POST", data=start_request(ID.upper()), base=scene.web_2)
    assert (status, body, headers["Content-Length"]) == (200, "", "0")
    await scene.fleet.until(lambda: len(scene.fleet.approvals) >= 3)
    approved = scene.fleet.approvals[0][1]
    assert (approved.event_id, approved.set, approved.vm) == (ID, "web", "web-2")
    assert len({header.id for header, _ in scene.fleet.approvals}) == 1
    # Another VM of the set approves too: 200, and no approval of its own.
    assert (await scene.get(method="POST", data=start_request(ID)))[0] == 200
    await scene.fleet.document(2, event(approved=True))
    await scene.shows(2)
    await eventually(scene.settled)
    assert {each.vm for _, each in scene.fleet.approvals} == {"web-2"}
    assert scene.publisher.approvals == 1


@pytest.mark.parametrize("change", ["started", "gone"])
async def test_a_started_or_vanished_event_ends_the_repetition(scene: Scene, change: str) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(1, event())
    await scene.shows(1)
    await scene.get(method="POST", data=start_request(ID))
    assert scene.publisher.pending == 1
    await scene.fleet.document(2, *([event("started")] if change == "started" else []))
    await eventually(scene.settled)


async def test_an_approval_that_nobody_notices_ends_with_the_notice(scene: Scene) -> None:
    await scene.fleet.inventory()
    # Not before is past by more than clocks may differ: the event is about to start anyway.
    await scene.fleet.document(1, event(notice_s=-10))
    await scene.shows(1)
    assert (await scene.get(method="POST", data=start_request(ID)))[0] == 200
    await eventually(scene.settled)


@pytest.mark.parametrize("events", [[event("started")], [event(approved=True)], []])
async def test_approving_what_needs_no_approval_is_200_and_changes_nothing(
    scene: Scene, events: list[ScheduledEvent]
) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(1, *events)
    await scene.shows(1)
    assert (await scene.get(method="POST", data=start_request(ID)))[:2] == (200, "")
    assert scene.publisher.pending == 0
    assert scene.fleet.approvals == []


async def test_a_vm_cannot_approve_an_event_it_does_not_see(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(1, event())
    await scene.fleet.document(1, set_name="_lone")
    await scene.shows(1)
    await eventually(scene.lone_served)
    assert await scene.lone("POST", data=start_request(ID)) == 200
    assert scene.publisher.pending == 0
    assert scene.fleet.approvals == []


async def test_with_the_bus_down_an_approval_is_not_accepted_and_can_be_repeated(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(1, event())
    await scene.shows(1)
    scene.broker.down()
    status, body, _ = await scene.get(method="POST", data=start_request(ID))
    assert (status, body["error"][:14]) == (500, "Service Error.")
    assert scene.publisher.pending == 0
    scene.broker.up()

    async def accepted() -> bool:
        return (await scene.get(method="POST", data=start_request(ID)))[0] == 200

    await eventually(accepted)
    await scene.fleet.until(lambda: len(scene.fleet.approvals) >= 1)


async def test_with_the_bus_away_a_post_is_answered_within_a_second(scene: Scene) -> None:
    settings = MetadataPublisherSettings(listeners_file="unused")
    assert settings.approval_timeout_s < 1.0
    await scene.fleet.inventory()
    ids = [str(uuid4()) for _ in range(5)]
    await scene.fleet.document(1, *(event(event_id=each) for each in ids))
    await scene.shows(1)
    scene.broker.down()
    started = asyncio.get_running_loop().time()
    assert (await scene.get(method="POST", data=start_request(*ids)))[0] == 500
    # All of them wait at once: one after the other they would take five times the scene's 0.3 s.
    assert asyncio.get_running_loop().time() - started < patient(1.2)
    scene.broker.up()


async def raw_exchange(scene: Scene, *requests: str) -> list[tuple[str, bytes]]:
    """Head without its date, and body, of the answers on one connection."""
    host, port = scene.web_1.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    found = []
    try:
        for each in requests:
            writer.write(each.encode())
            async with asyncio.timeout(patient(5)):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lines = sorted(line for line in head.strip().split("\r\n") if not line.startswith("Date:"))
                assert "Date:" in head
                size = next(
                    (int(each.split(":")[1]) for each in lines if each.startswith("Content-Length")), 0
                )
                found.append(("\n".join(lines), await reader.readexactly(size)))
    finally:
        writer.close()
        await writer.wait_closed()
    return found


async def test_a_poll_that_is_repeated_gets_the_same_answer_by_the_short_way(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(4, event())
    await scene.shows(4)
    target = EVENTS + "&extended=true"  # asked for by nobody before
    usual = f"GET {target} HTTP/1.1\r\nHost: x\r\nMetadata: True\r\n\r\n"
    known = f'GET {target} HTTP/1.1\r\nHost: x\r\nMetadata: true\r\nIf-None-Match: "4"\r\n\r\n'
    answers = await raw_exchange(scene, usual, usual, known, known, usual)
    assert answers[0] == answers[1] == answers[4]
    assert answers[2] == answers[3]
    assert answers[2][0].startswith('ETag: "4"\nHTTP/1.1 304')
    assert scene.publisher.answers["scheduledevents", "GET", 304] == 2
    await scene.fleet.document(5, event("started"))
    await scene.shows(5)
    ((head, body),) = await raw_exchange(scene, known)
    assert ("200 OK" in head, json.loads(body)["DocumentIncarnation"]) == (True, 5)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("HTTP/1.1\r\nHost: x\r\n", 400),
        ("HTTP/1.1\r\nHost: x\r\nMetadata: false\r\n", 400),
        ("HTTP/1.1\r\nHost: x\r\nMetadata: false\r\nMetadata: true\r\n", 400),
        ("HTTP/1.1\r\nHost: x\r\nMetadata: true\r\nX-Forwarded-For: 192.0.2.1\r\n", 400),
        ("HTTP/1.1\r\nHost: evil.example\r\nMetadata: true\r\n", 421),
        ("HTTP/1.1\r\nMetadata: true\r\n", 400),
        ("HTTP/1.0\r\nMetadata: true\r\n", 200),
        ("HTTP/1.1\r\nHost: x\r\nMetadata: TRUE\r\n", 200),
    ],
)
async def test_the_short_way_serves_nothing_that_would_be_refused(
    scene: Scene, head: str, status: int
) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(4)
    await scene.shows(4)
    usual = f"GET {EVENTS} HTTP/1.1\r\nHost: x\r\nMetadata: true\r\n\r\n"
    await raw_exchange(scene, usual, usual)
    got, _, _ = await raw_answer(scene, f"GET {EVENTS} {head}\r\n".encode())
    assert got == status


async def test_an_etag_counts_without_its_quotes_too(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(4, event())
    await scene.shows(4)
    for tag in ("4", '"4"', 'W/"4"', '"3", 4'):
        assert (await scene.get(headers={**HEADERS, "If-None-Match": tag}))[0] == 304, tag
    for tag in ("3", '"44"', ""):
        assert (await scene.get(headers={**HEADERS, "If-None-Match": tag}))[0] == 200, tag


async def test_strict_fidelity_has_the_limits_of_the_real_service(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(1, event())
    await scene.shows(1)
    settings = MetadataPublisherSettings(listeners_file="unused", fidelity="strict", first_answer_s=0.3)
    bus = MemoryBus(scene.broker, client_id="strict", filters=filters())
    publisher = MetadataPublisher(settings, bus)
    listeners = [Listener("web-1", "127.0.0.1:0"), Listener("web-2", "127.0.0.1:0")]
    async with serve_metadata(publisher, listeners) as urls, running(publisher.run_bus):
        web_1, web_2 = (f"http://{url}" for url in urls)

        async def known() -> bool:
            return publisher.documents_ping(tuple(listeners)) == ""

        await eventually(known)
        started = asyncio.get_running_loop().time()
        assert (await scene.get(base=web_1))[0] == 200
        assert asyncio.get_running_loop().time() - started >= 0.3, "the first answer is late"

        async def refused() -> bool:
            status, body, _ = await scene.get(base=web_1)
            assert status in {200, 429}
            assert status == 200 or body["error"].startswith("Too Many Requests")
            return status == 429

        await eventually(refused)
        assert (await scene.get(base=web_2))[0] == 200, "each VM has its own"
        assert publisher.answers["scheduledevents", "GET", 429] >= 1
        await bus.close()


@pytest.mark.parametrize(
    "content_type",
    [
        "application/x-www-form-urlencoded",
        "text/plain;charset=UTF-8",
        "application/json",
        "multipart/form-data",
        "",
    ],
)
async def test_the_content_type_of_an_approval_does_not_matter(scene: Scene, content_type: str) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(1, event())
    await scene.shows(1)
    headers = {**HEADERS, **({"Content-Type": content_type} if content_type else {})}
    skip = () if content_type else ("Content-Type",)
    async with (
        aiohttp.ClientSession(skip_auto_headers=skip) as session,
        session.post(scene.web_1 + EVENTS, headers=headers, data=start_request(ID).encode()) as answer,
    ):
        assert answer.status == 200
    assert scene.publisher.pending == 1


async def test_a_payload_beyond_the_limit_is_refused(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(1, event())
    await scene.shows(1)
    many = start_request(*[ID] * 3_000)
    status, body, _ = await scene.get(method="POST", data=many)
    assert (status, "larger than 65536" in body["error"]) == (400, True)
    assert (await scene.get(method="POST", data="{"))[0] == 400
    assert scene.publisher.pending == 0


# -- other clients --------------------------------------------------------------------------------------------


async def test_urllib_as_the_documented_sample_uses_it(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(1, event())
    await scene.shows(1)

    def sample() -> tuple[Any, int, bytes]:
        url = scene.web_1 + EVENTS
        read = urllib.request.Request(url)  # noqa: S310 - http on loopback
        read.add_header("Metadata", "true")
        with urllib.request.urlopen(read, timeout=5) as answer:  # noqa: S310 - the same
            document = json.loads(answer.read())
        approve = urllib.request.Request(url, data=start_request(ID).encode())  # noqa: S310 - the same
        approve.add_header("Metadata", "true")
        with urllib.request.urlopen(approve, timeout=5) as answer:  # noqa: S310 - the same
            return document, answer.status, answer.read()

    document, status, body = await asyncio.to_thread(sample)
    assert document["Events"][0]["EventId"] == ID
    assert (status, body) == (200, b"")
    assert scene.publisher.pending == 1


async def test_urllib_is_told_why_it_is_refused(scene: Scene) -> None:
    def careless() -> tuple[int, Any]:
        try:
            urllib.request.urlopen(scene.web_1 + EVENTS, timeout=5)  # noqa: S310 - http on loopback
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())
        raise AssertionError("was served without the Metadata header")

    assert await asyncio.to_thread(careless) == (
        400,
        {"error": "Bad request. Required metadata header not specified."},
    )


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_on_a_port_and_on_a_socket(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(1, event())
    await scene.fleet.document(3, set_name="_lone")
    await scene.shows(1)
    assert (await curl("-H", "Metadata:true", scene.web_1 + EVENTS))["DocumentIncarnation"] == 1
    socket_args = ("--unix-socket", scene.lone_socket, "-H", "Metadata:true")
    assert (await curl(*socket_args, f"http://169.254.169.254{EVENTS}"))["DocumentIncarnation"] == 3
    posted = await curl_text(
        "-H", "Metadata:true", "-d", start_request(ID), "-w", "%{http_code}", scene.web_1 + EVENTS
    )
    assert posted == "200"
    await scene.fleet.until(lambda: len(scene.fleet.approvals) >= 1)


async def curl(*arguments: str) -> Any:
    return json.loads(await curl_text(*arguments))


async def curl_text(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "--max-time", "5", "--noproxy", "*", *arguments, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def test_a_client_that_asks_to_close_is_told_so_and_hung_up_on(scene: Scene) -> None:
    status, _, headers = await scene.get(headers={**HEADERS, "Connection": "close"})
    assert (status, headers["Connection"].lower()) == (500, "close")
    host, port = scene.web_1.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {EVENTS} HTTP/1.1\r\nHost: x\r\nMetadata: true\r\nConnection: close\r\n\r\n".encode())
    async with asyncio.timeout(patient(5)):
        everything = await reader.read()
    assert b"connection: close" in everything.lower()
    writer.close()
    await writer.wait_closed()


async def raw_answer(scene: Scene, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body that a client without manners gets."""
    host, port = scene.web_1.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(raw)
        async with asyncio.timeout(patient(5)):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            status, *lines = head.strip().split("\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        return int(status.split()[1]), headers, body
    finally:
        writer.close()
        await writer.wait_closed()


def posting(body: bytes, *headers: str) -> bytes:
    lines = [
        "POST " + EVENTS + " HTTP/1.1",
        "Host: x",
        "Metadata: true",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


_ASKING = "GET " + EVENTS + " HTTP/1.1\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01 not http\r\n\r\n", 400),
        (b"BREW /metadata/versions HTTP/1.1\r\nHost: x\r\nMetadata: true\r\n\r\n", 400),
        (b"PROPFIND /metadata/versions HTTP/1.1\r\nHost: x\r\nMetadata: true\r\n\r\n", 405),
        (f"{_ASKING}Metadata: true\r\n\r\n".encode(), 400),
        (f"{_ASKING}Host: x\r\nMetadata: true\r\nX: {'a' * 20_000}\r\n\r\n".encode(), 400),
        (posting(b"not gzip", "Content-Encoding: gzip"), 400),
        (posting(b"{}", "Content-Encoding: nonsense"), 400),
        (posting(b"{}", "Transfer-Encoding: chunked"), 400),
    ],
)
async def test_no_answer_is_the_http_library_s_own(
    scene: Scene, raw: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = sum(scene.publisher.answers.values())
    got, headers, body = await raw_answer(scene, raw)
    assert (got, headers["content-type"]) == (status, "application/json; charset=utf-8")
    assert list(json.loads(body)) == ["error"]
    assert sum(scene.publisher.answers.values()) == before + 1, "it is counted"
    assert [each for each in caplog.records if each.exc_info] == []


async def test_an_older_client_needs_no_host_header(scene: Scene) -> None:
    raw = b"GET /metadata/versions HTTP/1.0\r\nMetadata: true\r\n\r\n"
    assert (await raw_answer(scene, raw))[0] == 200


async def test_a_client_that_waits_for_100_continue_gets_it(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(1, event())
    await scene.shows(1)
    host, port = scene.web_1.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = start_request(ID).encode()
    writer.write(posting(body, "Expect: 100-continue").removesuffix(body))
    async with asyncio.timeout(patient(5)):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()


async def test_a_body_that_does_not_arrive_is_408(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caesura_metadata_publisher.http._BODY_S", 0.05)
    status, headers, body = await raw_answer(scene, posting(b"12345").removesuffix(b"45"))
    assert (status, headers["connection"]) == (408, "close")
    assert "error" in json.loads(body)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("169.254.169.254", 200),
        ("localhost:8101", 200),
        ("metadata", 200),
        ("[::1]:8101", 200),
        ("evil.example", 421),
        ("169.254.169.254.evil.example:80", 421),
        ("evil.example.", 421),
        ("", 421),
    ],
)
async def test_a_name_of_somebody_elses_that_points_here_gets_nothing(
    scene: Scene, host: str, status: int
) -> None:
    """DNS rebinding: to the browser in the VM it is the attacker's own origin, so it may set any header."""
    await scene.fleet.inventory()
    await scene.fleet.document(3)
    await scene.shows(3)
    got, body, _ = await scene.get(headers={**HEADERS, "Host": host})
    assert got == status
    if status == 421:
        assert "CAESURA_METADATA_PUBLISHER_HTTP_HOSTS" in body["error"]


async def test_a_name_that_is_known_is_served(scene: Scene) -> None:
    await scene.fleet.inventory()
    await scene.fleet.document(3)
    await scene.shows(3)
    async with (
        serve_metadata(scene.publisher, [Listener("web-1", "127.0.0.1:0")], ("Metadata.Example",)) as urls,
        aiohttp.ClientSession() as session,
    ):
        for host, status in (("metadata.example:80", 200), ("other.example", 421)):
            async with session.get(f"http://{urls[0]}{EVENTS}", headers={**HEADERS, "Host": host}) as answer:
                assert answer.status == status


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nno header\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /\x9b31m HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_malformed_http_costs_one_line(
    scene: Scene, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = scene.web_1.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    async with asyncio.timeout(patient(5)):
        assert b" 400 " in (await reader.read(40))[:40]
    writer.close()
    await writer.wait_closed()
    for record in (each for each in caplog.records if each.name == "aiohttp.server"):
        line = record.getMessage()
        assert record.exc_info is None
        assert record.levelname in {"WARNING", "DEBUG"}
        assert "\n" not in line
        assert line.isascii()
        assert len(line) < 400


# -- starting -------------------------------------------------------------------------------------------------


async def test_a_port_in_use_is_an_error_that_names_it(scene: Scene) -> None:
    taken = scene.web_1.removeprefix("http://")
    with pytest.raises(ListenError, match=f"cannot listen on {taken}"):
        async with serve_metadata(scene.publisher, [Listener("web-1", taken)]):
            pytest.fail("two servers on one port")


def publisher_environment(tmp_path: Path, text: str, **more: str) -> dict[str, str]:
    path = tmp_path / "listeners.toml"
    path.write_text(text)
    prefix = "CAESURA_METADATA_PUBLISHER_"
    return {
        **os.environ,
        f"{prefix}LISTENERS_FILE": str(path),
        f"{prefix}HEALTH_LISTEN": "",  # unless given below
        **{f"{prefix}{name}": value for name, value in more.items()},
    }


@pytest.mark.parametrize("case", ["in use", "bad file"])
async def test_the_command_ends_with_words_when_it_cannot_serve(tmp_path: Path, case: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        vm = "web-1" if case == "in use" else "web.1"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "caesura_metadata_publisher",
            env=publisher_environment(tmp_path, f'[[listener]]\nvm = "{vm}"\nlisten = "{listen}"\n'),
            stderr=asyncio.subprocess.PIPE,
        )
        _, err = await asyncio.wait_for(process.communicate(), patient(20))
    assert process.returncode == (1 if case == "in use" else 2), "2 is for what only a person can put right"
    assert (f"cannot listen on {listen}" if case == "in use" else "web.1") in err.decode()
    assert "Traceback" not in err.decode()


async def test_the_command_with_a_real_broker(
    broker_kind: Literal["mosquitto", "embedded"], tmp_path: Path
) -> None:
    async with LocalBroker(kind=broker_kind) as broker:
        fleet = Fleet(MqttBus(BrokerOptions(url=broker.url), filters=("caesura/v1/metadata/#",)))

        async def run() -> None:
            await fleet.bus.run(fleet.receive)

        listen, health = f"unix:{tmp_path}/web-1.sock", f"127.0.0.1:{free_port()}"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "caesura_metadata_publisher",
            env=publisher_environment(
                tmp_path,
                f'[[listener]]\nvm = "web-1"\nlisten = "{listen}"\n',
                BROKER_URL=broker.url,
                HEALTH_LISTEN=health,
            ),
        )
        try:
            async with running(run):
                await fleet.inventory()
                await fleet.document(5, event())
                await fleet.until(lambda: fleet.presence == [True])
                connector = aiohttp.UnixConnector(listen.removeprefix("unix:"))
                async with aiohttp.ClientSession(connector=connector, headers=HEADERS) as session:

                    async def served() -> bool:
                        return (await session.get(f"http://x{EVENTS}")).status == 200

                    await eventually(served)
                    answer = await session.get(f"http://x{EVENTS}")
                    assert (await answer.json())["Events"][0]["EventId"] == ID
                    posted = await session.post(f"http://x{EVENTS}", data=start_request(ID))
                    assert (posted.status, await posted.read()) == (200, b"")
                await fleet.until(lambda: len(fleet.approvals) >= 2)
                async with aiohttp.ClientSession(f"http://{health}") as session:
                    assert (await session.get("/ready")).status == 200
                    metrics = await (await session.get("/metrics")).text()
                assert 'caesura_metadata_approvals_total{fleet="default"} 1.0' in metrics
                assert 'endpoint="scheduledevents",fleet="default",method="POST",status="200"} 1.0' in metrics
                process.terminate()
                assert await asyncio.wait_for(process.wait(), patient(10)) == 0
                await fleet.until(lambda: not fleet.presence[-1])
                await fleet.bus.close()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
async def test_a_restart_under_socket_activation_refuses_nobody(tmp_path: Path) -> None:
    """A client asks on, each time on a new connection, while the publisher is ended and started again."""
    async with LocalBroker(kind="mosquitto") as broker:
        fleet = Fleet(MqttBus(BrokerOptions(url=broker.url), filters=("caesura/v1/metadata/#",)))

        async def run() -> None:
            await fleet.bus.run(fleet.receive)

        with socket.create_server(("127.0.0.1", 0)) as listener:
            listen = f"127.0.0.1:{listener.getsockname()[1]}"
            environ = publisher_environment(
                tmp_path, f'[[listener]]\nvm = "web-1"\nlisten = "{listen}"\n', BROKER_URL=broker.url
            )
            program = [sys.executable, "-m", "caesura_metadata_publisher"]

            async def start() -> asyncio.subprocess.Process:
                return await asyncio.create_subprocess_exec(
                    *activated((listener.fileno(),), program), env=environ, pass_fds=(listener.fileno(),)
                )

            statuses: list[int] = []
            one_more = asyncio.Event()

            async def ask() -> None:
                timeout = aiohttp.ClientTimeout(total=patient(60))
                while True:
                    try:
                        async with (
                            aiohttp.ClientSession(headers=HEADERS, timeout=timeout) as session,
                            session.get(f"http://{listen}{EVENTS}") as answer,
                        ):
                            statuses.append(answer.status)
                    except aiohttp.ServerDisconnectedError:
                        statuses.append(
                            0
                        )  # accepted by the one that ended; a connection that is refused is not caught here
                    one_more.set()

            async def next_answer(status: int) -> None:
                async with asyncio.timeout(patient(60)):
                    while True:
                        one_more.clear()
                        await one_more.wait()
                        if statuses[-1] == status:
                            return

            process = await start()
            try:
                async with running(run):
                    await fleet.inventory()
                    await fleet.document(5, event())
                    async with running(ask):
                        await next_answer(200)
                        process.terminate()
                        assert await asyncio.wait_for(process.wait(), patient(20)) == 0
                        process = await start()
                        await next_answer(200)
                    assert set(statuses) <= {0, 200, 500}, "500: it has no document yet"
                    assert statuses.count(0) <= 1
                    await fleet.bus.close()
            finally:
                process.terminate()
                await process.wait()
