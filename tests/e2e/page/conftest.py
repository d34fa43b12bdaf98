"""A real Chromium, and an exporter on a bus in memory for what no fleet shows on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from playwright.async_api import Browser, Page
from playwright.async_api import Error as PageError
from prometheus_client import CollectorRegistry

from caesura.bus.local_broker import free_port
from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.bus.port import Delivery
from caesura.runtime.health import serve_health
from caesura_metrics_exporter.live.page import LivePage
from caesura_metrics_exporter.service import MetricsExporter, filters
from caesura_metrics_exporter.settings import MetricsExporterSettings
from caesura_testing.browser import chromium, find_chromium
from caesura_testing.patience import patient


class Visit:
    """A page that is open, and what went wrong in it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        page.on("console", lambda message: self._said(message.type, message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._asked(request.url))

    def _said(self, kind: str, text: str) -> None:
        if kind in {"error", "warning"}:
            self.errors.append(text)

    def _asked(self, url: str) -> None:
        if not url.startswith(self.url):
            self.elsewhere.append(url)

    async def text(self, selector: str) -> str:
        return (await self.page.inner_text(selector)).strip()

    async def states(self, lane: str) -> list[str]:
        """The states of a lane's stretches from left to right, as drawn."""
        found: list[str] = await self.page.evaluate(
            """(lane) => [...document.querySelectorAll("g.seg")].filter((each) => each.dataset.id.startsWith(`${lane}|`))
              .sort((a, b) => a.dataset.x - b.dataset.x).map((each) => each.dataset.state)""",
            lane,
        )
        return found

    async def until(self, expression: str, timeout_s: float = 20.0) -> None:
        """Wait until a JavaScript expression is true in the page; one that throws is not true yet.

        What an expression reads may not be drawn when it is first asked, so an error counts as an answer only when
        it is still there at the end, and is told then.
        """
        # Not by playwright's own waiting: that evaluates text in the page, which the page's policy forbids.
        thrown = ""
        try:
            async with asyncio.timeout(patient(timeout_s)):
                while True:
                    try:
                        if await self.page.evaluate(expression):
                            return
                        thrown = ""
                    except PageError as error:
                        thrown = str(error)
                    await asyncio.sleep(0.03)  # a page tells nobody
        except TimeoutError:
            shown = await self.page.inner_text("body")
            raise AssertionError(f"not within {timeout_s:g} s: {expression}\n{thrown}\n{shown}") from None


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    if find_chromium() is None:
        pytest.skip("Chromium is not installed (on Debian: apt-get install chromium fonts-dejavu-core)")
    async with chromium() as running:
        yield running


@pytest.fixture
async def visit(browser: Browser) -> AsyncIterator[Callable[..., Any]]:
    """Open a URL; ``await visit(url, width=..., color_scheme=...)``."""
    async with AsyncExitStack() as stack:

        async def open_page(url: str, *, width: int = 1280, height: int = 900, **context: Any) -> Visit:
            made = await browser.new_context(viewport={"width": width, "height": height}, **context)
            stack.push_async_callback(made.close)
            visit = Visit(await made.new_page(), url)
            await visit.page.goto(url)
            return visit

        yield open_page


class Wire:
    """A connection to a port that can be cut, or go dead without a word."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open = asyncio.Event()
        self._open.set()
        self._pipes: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.listen_port = free_port()

    async def mend(self) -> None:
        """Carry what comes."""
        self._open.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._handle, "127.0.0.1", self.listen_port)

    def hush(self) -> None:
        """Carry nothing, neither of what is open nor of what comes."""
        self._open.clear()

    async def cut(self) -> None:
        """End everything; nobody answers."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        for source, target in ((reader, far_writer), (far_reader, writer)):
            pipe = asyncio.create_task(self._pipe(source, target))
            self._pipes.add(pipe)
            pipe.add_done_callback(self._pipes.discard)

    async def _pipe(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._open.wait()
                target.write(data)
                await target.drain()
        except ConnectionError:
            pass  # one of the two went away
        finally:
            target.close()


async def _silent(_: Delivery) -> None:
    """The speaker hears nothing."""


class Booth:
    """An exporter on a bus in memory, its page, and somebody who speaks on that bus."""

    def __init__(self, exporter: MetricsExporter, post: MessageClient, port: int, page: LivePage) -> None:
        self.exporter = exporter
        self.page = page
        self.post = post
        self.url = f"http://127.0.0.1:{port}/"
        self.wire = Wire(port)

    @property
    def broker(self) -> MemoryBroker:
        broker: MemoryBroker = self.post.bus._broker  # type: ignore[attr-defined]
        return broker


@pytest.fixture
async def booth() -> AsyncIterator[Booth]:
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="exporter", filters=filters())
    speaker = MemoryBus(broker, client_id="speaker")
    exporter = MetricsExporter(MetricsExporterSettings(), bus)
    port = free_port()
    tasks = [
        asyncio.create_task(each)
        for each in (exporter.run_bus(), exporter.stream.run(), speaker.run(_silent))
    ]
    try:
        assert await bus.wait_connected(patient(5))
        assert await speaker.wait_connected(patient(5))
        page = LivePage(exporter.stream)
        async with serve_health(f"127.0.0.1:{port}", {}, CollectorRegistry(), extend=page.extend):
            made = Booth(exporter, MessageClient(speaker, "/caesura/test"), port, page)
            await made.wire.mend()
            try:
                yield made
            finally:
                await made.wire.cut()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
