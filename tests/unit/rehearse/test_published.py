"""Ports that lead into a program's own network."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from caesura_rehearse.network import namespace


async def test_a_program_that_is_not_inside_yet_is_not_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network is still this machine's, where the port is the published one: each connection would make another."""
    started = []

    async def start(what: str, pid: int) -> None:
        started.append((what, pid))
        raise OSError

    monkeypatch.setattr(namespace, "_start_helper", start)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with namespace.published([port], os.getpid):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(60):
            assert await reader.read() == b"", "closed"
        writer.close()
    assert not started
