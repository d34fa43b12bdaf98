"""The doctor names the user whose rights count, and a command that this user can run."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from caesura_doctor import service_user
from caesura_doctor.service_user import check_user
from caesura_vmcontrol.guard_socket import SOCKET_NAME


def test_the_same_user(tmp_path: Path) -> None:
    (found,) = check_user(str(tmp_path), os.geteuid())
    assert found.level == "ok"


@pytest.mark.parametrize(("service", "sudo"), [(0, "sudo /"), (54321, "sudo -u '#54321' /")])
def test_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: int, sudo: str) -> None:
    """On a node of Proxmox VE, where both run as root, it sent root to a user who may read nothing there."""
    program = tmp_path / "caesura"
    program.touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "doctor"])
    monkeypatch.setattr(service_user, "_service_uid", lambda _: service)
    (found,) = check_user(str(tmp_path), 54322)
    assert found.level == "warning"
    assert found.remedy.startswith(sudo)
    assert found.remedy.endswith(f"{program} doctor")


def test_whose_the_guards_socket_is_counts(tmp_path: Path) -> None:
    """The folder may be a person's who made it."""
    with socket.socket(socket.AF_UNIX) as guard:
        guard.bind(str(tmp_path / SOCKET_NAME))
        assert service_user._service_uid(tmp_path) == (tmp_path / SOCKET_NAME).stat().st_uid


def test_where_nothing_is_installed_nothing_is_said(tmp_path: Path) -> None:
    assert list(check_user(str(tmp_path / "none"), 0)) == []
