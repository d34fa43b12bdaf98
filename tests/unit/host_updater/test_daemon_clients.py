"""Process VMs whose processes would be somebody else's: refused by name."""

from __future__ import annotations

import json

import pytest

from caesura_host_updater.drivers.process.daemon_clients import hands_over
from caesura_host_updater.drivers.process.definition import ProcessVm
from caesura_host_updater.inventory.host_config import HostFileError, parse_host_file

HOST = """
host = "h"
[[vm]]
name = "web-1"
[[vm.process]]
argv = {argv}
"""


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["docker", "run", "--rm", "nginx"], "docker"),
        (["/usr/bin/docker", "compose", "up"], "/usr/bin/docker"),
        (["podman", "run", "nginx"], "podman"),
        (["env", "-i", "A=b", "nice", "-n", "5", "docker", "start", "-a", "web"], "docker"),
        (["sudo", "-n", "systemd-run", "--scope", "sleep", "1"], "systemd-run"),
        (["sudo", "-u", "web", "docker", "run", "nginx"], "docker"),
        (["sudo", "-n", "sh", "-c", "docker run nginx"], "docker"),
        (["timeout", "-s", "KILL", "-k", "5", "60", "nice", "-n", "5", "docker", "ps"], "docker"),
        (["sh", "-c", "cd /srv && exec docker run nginx"], "docker"),
        (["bash", "-euc", "true; systemctl start web"], "systemctl"),
        (["timeout", "10", "ssh", "other", "true"], "ssh"),
        (["sh", "-c", "trap : TERM\nkubectl apply -f x"], "kubectl"),
        (["sh", "-c", "(docker run nginx) & wait"], "docker"),
    ],
)
def test_what_hands_over_is_refused_by_name(argv: list[str], named: str) -> None:
    why = hands_over(argv)
    assert f"runs {named!r}" in why
    with pytest.raises(HostFileError, match=r"web-1.*freezing it would freeze nothing"):
        parse_host_file(HOST.format(argv=json.dumps(argv)), "host.toml")


@pytest.mark.parametrize(
    "argv",
    [
        ["python3", "-m", "http.server"],
        ["sh", "-c", "echo docker run; exec ./web --name docker"],
        ["sh", "/srv/docker"],
        ["grep", "docker"],
        ["./docker-entrypoint.sh"],
        ["sh", "-c", "'unclosed"],
        ["dockerd-like"],
        ["sudo", "-u", "docker-user", "./web", "--name", "docker"],
        ["nice", "-n", "5", "./web", "docker"],
        ["env"],
        ["sh", "-c"],
    ],
)
def test_what_does_not_is_not(argv: list[str]) -> None:
    assert hands_over(argv) == ""
    (vm,) = parse_host_file(HOST.format(argv=json.dumps(argv)), "host.toml").vm
    assert isinstance(vm, ProcessVm)
    assert vm.process[0].argv == tuple(argv)
