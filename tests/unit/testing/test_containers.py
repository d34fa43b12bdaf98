"""The parts of the containers' test machinery that need no engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from caesura_testing.containers import default_cache, missing_tools
from caesura_testing.fake_images import addresses
from caesura_testing.fleet import Waited, Watch, until


def test_mirrors_are_found_in_both_formats_of_apt() -> None:
    old = """
# deb http://commented.example/debian bookworm main
deb http://one.example/debian bookworm main
deb [signed-by=/a/key.gpg arch=amd64] https://two.example/debian/ bookworm main
deb-src http://source.example/debian bookworm main
"""
    new = (
        "Types: deb\n# http://commented.example/debian\nURIs: http://three.example/debian\nSuites: bookworm\n"
    )
    assert addresses(old) == ["http://one.example/debian", "https://two.example/debian/"]
    assert addresses(new) == ["http://three.example/debian"]
    assert addresses("") == []


def test_what_is_missing_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert missing_tools() == "starting a Docker engine needs root"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(
        "shutil.which", lambda tool, **_: None if tool in {"dockerd", "docker"} else f"/{tool}"
    )
    assert missing_tools() == "not installed (on Debian: apt-get install docker.io)"
    monkeypatch.setattr("shutil.which", lambda tool, **_: f"/{tool}")
    assert missing_tools() == ""


def test_the_cache_is_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_cache() == Path("/cache/caesura/containers")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache() == Path("/home/somebody/.cache/caesura/containers")


def test_a_wait_says_what_it_waited_for() -> None:
    with pytest.raises(Waited, match=r"not within 0\.05 s: the moon"):
        until(lambda: False, 0.05, lambda: "the moon")
    assert until(lambda: True, 0.05, lambda: "") < 0.05


def test_a_watch_sees_who_stood_still_and_with_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: set[int] = set()
    monkeypatch.setattr("caesura_testing.fleet.is_stopped", lambda pid: pid in stopped)
    watch = Watch({"a": 1, "b": 2, "c": 3})
    for now in ({1}, {1, 2}, {2}, set[int]()):
        stopped = now
        watch.look()
    assert [each.vm for each in watch.seen] == ["a", "b"]
    assert all(each.until > each.since for each in watch.seen)
    assert watch.together == [frozenset("a"), frozenset("ab"), frozenset("b")]
    stopped = {3}
    watch.look(last=True)
    assert watch.seen[-1].vm == "c", "still frozen at the end counts until then"
