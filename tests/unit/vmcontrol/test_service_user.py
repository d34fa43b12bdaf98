"""Whose rights an arrival has: those of the user whose folder it works in, never root's for what that user wrote."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from caesura_vmcontrol import service_user
from caesura_vmcontrol.service_user import ServiceUser, become, user_of, user_to_become

USERS = "root:x:0:0:root:/root:/bin/sh\ncaesura-host:x:990:985::/var/lib/caesura:/usr/sbin/nologin\ngarbled\n"
GROUPS = "root:x:0:\nkvm:x:104:other,caesura-host\ndisk:x:6:other\ncaesura-host:x:985:\ngarbled\n"


def test_a_user_has_its_groups_and_no_others() -> None:
    assert user_of(990, 1, USERS, GROUPS) == ServiceUser(990, 985, (104, 985))
    assert user_of(991, 7, USERS, GROUPS) == ServiceUser(991, 7, (7,))
    assert user_of(990, 7, "", "") == ServiceUser(990, 7, (7,))


def test_who_is_not_root_stays_who_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 990)
    assert user_to_become(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("mode", "gid", "groups"), [(0o20660, 104, (7, 104)), (0o20600, 104, (7,)), (0o20660, 0, (7,))]
)
def test_root_becomes_the_owner_with_the_group_that_may_use_kvm(
    monkeypatch: pytest.MonkeyPatch, mode: int, gid: int, groups: tuple[int, ...]
) -> None:
    places = {
        "/folder": SimpleNamespace(st_uid=4711, st_gid=7),
        "/dev/kvm": SimpleNamespace(st_mode=mode, st_gid=gid),
    }
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "stat", places.__getitem__)
    monkeypatch.setattr(service_user, "_text", lambda _: "")
    assert user_to_become("/folder") == ServiceUser(4711, 7, groups)
    places["/folder"].st_uid = 0
    assert user_to_become("/folder") is None


def test_the_groups_go_before_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards nobody may."""
    done: list[object] = []
    for name in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, name, lambda *words, name=name: done.append((name, *words)))
    become(ServiceUser(990, 985, (104, 985)))
    assert done == [("setgroups", (104, 985)), ("setresgid", 985, 985, 985), ("setresuid", 990, 990, 990)]
