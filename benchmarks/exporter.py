"""What the metrics exporter can bear: ``python benchmarks/exporter.py``. See --help.

A large fleet's messages go through the exporter's own ``deliver`` (decode, count, fold) in one process; scrapers and
readers of the live page are other processes that ask over HTTP. No broker: its share is not the exporter's.

A storm is a rollout over the whole fleet, with every message that its coordinator, hosts and agents would send, as fast
as the exporter takes it in: there is no idle time in which a scrape could be served. Scrapes ask as Prometheus does.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import gzip
import http.client
import json
import logging
import os
import resource
import select
import sys
import time
from collections.abc import Sequence
from typing import Any

import structlog
from pause import percentile
from prometheus_client import CollectorRegistry
from storms import Storms

from caesura.bus.local_broker import free_port
from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.port import Delivery
from caesura.contract.codec import decode
from caesura.runtime.health import serve_health
from caesura_metrics_exporter.live.page import LivePage
from caesura_metrics_exporter.metrics.scrape import Scrape
from caesura_metrics_exporter.service import MetricsExporter
from caesura_metrics_exporter.settings import MetricsExporterSettings

_PORTION = 64  # messages between two turns of the event loop, as a full inbox gives them
_MIB = 1 << 20


class Lateness:
    """How long the event loop lets others wait, milliseconds."""

    def __init__(self) -> None:
        self.worst_ms = 0.0

    async def run(self) -> None:
        """Watch for ever."""
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.002)
            self.worst_ms = max(self.worst_ms, (time.perf_counter() - began - 0.002) * 1000)


class Bench:
    """One exporter under load."""

    def __init__(self, fleet: Storms) -> None:
        self.fleet = fleet
        self.exporter = MetricsExporter(MetricsExporterSettings(), MemoryBus(MemoryBroker()))
        self.collector = self.exporter.collector()
        self.copied_ms = 0.0
        self._time_copies()
        self.rows: list[tuple[str, str]] = []
        self.figures: dict[str, float] = {}

    def _time_copies(self) -> None:
        families = self.collector.families

        def timed() -> Any:
            began = time.perf_counter()
            copied = families()
            self.copied_ms = max(self.copied_ms, (time.perf_counter() - began) * 1000)
            return copied

        setattr(self.collector, "families", timed)  # noqa: B010 - the type checker's sake

    def note(self, name: str, value: float, text: str, what: str) -> None:
        """One figure: its name in the JSON, its number, and its row in the table."""
        self.figures[name] = round(value, 6)
        self.rows.append((what, text))

    async def run(self, *, scrapes: int, storms_scraped: int, readers: Sequence[int]) -> None:
        """Everything, in order."""
        gc.collect()
        empty = _resident()
        present = list(self.fleet.present())
        count = 1 + storms_scraped + len(readers)
        storms = [list(self.fleet.storm(f"r{number}")) for number in range(count)]
        gc.collect()
        gc.freeze()  # these messages are the benchmark's: an exporter would not look through them
        with_messages = _resident()
        port = free_port()
        registry = CollectorRegistry()
        scrape = Scrape(self.collector)
        page = LivePage(self.exporter.stream)
        ticking = asyncio.create_task(self.exporter.stream.run())
        try:
            async with serve_health(
                f"127.0.0.1:{port}", {}, registry, extend=page.extend, metrics=scrape.handle
            ):
                await self._fold(present, "of the present", "present")
                self._bare(storms[0])
                await self._fold(storms[0], "of a rollout", "rollout")
                self.figures["storm_messages"] = len(storms[0])
                ratio = self.figures["rollout_per_s"] / self.figures["decode_per_s"]
                self.note(
                    "fold_ratio", ratio, f"{ratio:.2f}", "the exporter's rate against the bare decode's"
                )
                await self._alone(storms[0])
                gc.collect()
                grown = _resident() - with_messages
                self.note("resident_growth_bytes", grown, f"{grown / _MIB:.0f} MiB", "memory for this fleet")
                whole = empty + grown
                self.note("resident_bytes", whole, f"{whole / _MIB:.0f} MiB", "memory of such an exporter")
                await self._scrape(port, scrapes)
                peak = _peak() - with_messages + empty
                text = f"{peak / _MIB:.0f} MiB"
                self.note("resident_peak_bytes", peak, text, "the most memory, while a scrape is written out")
                await self._scrape_in_storms(port, storms[1 : 1 + storms_scraped])
                for count, storm in zip(readers, storms[1 + storms_scraped :], strict=True):
                    await self._read(port, count, storm)
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)

    def _bare(self, messages: list[Delivery]) -> None:
        began = time.perf_counter()
        for each in messages:
            decode(each.topic, each.payload)
        rate = len(messages) / (time.perf_counter() - began)
        self.note("decode_per_s", rate, f"{rate:,.0f}/s", "messages of a rollout, decoded and dropped")

    async def _fold(self, messages: list[Delivery], what: str, name: str) -> None:
        seconds = await self._deliver(messages)
        rate = len(messages) / seconds
        self.note(f"{name}_per_s", rate, f"{rate:,.0f}/s", f"messages {what}, taken in whole")

    async def _deliver(self, messages: list[Delivery]) -> float:
        began = time.perf_counter()
        for number, each in enumerate(messages):
            await self.exporter.deliver(each)
            if number % _PORTION == 0:
                await asyncio.sleep(0)
        return time.perf_counter() - began

    async def _alone(self, messages: list[Delivery]) -> None:
        """The page's part of the folding: the same messages into a fold of its own, already decoded."""
        live = type(self.exporter.live)()
        received = [decode(each.topic, each.payload) for each in messages]
        now = time.time()
        began = time.perf_counter()
        for each in received:
            live.take(each, now, began, fresh=True)
        cost = (time.perf_counter() - began) / len(received)
        self.note(
            "page_fold_us", cost * 1e6, f"{cost * 1e6:.1f} µs a message", "of that, the live page's fold"
        )
        began = time.perf_counter()
        body = self.exporter.stream.state()
        took = time.perf_counter() - began
        text = f"{len(body) / _MIB:.2f} MiB in {took * 1000:.0f} ms"
        self.note("snapshot_s", took, text, "a snapshot of the page, once for each reader that comes")

    async def _scrape(self, port: int, scrapes: int) -> None:
        late = Lateness()
        watching = asyncio.create_task(late.run())
        began_s = time.process_time()
        told = await _other("scrape", port, scrapes)
        cost_ms = (time.process_time() - began_s) / scrapes * 1000
        watching.cancel()
        self.note("scrape_cpu_ms", cost_ms, f"{cost_ms:.0f} ms", "processor time of a scrape")
        self.note(
            "copy_ms",
            self.copied_ms,
            f"{self.copied_ms:.0f} ms",
            "a scrape's copy on the event loop, at most",
        )
        series, size = told["series"], told["bytes"]
        self.note("series", series, f"{series:,}", "series")
        self.note("scrape_bytes", size, f"{size / _MIB:.1f} MiB", "one scrape, as text")
        for share in (50, 99):
            value = percentile(told["seconds"], share / 100)
            self.note(f"scrape_p{share}_s", value, f"{value:.3f} s", f"a scrape, p{share} of {scrapes}")
        self.note(
            "scrape_block_ms",
            late.worst_ms,
            f"{late.worst_ms:.0f} ms",
            "event loop held up by a scrape, at most",
        )

    async def _scrape_in_storms(self, port: int, storms: Sequence[list[Delivery]]) -> None:
        """Scrapes while messages come as fast as they are taken in, and what the two do to each other."""
        if not storms:
            return
        self.copied_ms = 0.0
        late = Lateness()
        watching = asyncio.create_task(late.run())
        process = await _start("storm", port, 0)
        seconds = 0.0
        for storm in storms:
            seconds += await self._deliver(storm)
        assert process.stdin is not None
        process.stdin.close()
        out, _ = await process.communicate()
        watching.cancel()
        told = json.loads(out)
        rate = sum(map(len, storms)) / seconds
        asked = len(told["seconds"])
        self.note("storm_series", told["series"], f"{told['series']:,}", "series at the end of the storm")
        self.note("storm_scrapes", asked, str(asked), "scrapes while a rollout storms")
        for share in (50, 99):
            value = percentile(told["seconds"], share / 100)
            self.note(f"storm_scrape_p{share}_s", value, f"{value:.3f} s", f"  p{share} of them")
        self.note("storm_scraped_per_s", rate, f"{rate:,.0f}/s", "  messages taken in meanwhile")
        text = f"{self.copied_ms:.0f} ms"
        self.note("storm_copy_ms", self.copied_ms, text, "  a scrape's copy on the event loop, at most")
        self.note("storm_block_ms", late.worst_ms, f"{late.worst_ms:.0f} ms", "  event loop held up, at most")

    async def _read(self, port: int, count: int, storm: list[Delivery]) -> None:
        reading = asyncio.create_task(_other("read", port, count)) if count else None
        if reading is not None:
            async with asyncio.timeout(30):
                while self.exporter.stream.readers < count:  # noqa: ASYNC110 - another process announces nothing
                    await asyncio.sleep(0.01)
        late = Lateness()
        watching = asyncio.create_task(late.run())
        rate = len(storm) / await self._deliver(storm)
        watching.cancel()
        self.exporter.stream.close()
        told = await reading if reading is not None else {"bytes": 0, "events": 0}
        self.exporter.stream.closing = False
        text = f"{rate:,.0f}/s"
        if count:
            text += (
                f"; {told['events'] / count:.0f} changes and {told['bytes'] / count / _MIB:.1f} MiB to each"
            )
        self.note(
            f"storm_with_{count}_readers_per_s",
            rate,
            text,
            f"messages taken in with {count} readers of the page",
        )
        self.note(
            f"block_with_{count}_readers_ms",
            late.worst_ms,
            f"{late.worst_ms:.0f} ms",
            "  event loop held up, at most",
        )


