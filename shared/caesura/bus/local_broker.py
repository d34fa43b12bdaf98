"""A private broker for a demo or a test: Mosquitto if it is installed, else the embedded one.

The settings of ``mosquitto_config`` follow from measurements: without ``set_tcp_nodelay`` a
QoS 1 round trip takes 44 ms, without ``autosave_interval 1`` a killed broker loses what it had queued, and with ``autosave_on_changes true`` it writes
gigabytes for ten thousand messages (``benchmarks/broker.py``).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import random
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from caesura.bus.diagnosis import ClosedEarly, ConnectRefused
from caesura.bus.embedded import EmbeddedBrokerMissing, embedded_available
from caesura.bus.mqtt_connection import MqttConnection
from caesura.bus.options import BrokerOptions
from caesura.bus.port import BusError
from caesura.contract.codec import MAX_PACKET_BYTES
from caesura.runtime.cleanup import shielded

_ASK_EVERY_S = 0.05  # s: a broker is up after 10 ms (Mosquitto) to 1 s (embedded)
_STOP_S = 5.0  # s: Mosquitto writes its store on SIGTERM
MAX_QUEUED_BYTES = 64 * 1024 * 1024
"""What Mosquitto queues for one disconnected or slow client. All retained messages of a fleet of 10,000 VMs have to fit (some
20 MB): a client that subscribes gets them at once, and what exceeds the limit is lost silently."""
MEMORY_LIMIT_BYTES = 1024 * 1024 * 1024
"""Mosquitto's total memory limit: a client whose message does not fit is disconnected, which leaves the machine's memory to other processes."""
_UNPRIVILEGED = 1024
_PORTS, _TRIES = 12_000, 50  # how many ports to choose from, and how often
_HASH_ROUNDS = 101  # mosquitto_passwd's own default
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/sbin")  # not on the PATH of most users


class BrokerNotStarted(BusError):
    """The broker process ended, or did not answer in time; the text contains the end of its log."""


def find_mosquitto() -> Path | None:
    """The Mosquitto binary, also from folders that are only on root's PATH; None if it is not installed."""
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path=os.pathsep.join(_SBIN))
    return Path(found) if found else None


