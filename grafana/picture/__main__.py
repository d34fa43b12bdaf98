"""``python -m grafana.picture --prometheus URL --out FILE.png``: a picture of a dashboard's stat, time series and bar panels.

No Grafana runs: the panels are drawn by the packages ``@grafana/ui`` and ``@grafana/data`` in a headless Chromium, from the
committed dashboard and what Prometheus answers to its queries. State timelines, heatmaps and tables are not part of those
packages and are left out. Before the first run: ``npm ci --prefix grafana/picture && npm run --prefix grafana/picture build``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from caesura_testing.browser import chromium
from caesura_testing.queries import substituted

_HERE = Path(__file__).parent
_EMPTY = "<!doctype html><title>Panels</title><div id=page></div>"
_DRAWN = {"stat", "timeseries", "bargauge"}


async def answered(
    base_url: str, dashboard: Mapping[str, Any], values: Mapping[str, str], start: float, end: float
) -> list[dict[str, Any]]:
    """The panels that can be drawn, each with what Prometheus answers to its queries.

    Raises:
        SystemExit: Prometheus refused a query.
    """
    panels = []
    async with aiohttp.ClientSession(base_url) as session:
        for panel in dashboard["panels"]:
            if panel["type"] not in _DRAWN:
                continue
            answers = []
            for target in panel["targets"]:
                asked = {
                    "query": substituted(target["expr"], values),
                    # A stat shows the value at the end.
                    "start": str(end if target.get("instant") else start),
                    "end": str(end),
                    "step": str(max(1.0, (end - start) / 600)),
                }
                async with session.get("/api/v1/query_range", params=asked) as answer:
                    body = await answer.json()
                if body["status"] != "success":
                    raise SystemExit(f"{panel['title']}: {body['error']}")
                answers.append(body["data"]["result"])
            panels.append({**panel, "answers": answers})
    return panels


async def draw(arguments: argparse.Namespace) -> None:
    """Query, draw, write the file."""
    script = _HERE / "build" / "panels.js"
    if not script.exists():
        raise SystemExit(
            "build it first: npm ci --prefix grafana/picture && npm run --prefix grafana/picture build"
        )
    dashboard = json.loads(arguments.dashboard.read_text(encoding="utf-8"))
    package = json.loads((_HERE / "package.json").read_text(encoding="utf-8"))
    version = package["dependencies"]["@grafana/ui"]
    end = time.time()
    start = end - arguments.minutes * 60
    values = {
        "__rate_interval": "20s",
        "__interval": "1s",
        "job": ".+",
        "instance": ".+",
        "set": arguments.set,
    }
    values["update_domain"] = arguments.domain
    what = {
        "title": dashboard["title"],
        "panels": await answered(arguments.prometheus, dashboard, values, start, end),
        "from": start,
        "to": end,
        "width": arguments.width,
        "caption": f"Drawn by @grafana/ui {version} from the committed dashboard and a live Prometheus, without Grafana's server. "
        "Times are UTC. State timelines, heatmaps and tables are left out.",
    }
    async with chromium() as browser:
        page = await browser.new_page(viewport={"width": arguments.width, "height": 800})
        # An address of its own: Grafana's code needs local storage, which a blank page lacks. Nothing is fetched.
        await page.route("**/*", lambda route: route.fulfill(body=_EMPTY, content_type="text/html"))
        await page.goto("http://picture.invalid/")
        await page.add_script_tag(path=script)
        await page.evaluate("what => window.draw(what)", what)
        await page.wait_for_function("document.querySelectorAll('section').length > 0")
        await page.screenshot(path=arguments.out, full_page=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m grafana.picture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    overview = _HERE.parent / "dashboards" / "overview.json"
    parser.add_argument("--prometheus", required=True, help="its address: http://127.0.0.1:9090")
    parser.add_argument("--out", required=True, type=Path, help="the PNG file")
    parser.add_argument("--dashboard", type=Path, default=overview, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=10, help="how far back (default: %(default)s)")
    parser.add_argument("--set", default=".+", help="the set (default: all)")
    parser.add_argument("--domain", default=".+", help="the update domain (default: all)")
    parser.add_argument("--width", type=int, default=1400, help="pixels (default: %(default)s)")
    asyncio.run(draw(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
