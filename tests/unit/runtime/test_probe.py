"""The health check for where there is no curl."""

from __future__ import annotations

import asyncio
import sys

import pytest
from prometheus_client import CollectorRegistry

from caesura.bus.local_broker import free_port
from caesura.runtime.health import serve_health


async def probe(*words: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "caesura.runtime.probe", *words, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode().strip()


@pytest.mark.parametrize(
    ("why", "code", "said"),
    [("", 0, ""), ("not connected: refused", 1, "503: broker: not connected: refused")],
)
async def test_it_says_what_is_wrong(why: str, code: int, said: str) -> None:
    listen = f"127.0.0.1:{free_port()}"
    pings = {"broker": lambda: why, "store": lambda: ""}
    async with serve_health(listen, pings, CollectorRegistry()):
        assert await probe(f"http://{listen}/ready") == (code, said)


async def test_what_is_no_answer_of_ours_is_shown_as_it_is() -> None:
    listen = f"127.0.0.1:{free_port()}"
    async with serve_health(listen, {}, CollectorRegistry()):
        assert await probe(f"http://{listen}/nothing") == (1, "404: 404: Not Found")


async def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}/ready"
    code, said = await probe(url)
    assert code == 1
    assert said.startswith(f"no answer from {url}: ")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("ready",),
        ("http://a/", "http://b/"),
        ("http://a:port/ready",),
        ("http://a:99999/ready",),
        ("http://[::1/ready",),
        ("http:///ready",),
        ("http://a/re ady",),
    ],
)
async def test_called_wrongly(words: tuple[str, ...]) -> None:
    assert await probe(*words) == (2, "usage: python -m caesura.runtime.probe http://HOST:PORT/ready")


async def test_an_address_of_ipv6_is_one() -> None:
    url = f"http://[::1]:{free_port()}/ready"
    code, said = await probe(url)
    assert code == 1
    assert said.startswith(f"no answer from {url}: ")