async def _start(task: str, port: int, number: int) -> asyncio.subprocess.Process:
    """Another process of this script, so that its work is not ours."""
    words = (sys.executable, __file__, "--task", task, str(port), str(number))
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe)


async def _other(task: str, port: int, number: int) -> dict[str, Any]:
    out, _ = await (await _start(task, port, number)).communicate()
    answer: dict[str, Any] = json.loads(out)
    return answer


_AS_PROMETHEUS = {
    "Accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "Accept-Encoding": "gzip",
}
_BETWEEN_S = 0.25  # s between two scrapes in a storm


def scrape(port: int, times: int | None) -> dict[str, Any]:
    """Scrape so many times, or until the standard input ends; seconds of each, and what came."""
    seconds, body = [], b""
    kept = http.client.HTTPConnection("127.0.0.1", port, timeout=120)  # as Prometheus keeps it
    while times is None or len(seconds) < times:
        began = time.perf_counter()
        kept.request("GET", "/metrics", headers=_AS_PROMETHEUS)
        body = kept.getresponse().read()
        seconds.append(time.perf_counter() - began)
        if times is None and select.select([sys.stdin], [], [], _BETWEEN_S)[0]:
            break
    kept.close()
    text = gzip.decompress(body)
    series = sum(not line.startswith(b"#") for line in text.splitlines())
    return {"seconds": seconds, "bytes": len(text), "series": series}


