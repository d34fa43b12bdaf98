"""A real Prometheus for tests, and the part of its HTTP API that they ask."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from caesura.bus.local_broker import free_port
from caesura.runtime.errors import CaesuraError
from caesura_testing.collector import PATIENCE_S

_POLL_S = 0.05


class PrometheusError(CaesuraError):
    """It did not start, or refused a query; the text is its own."""


class Series(msgspec.Struct, frozen=True):
    """One series of an answer: its labels, and its values over the range asked for."""

    labels: Mapping[str, str]
    values: tuple[float, ...]


class Rule(msgspec.Struct, frozen=True):
    """A rule that Prometheus has loaded."""

    name: str
    expr: str
    kind: str
    """``recording`` or ``alerting``."""
    health: str
    """``ok``, ``err``, or ``unknown`` before its first evaluation."""
    error: str = ""


class Prometheus:
    """The HTTP API of a Prometheus. Times are unix seconds."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str) -> None:
        self._session = session
        self.base_url = base_url.rstrip("/")

    async def range(self, expr: str, start: float, end: float, step_s: float) -> list[Series]:
        """``query_range``, the last point at ``end``. Raises PrometheusError: the query is wrong."""
        first = end - (end - start) // step_s * step_s
        data = await self._ask("query_range", query=expr, start=first, end=end, step=step_s)
        return [
            Series(each["metric"], tuple(float(value) for _, value in each["values"]))
            for each in data["result"]
        ]

    async def now(self, expr: str) -> list[Series]:
        """``query``, of vectors. Raises PrometheusError: the query is wrong."""
        data = await self._ask("query", query=expr)
        return [Series(each["metric"], (float(each["value"][1]),)) for each in data["result"]]

    async def there_is(self, selector: str, start: float, end: float) -> bool:
        """Whether any series matched in the time. Raises PrometheusError: it is not a selector."""
        asked: dict[str, str | float] = {"match[]": selector, "start": start, "end": end}
        return bool(await self._ask("series", **asked))

    async def label_values(self, label: str, selector: str, start: float, end: float) -> list[str]:
        """The values of a label of matching series, in order."""
        asked: dict[str, str | float] = {"match[]": selector, "start": start, "end": end}
        return [str(each) for each in await self._ask(f"label/{label}/values", **asked)]

    async def rules(self) -> list[Rule]:
        """Every rule that is loaded."""
        data = await self._ask("rules")
        return [
            Rule(each["name"], each["query"], each["type"], each["health"], each.get("lastError", ""))
            for group in data["groups"]
            for each in group["rules"]
        ]

    async def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        alerts = (await self._ask("alerts"))["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}

    async def until_alerts(
        self, *fire: str, silent: Collection[str] = (), timeout_s: float = PATIENCE_S
    ) -> None:
        """Wait until all of ``fire`` fire at once, and none of ``silent`` does.

        Raises:
            AssertionError: not in time.
        """
        end = time.monotonic() + timeout_s
        while not (set(fire) <= (firing := await self.firing()) and firing.isdisjoint(silent)):
            if time.monotonic() > end:
                missing, left = sorted(set(fire) - firing), sorted(firing.intersection(silent))
                raise AssertionError(f"not within {timeout_s:g} s: missing {missing}, firing still {left}")
            await asyncio.sleep(_POLL_S)

    async def until(self, expr: str, timeout_s: float = PATIENCE_S) -> list[Series]:
        """Wait until a query answers with something.

        Raises:
            AssertionError: not in time.
        """
        end = time.monotonic() + timeout_s
        while not (found := await self.now(expr)):
            if time.monotonic() > end:
                raise AssertionError(f"not within {timeout_s:g} s: {expr}")
            await asyncio.sleep(_POLL_S)
        return found

    async def is_ready(self) -> bool:
        """Whether it answers queries."""
        try:
            async with self._session.get(f"{self.base_url}/-/ready") as answer:
                return answer.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def _ask(self, what: str, **parameters: str | float) -> Any:
        asked = {name: str(value) for name, value in parameters.items()}
        async with self._session.get(f"{self.base_url}/api/v1/{what}", params=asked) as answer:
            body = await answer.json()
        if body["status"] != "success":
            raise PrometheusError(f"{body['errorType']}: {body['error']}")
        return body["data"]


def prometheus_installed() -> bool:
    """Whether tests can have one."""
    return shutil.which("prometheus") is not None and shutil.which("promtool") is not None


@asynccontextmanager
async def api(base_url: str) -> AsyncIterator[Prometheus]:
    """The API of a Prometheus that runs somewhere."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield Prometheus(session, base_url)


@asynccontextmanager
async def prometheus(folder: Path, config: str) -> AsyncIterator[Prometheus]:
    """Run one on a free port with this configuration while the block runs, with its files in ``folder``.

    Raises:
        PrometheusError: it ended, or was not ready in time; with the end of its log.
    """
    port = free_port()
    config_file, log_file = folder / "prometheus.yml", folder / "prometheus.log"
    config_file.write_text(config, encoding="utf-8")
    with log_file.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={config_file}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        async with api(f"http://127.0.0.1:{port}") as running:
            end = time.monotonic() + PATIENCE_S
            while not await running.is_ready():
                if process.returncode is not None or time.monotonic() > end:
                    tail = log_file.read_text(errors="replace")[-2000:]
                    raise PrometheusError(f"Prometheus is not ready:\n{tail}")
                await asyncio.sleep(_POLL_S)
            yield running
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
