"""A way out of a program's own network, by slirp4netns or pasta, which need no root: they carry its connections as this user's."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from caesura.runtime.threads import in_thread
from caesura_rehearse.network import outbound_helper

RESOLVER = "10.0.2.3"
"""The address inside at which both resolve names as this machine does (slirp4netns(1); passt(1), ``--dns-forward``)."""
_END_S = 5.0  # s: for the helper to end; milliseconds are usual

Find = Callable[[str], str | None]


class Outbound:
    """The helper beside a network, and its end."""

    def __init__(self, process: subprocess.Popen[bytes], orders: socket.socket) -> None:
        self._process = process
        self._orders = orders

    async def ended(self) -> str:
        """Wait until the tool has ended by itself; its last words."""
        loop = asyncio.get_running_loop()
        return (await loop.sock_recv(self._orders, 4096)).decode(errors="replace") or "it ended"

    async def close(self) -> None:
        """End it."""
        self._orders.close()
        await in_thread("end the way out", self._wait)

    def _wait(self) -> None:
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def outbound_command(pid: int, uid: int, find: Find = shutil.which) -> tuple[str, ...]:
    """What leads out of the network of a process; empty: nothing is installed that does.

    Args:
        uid: ours; pasta gives up root, and cannot enter then.
        find: looks for a program.
    """
    if slirp := find("slirp4netns"):
        return (slirp, "--configure", "--mtu=65520", str(pid), "tap0")
    if uid and (pasta := find("pasta")):
        return (pasta, "--foreground", "--config-net", "--dns-forward", RESOLVER, str(pid))
    return ()


async def start_outbound(argv: tuple[str, ...]) -> Outbound:
    """Start it. Raises OSError."""
    ours, its = socket.socketpair()
    ours.setblocking(False)
    words = [sys.executable, "-I", "-S", outbound_helper.__file__, *argv]
    with its:
        handle = its.fileno()
        process = await in_thread(
            "way out", lambda: subprocess.Popen(words, stdin=handle, start_new_session=True)
        )
    return Outbound(process, ours)


def resolver_file(folder: Path, resolv_conf: str) -> Path | None:
    """A ``resolv.conf`` for inside, in ``folder``; None: the machine's own works there. Blocking.

    A resolver on loopback (systemd-resolved at 127.0.0.53) is not reached from another network.
    """
    lines = resolv_conf.splitlines()
    servers = [words[1] for line in lines if (words := line.split())[:1] == ["nameserver"] and len(words) > 1]
    if servers and not all(_is_loopback(each) for each in servers):
        return None
    others = [line for line in lines if line.split()[:1] not in (["nameserver"], [])]
    file = folder / "resolv.conf"
    file.write_text("\n".join([f"nameserver {RESOLVER}", *others]) + "\n", encoding="utf-8")
    return file


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def resolver_for_inside(folder: Path) -> Path | None:
    """As ``resolver_file`` for this machine, if something leads out. Blocking."""
    if not outbound_command(0, own_uid()):
        return None
    try:
        return resolver_file(folder, Path("/etc/resolv.conf").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def own_uid() -> int:
    """Who we are: 0 is root."""
    return os.geteuid()
