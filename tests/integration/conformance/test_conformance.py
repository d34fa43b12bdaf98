"""The conformance command against real servers: the real publisher passes all of it, a file server little."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.contract.messages import HostInventory, SetDocument, VmRecord
from caesura_metadata_conformance.exchange import HttpTransport
from caesura_metadata_conformance.probe import Probe
from caesura_metadata_conformance.run import check_server, count
from caesura_metadata_publisher.http import serve_metadata
from caesura_metadata_publisher.listeners import Listener
from caesura_metadata_publisher.service import MetadataPublisher, filters
from caesura_metadata_publisher.settings import MetadataPublisherSettings
from caesura_testing.collector import eventually
from caesura_testing.metadata_servers import LIFE
from caesura_testing.patience import patient


class Played:
    """A real publisher whose coordinator is played here."""

    def __init__(self, url: str, publisher: MetadataPublisher, post: MessageClient) -> None:
        self.url = url
        self._publisher = publisher
        self._post = post
        self._rest = list(LIFE)

    async def next_document(self) -> None:
        """The next one is shown; the last one stays."""
        if self._rest:
            await self._show(self._rest.pop(0))

    async def _show(self, document: SetDocument) -> None:
        await self._post.send(document, set=document.set)
        await eventually(lambda: self._publisher.shown(document.set) == document)


@asynccontextmanager
async def played() -> AsyncIterator[Played]:
    broker = MemoryBroker()
    settings = MetadataPublisherSettings(listeners_file="unused")
    bus = MemoryBus(broker, client_id="publisher", filters=filters())
    publisher = MetadataPublisher(settings, bus)
    fleet = MemoryBus(broker, client_id="fleet")
    post = MessageClient(fleet, "/caesura/fleet")
    tasks = [
        asyncio.ensure_future(fleet.run(post.deliver)),
        asyncio.ensure_future(publisher.run_bus()),
        asyncio.ensure_future(publisher.run_approvals()),
    ]
    try:
        async with serve_metadata(publisher, [Listener("web-1", "127.0.0.1:0")]) as (address,):
            assert await fleet.wait_connected(patient(5))
            record = VmRecord(vm="web-1", set="web", update_domain=0, state="running")
            inventory = HostInventory(host="host-1", driver="process", epoch=1, vms=(record,))
            await post.send(inventory, host="host-1")
            server = Played(f"http://{address}", publisher, post)
            await server.next_document()
            yield server
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_real_publisher_passes_every_rule() -> None:
    async with played() as server:
        loop = asyncio.get_running_loop()
        now = 0.0

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds
            asyncio.run_coroutine_threadsafe(server.next_document(), loop).result(patient(10))

        def check() -> list[Any]:
            transport = HttpTransport(server.url, patient(10))
            probe = Probe(transport, watch_s=0.25 * len(LIFE), approve=True, clock=lambda: now, sleep=sleep)
            return [(each.number, each.verdict, each.why) for each in check_server(probe)]

        found = await asyncio.to_thread(check)
        assert [each for each in found if each[1] != "passes"] == []
        assert len(found) >= 75


async def run_command(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).parent / "caesura",
        "conformance",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), patient(60))
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_command_says_what_it_found() -> None:
    async with played() as server:
        code, out, _ = await run_command(server.url, "--json")
        found = json.loads(out)
        assert (code, found["fails"]) == (0, 0), [
            each for each in found["rules"] if each["verdict"] == "fails"
        ]
        assert found["passes"] + found["cannot_tell"] == len(found["rules"])
        assert {each["number"][0] for each in found["rules"] if each["verdict"] == "cannot tell"} <= {
            "E",
            "A",
        }
        first = found["rules"][0]["exchanges"][0]
        assert first["request"].startswith(
            "GET /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.1\r\n"
        )
        assert first["answer"]["status"] == 200
        code, out, _ = await run_command(server.url, "--only", "R01", "--only", "e01", "--verbose")
        assert (code, "2 rules: 1 pass, 0 fail, 1 cannot be judged" in out) == (0, True)
        assert "> GET /metadata/scheduledevents" in out


@contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """A static file server: what many write first. It takes no query and no header into account."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


async def test_a_static_file_server_fails_most_of_them(tmp_path: Path) -> None:
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    (metadata / "scheduledevents").write_text('{"DocumentIncarnation": 1, "Events": []}')
    (metadata / "instance").write_text('{"compute": {"name": "web-1"}, "network": {}}')
    (metadata / "versions").write_text('{"apiVersions": ["2017-03-01", "2021-02-01"]}')
    with file_server(tmp_path) as url:
        results = await asyncio.to_thread(lambda: check_server(Probe(HttpTransport(url, patient(10)))))
        passed, failed, _ = count(results)
        assert failed > passed
        code, out, _ = await run_command(url)
        assert (code, f"{failed} fail" in out) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["http://127.0.0.1:1"], 1, "no metadata server at http://127.0.0.1:1"),
        (["https://127.0.0.1"], 2, "plain HTTP"),
        (["http://127.0.0.1:1", "--only", "Z9"], 2, "no rule has a number"),
        ([], 2, "URL"),
    ],
)
async def test_what_cannot_be_checked_is_one_line(arguments: list[str], code: int, words: str) -> None:
    found, _, err = await run_command(*arguments)
    assert (found, words in err) == (code, True)
    assert "Traceback" not in err
