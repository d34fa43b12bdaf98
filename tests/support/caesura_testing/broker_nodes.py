"""Broker clusters whose nodes are processes that live no longer than the test: started, killed, stopped, restarted."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from caesura_testing.patience import patient

_STOP_S = patient(30.0)
_POLL_S = 0.02


class BrokerNode:
    """A process of a cluster.

    Args:
        name: for its log, ``<folder>/<name>.log``.
        argv: the program, by its path, and its arguments.
        folder: where it logs.
        port: its MQTT port on loopback.
        environ: its whole environment; None: that of the test.
        group: whether it has children: signals go to all of them.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        folder: Path,
        port: int,
        environ: Mapping[str, str] | None = None,
        *,
        group: bool = False,
    ) -> None:
        self.name = name
        self.port = port
        self.log = folder / f"{name}.log"
        self._argv = tuple(argv)
        self._environ = environ
        self._group = group
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """How MQTT clients reach it."""
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def runs(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it; returns before it serves. In the main thread: the kernel ends it together with the thread that started it."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "caesura.bus.pdeathsig", str(os.getpid()), *self._argv],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=self._group,
            )

    async def kill(self) -> None:
        """SIGKILL: nothing is written, no client is notified."""
        self._signal(signal.SIGKILL)
        await self._ended()

    async def stop(self) -> None:
        """SIGTERM, as an operator would; SIGKILL when it takes too long."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_S):
                await self._ended()
        except TimeoutError:
            await self.kill()

    def hang(self) -> None:
        """Its kernel answers for it, and nothing else does, until ``kill`` or ``wake``."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """End of ``hang``."""
        self._signal(signal.SIGCONT)

    async def _ended(self) -> None:
        # A process of no event loop, so that a cluster can outlive those of single tests.
        while self.runs:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.runs:
            if self._group:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)


class BrokerCluster(ABC):
    """Brokers that share their messages; enter it with ``async with``."""

    nodes: list[BrokerNode]

    @property
    def url(self) -> str:
        """All nodes, as a setting for clients."""
        return ",".join(each.url for each in self.nodes)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @abstractmethod
    async def start(self) -> None:
        """Start the nodes that do not run, and wait until each serves."""

    async def kill(self) -> None:
        """SIGKILL to all nodes."""
        for node in self.nodes:
            await node.kill()

    async def close(self) -> None:
        """End everything that was started."""
        await self.kill()