def mosquitto_config(
    *,
    port: int,
    host: str = "127.0.0.1",
    data_dir: Path | None = None,
    unix_path: Path | None = None,
    password_file: Path | None = None,
    acl_file: Path | None = None,
    ca_file: Path | None = None,
    cert_file: Path | None = None,
    key_file: Path | None = None,
    require_certificate: bool = False,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    extra: Sequence[str] = (),
) -> str:
    """A Mosquitto configuration (2.0), with the settings that the suite needs.

    Args:
        data_dir: where queued and retained messages are kept; None: in memory only.
        unix_path: also listen on this unix socket.
        password_file: user names and hashes; None: every client may connect.
        acl_file: access rules; None: every client may read and write everything.
        ca_file, cert_file, key_file: TLS on the TCP listener when ``cert_file`` is given.
        require_certificate: only clients with a certificate of ``ca_file``; its common name is the user.
        memory_limit_bytes: the broker's total memory limit.
        extra: lines to append.
    """
    lines = [
        "per_listener_settings false",
        "set_tcp_nodelay true",
        "max_queued_messages 100000",
        "max_inflight_messages 100",
        f"max_queued_bytes {MAX_QUEUED_BYTES}",
        f"max_packet_size {MAX_PACKET_BYTES}",
        f"memory_limit {memory_limit_bytes}",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "log_dest stderr",
    ]
    if os.geteuid() == 0:
        lines.append("user root")  # otherwise it changes to a user who may not read our files
    if data_dir is not None:
        lines += [
            "persistence true",
            f"persistence_location {data_dir}/",
            "autosave_interval 1",
            "autosave_on_changes false",
        ]
    anybody = password_file is None and not require_certificate
    lines.append(f"allow_anonymous {'true' if anybody else 'false'}")
    if password_file is not None:
        lines.append(f"password_file {password_file}")
    if acl_file is not None:
        lines.append(f"acl_file {acl_file}")
    # The settings below belong to the listener above them. Without the first, any client that knows another's id
    # can take over its connection.
    own_ids = [] if anybody else ["use_username_as_clientid true"]
    if unix_path is not None:
        lines += [f"listener 0 {unix_path}", *own_ids]
    lines += [f"listener {port} {host}", *own_ids]
    if cert_file is not None:
        lines += [f"certfile {cert_file}", f"keyfile {key_file}", f"cafile {ca_file}"]
        if require_certificate:
            lines += ["require_certificate true", "use_identity_as_username true"]
    return "\n".join([*lines, *extra, ""])


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that is free now. A process that asks for exactly this one may take it first.

    It is below the kernel's range of ephemeral ports (ip(7), ``ip_local_port_range``): a connection opened in between
    does not take it.
    """
    lowest = _first_ephemeral_port()
    below = range(max(_UNPRIVILEGED, lowest - _PORTS), lowest)
    for port in (*random.sample(below, k=min(_TRIES, len(below))), 0):
        with (
            socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock,
            contextlib.suppress(OSError),
        ):
            sock.bind((host, port))
            return int(sock.getsockname()[1])
    raise OSError(f"no free TCP port on {host}")


def _first_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return 32768  # the default of Linux; 49152 elsewhere


async def wait_ready(options: BrokerOptions, timeout_s: float) -> None:
    """Wait until a broker answers CONNECT, even with a refusal.

    Raises:
        TimeoutError: it did not within ``timeout_s`` seconds.
    """
    async with asyncio.timeout(timeout_s):
        while True:
            link = MqttConnection(options, "3.1.1", will=None, arrived=lambda _link, _arrival: None)
            try:
                await link.open()
            except ConnectRefused:
                return
            except (OSError, ClosedEarly):
                await asyncio.sleep(_ASK_EVERY_S)
            else:
                await link.disconnect()
                return


class LocalBroker:
    """A broker process that lives as long as this context, and never longer than this process.

    Args:
        kind: "mosquitto", "embedded", or "auto" (Mosquitto if installed).
        host, port: where it listens; port 0: a free one, the same after ``restart``.
        data_dir: where Mosquitto keeps messages over a restart and where logs go; None: a temporary folder.
        config: a whole Mosquitto configuration instead of ``mosquitto_config``'s.
        ready: how to reach it, to see when it is up; needed if ``config`` asks for TLS.
        environ: added to its environment, so that it can be found by a mark there.

    Raises:
        EmbeddedBrokerMissing: neither Mosquitto nor amqtt is installed.
        BrokerNotStarted: on entering.
    """

    def __init__(
        self,
        *,
        kind: Literal["auto", "mosquitto", "embedded"] = "auto",
        host: str = "127.0.0.1",
        port: int = 0,
        data_dir: Path | None = None,
        config: str | None = None,
        ready: BrokerOptions | None = None,
        start_timeout_s: float = 15.0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.kind: Literal["mosquitto", "embedded"]
        self._mosquitto = find_mosquitto() if kind != "embedded" else None
        if kind == "mosquitto" and self._mosquitto is None:
            raise BrokerNotStarted("mosquitto is not installed")
        self.kind = "mosquitto" if self._mosquitto else "embedded"
        if self.kind == "embedded" and not embedded_available():
            raise EmbeddedBrokerMissing
        self.host = host
        self.port = port or free_port(host)
        self._data_dir = data_dir
        self._config = config
        self._ready = ready
        self._start_timeout_s = start_timeout_s
        self._environ = dict(environ or {})
        self._own_dir: tempfile.TemporaryDirectory[str] | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """How clients reach it, without TLS."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt://{host}:{self.port}"

    @property
    def protocol(self) -> Literal["auto", "3.1.1"]:
        """The protocol setting for clients: "auto" finds 3.1.1 too, but takes seconds when they have a user or a will."""
        return "auto" if self.kind == "mosquitto" else "3.1.1"

    @property
    def pid(self) -> int | None:
        """The broker's process id, while it runs."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process is not None and running else None

    async def __aenter__(self) -> Self:
        if self._data_dir is None:
            self._own_dir = tempfile.TemporaryDirectory(prefix="caesura-broker-")
            self._data_dir = Path(self._own_dir.name)
        try:
            await self.start()
        except BaseException:
            await shielded(self._clean_up())
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await shielded(self._clean_up())

    async def start(self) -> None:
        """Start the process and wait until it answers.

        Raises:
            BrokerNotStarted: it ended, or did not answer in time.
        """
        if self._data_dir is None:
            raise BrokerNotStarted("a LocalBroker is started with `async with`")
        log = self._data_dir / "broker.log"
        with log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(self._data_dir),
                env={**os.environ, **self._environ},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        ready = asyncio.create_task(
            wait_ready(self._ready or BrokerOptions(url=self.url), self._start_timeout_s)
        )
        ended = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done() or ready.exception() is not None:
                tail = log.read_text(errors="replace")[-1000:].strip()
                await self.kill()
                raise BrokerNotStarted(
                    f"the {self.kind} broker did not start at {self.url}: {tail or 'no output'}"
                )
        finally:
            for task in (ready, ended):
                task.cancel()
            await asyncio.wait({ready, ended})

    async def stop(self) -> None:
        """Stop it with SIGTERM, as an operator would; SIGKILL after a few seconds."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """Stop it with SIGKILL: clients get no DISCONNECT, nothing is written."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def restart(self) -> None:
        """Stop, and start again on the same port."""
        await self.stop()
        await self.start()

    def _command(self, data_dir: Path) -> list[str]:
        parent = str(os.getpid())
        if self._mosquitto is None:
            where = ["--host", self.host, "--port", str(self.port), "--parent", parent]
            return [sys.executable, "-m", "caesura.bus.embedded", *where]
        path = data_dir / "mosquitto.conf"
        path.write_text(
            self._config or mosquitto_config(port=self.port, host=self.host, data_dir=data_dir),
            encoding="utf-8",
        )
        return [sys.executable, "-m", "caesura.bus.pdeathsig", parent, str(self._mosquitto), "-c", str(path)]

    async def _clean_up(self) -> None:
        await self.stop()
        if self._own_dir is not None:
            self._own_dir.cleanup()
            self._own_dir = None
            self._data_dir = None


def password_line(user: str, password: str) -> str:
    """A line of Mosquitto's password file: PBKDF2 with SHA-512, as mosquitto_passwd writes it."""
    salt = secrets.token_bytes(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _HASH_ROUNDS)
    encoded = "$".join(base64.b64encode(each).decode() for each in (salt, digest))
    return f"{user}:$7${_HASH_ROUNDS}${encoded}\n"