async def read(port: int, readers: int) -> dict[str, Any]:
    """So many streams, read until they end."""

    async def one() -> tuple[int, int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /live/events HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        size = events = 0
        while part := await reader.read(1 << 16):
            size += len(part)
            events += part.count(b"event: ")
        writer.close()
        return size, events

    found = await asyncio.gather(*(one() for _ in range(readers)))
    return {"bytes": sum(size for size, _ in found), "events": sum(events for _, events in found)}


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - a number of the kernel's
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python benchmarks/exporter.py\n  python benchmarks/exporter.py --vms 500 --hosts 50 --sets 10 --domains 5\n"
        "  python benchmarks/exporter.py --readers --storms 5    # scrapes in storms, without the page's readers\n"
        "  python benchmarks/exporter.py --json | jq .storm_scrape_p99_s",
    )
    parser.add_argument("--vms", type=int, default=10_000, help="VMs (default 10000)")
    parser.add_argument("--hosts", type=int, default=1000, help="hosts (default 1000)")
    parser.add_argument("--sets", type=int, default=50, help="availability sets (default 50)")
    parser.add_argument("--domains", type=int, default=20, help="update domains of each set (default 20)")
    parser.add_argument("--scrapes", type=int, default=20, help="scrapes to time at rest (default 20)")
    parser.add_argument("--storms", type=int, default=2, help="storms in which to scrape (default 2)")
    parser.add_argument(
        "--readers", type=int, nargs="*", default=[0, 8, 32], help="readers of the page, storms in turn"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        task, port, number = given.task
        if task == "read":
            told = asyncio.run(read(int(port), int(number)))
        else:
            told = scrape(int(port), None if task == "storm" else int(number))
        print(json.dumps(told))
        return 0
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    bench = Bench(Storms(given.vms, given.sets, given.domains, given.hosts))
    asyncio.run(bench.run(scrapes=given.scrapes, storms_scraped=given.storms, readers=given.readers))
    if given.json:
        print(
            json.dumps(
                {
                    "vms": given.vms,
                    "hosts": len(bench.fleet.hosts),
                    "sets": given.sets,
                    "domains": given.domains,
                    **bench.figures,
                }
            )
        )
        return 0
    print(
        f"{given.vms:,} VMs on {len(bench.fleet.hosts)} hosts, {given.sets} sets of {given.domains} domains;"
    )
    print(f"{int(bench.figures['storm_messages']):,} messages a rollout\n")
    print("| What | Measured |\n| --- | --- |")
    for what, text in bench.rows:
        print(f"| {what} | {text} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
