"""The listeners file: refused by name and line, before anything listens."""

from __future__ import annotations

from pathlib import Path

import pytest

from caesura_metadata_publisher.listeners import Listener, ListenersError, parse_listeners, read_listeners

GOOD = """
[[listener]]
vm = "web-1"
listen = "127.0.0.1:8101"

[[listener]]
vm = "web-1"
listen = "unix:/run/caesura/web-1.sock"
"""


def test_a_vm_may_have_an_address_and_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "listeners.toml"
    path.write_text(GOOD)
    assert read_listeners(str(path)) == (
        Listener("web-1", "127.0.0.1:8101"),
        Listener("web-1", "unix:/run/caesura/web-1.sock"),
    )


def entry(vm: str = '"web-1"', listen: str = '"127.0.0.1:8101"', more: str = "") -> str:
    return f"[[listener]]\nvm = {vm}\nlisten = {listen}\n{more}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no listener"),
        ("[[listener]]\nvm = \nlisten = 1", "line 2"),
        ('[[listeners]]\nvm = "a"', "listeners"),
        (entry() + entry(), r"listener 2 \(line 5\): 127.0.0.1:8101 is taken by listener 1"),
        (entry(more="ud = 3"), r"listener 1 \(line 1\).*ud"),
        (entry(vm="5"), r"listener 1 \(line 1\).*vm"),
        (entry(vm='"web.1"'), "'web.1'"),
        (entry(vm='"_web"'), "underscore"),
        ("[[listener]]\nvm = 'a'", "listen"),
        (entry(listen='""'), "listen"),
        (entry(listen='"8101"'), "give host:port"),
        (entry(listen='"127.0.0.1:99999"'), "give host:port"),
        (entry(listen='"127.0.0.1:²"'), "give host:port"),
        (entry(listen='"unix:relative.sock"'), "absolute path"),
        (entry(listen='"0.0.0.0:80"'), "every VM speak as web-1"),
        (entry(listen='"[::]:80"'), "every VM speak as web-1"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(text: str, words: str) -> None:
    with pytest.raises(ListenersError, match=words) as caught:
        parse_listeners(text, "listeners.toml")
    assert "listeners.toml" in str(caught.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ListenersError, match=r"/nowhere/listeners\.toml"):
        read_listeners("/nowhere/listeners.toml")
