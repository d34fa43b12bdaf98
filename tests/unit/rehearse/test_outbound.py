"""What leads out of a program's own network, how names are resolved there, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from caesura_rehearse.network.outbound import RESOLVER, outbound_command, resolver_file, start_outbound
from caesura_testing.patience import patient


def found(*names: str) -> dict[str, str]:
    return {name: f"/usr/bin/{name}" for name in names}


def test_which_program_leads_out() -> None:
    both = found("slirp4netns", "pasta").get
    assert outbound_command(77, 1000, both)[0] == "/usr/bin/slirp4netns"
    assert outbound_command(77, 1000, both)[-2:] == ("77", "tap0")
    assert outbound_command(77, 1000, found("pasta").get)[0] == "/usr/bin/pasta"
    assert outbound_command(77, 0, found("pasta").get) == (), "it gives up root, and cannot enter then"
    assert outbound_command(77, 0, both)[0] == "/usr/bin/slirp4netns"
    assert outbound_command(77, 1000, found().get) == ()


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("nameserver 10.1.1.1\n", None),
        ("nameserver 127.0.0.53\nnameserver 10.1.1.1\n", None),
        (
            "# made by systemd-resolved\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch example.org\n",
            f"nameserver {RESOLVER}\n# made by systemd-resolved\noptions edns0 trust-ad\nsearch example.org\n",
        ),
        ("nameserver ::1\n", f"nameserver {RESOLVER}\n"),
        ("", f"nameserver {RESOLVER}\n"),
        ("nameserver fe80::1%eth0\n", None),
    ],
)
def test_a_resolver_on_loopback_is_replaced(tmp_path: Path, text: str, inside: str | None) -> None:
    file = resolver_file(tmp_path, text)
    assert (file.read_text(encoding="utf-8") if file is not None else None) == inside


async def test_what_leads_out_ends_with_us(tmp_path: Path) -> None:
    code = (
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(600)"
    )
    outbound = await start_outbound((sys.executable, "-I", "-S", "-c", code))
    file = tmp_path / "pid"
    async with asyncio.timeout(patient(30)):
        while not (file.exists() and file.read_text().endswith("\n")):  # noqa: ASYNC110 - nobody notifies us
            await asyncio.sleep(0.01)
    pid = int(file.read_text())
    os.kill(pid, 0)
    await outbound.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("sh", "-c", "echo no tun >&2; exit 1"), "no tun"),
        (("sh", "-c", "exit 3"), "sh ended with 3"),
        (("/no/such/program",), "cannot start /no/such/program: No such file"),
    ],
)
async def test_one_that_fails_says_why(argv: tuple[str, ...], says: str) -> None:
    outbound = await start_outbound(argv)
    async with asyncio.timeout(patient(30)):
        assert says in await outbound.ended()
    await outbound.close()
