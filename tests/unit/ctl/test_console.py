"""What guests and hosts wrote does nothing to an operator's terminal."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from rich.console import Console
from rich.table import Table

from caesura.contract import messages as m
from caesura.contract.codec import Received, decode, encode
from caesura.contract.topics import channel_of
from caesura_ctl import errors, options
from caesura_ctl.commands.inspect import _print_message, _role
from caesura_ctl.console import VisibleConsole, visible, visible_json
from caesura_ctl.errors import fail
from caesura_ctl.fleet_view import FleetView
from caesura_ctl.options import Context, print_json
from caesura_ctl.settings import CtlSettings

HOSTILE = "ok\x1b[2J\x9b31m\x85\u202egnp.exe\u2066\u200f\u061c\u2028\U000e0041 [/bold] [red]:smile:"
"""A cleared screen, a colour by C1, a line break by C1, text turned round, what cannot be seen, markup."""
_DANGEROUS = "\x1b\x9b\x85\u202e\u2066\u200f\u061c\u2028\U000e0041"


def received() -> Received:
    message = m.VmReady(vm="web-1", event_id="e", ready=False, reason=HOSTILE)
    payload = encode(message, source="/x", event_id="1", time=datetime(2026, 1, 1, tzinfo=UTC))
    return decode(channel_of(m.VmReady).topic(vm="web-1"), payload)


def harmless(text: str) -> bool:
    return not set(text) & set(_DANGEROUS)


@pytest.mark.parametrize("as_json", [False, True])
def test_tail_shows_characters_by_their_number_and_the_rest_as_it_is(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    context = Context(CtlSettings(), as_json, options.wide_console())
    _print_message(context, received())
    shown = capsys.readouterr().out
    assert harmless(shown)
    assert r"\u202egnp.exe" in shown
    assert "[/bold] [red]:smile:" in shown
    body = json.loads(shown)["data"] if as_json else json.loads(shown[shown.index("{") :])
    assert body["reason"] == HOSTILE, "it is JSON, and says the same"


def test_tables_too() -> None:
    table = Table("reason")
    table.add_row(HOSTILE)
    console = VisibleConsole(file=io.StringIO(), markup=False, emoji=False, width=200, force_terminal=True)
    console.print(table)
    console.print(HOSTILE)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert r"\u001b[2J" in shown
    assert r"\u202e" in shown
    assert "\x1b[2J" not in shown
    assert not set(shown) & (set(_DANGEROUS) - {"\x1b"})


def test_what_all_commands_print_on_is_such_a_console() -> None:
    assert isinstance(options.wide_console(), VisibleConsole)
    assert issubclass(VisibleConsole, Console)


def test_errors_and_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (False, True):
        with pytest.raises(SystemExit):
            fail(errors.NotCompleted(HOSTILE), as_json=as_json)
    print_json({"reason": HOSTILE})
    captured = capsys.readouterr()
    assert harmless(captured.out + captured.err)
    assert json.loads(captured.out)["reason"] == HOSTILE
    assert json.loads(captured.err.splitlines()[1])["reason"] == HOSTILE


def test_letters_of_all_languages_stay() -> None:
    text = "Grüße, здравствуй, 你好, שלום, line\nbreak\tand tab"
    assert visible(text) == text
    assert visible_json(msgspec.json.encode(text)) == msgspec.json.encode(text).decode()


def test_a_leader_that_was_killed_is_not_shown_as_one() -> None:
    """Its last word stays on the bus: only the epoch of the next one tells."""
    killed = m.CoordinatorStatus(coordinator="one", online=True, leads=True, epoch=4)
    assert _role(killed, 4) == "leads"
    assert _role(killed, 4, 300.0) == "leads", "it is on the bus: another one's clock is ahead"
    assert _role(killed, 5) == "led with epoch 4, it has sent nothing since"
    # Nobody took over, and the broker has announced its last will, which is of no epoch.
    assert _role(killed, 0, announced_gone=True) == "led with epoch 4, it is not on the broker"
    stands_by = m.CoordinatorStatus(
        coordinator="two", online=True, leads=False, epoch=3, waits_for="another coordinator leads"
    )
    assert _role(stands_by, 5) == "stands by: another coordinator leads"


@pytest.mark.parametrize(
    ("waits_for", "shown"),
    [
        ("the store", "stands by, waits for the store"),
        ("the broker", "stands by, waits for the broker"),
        (
            "the end of coordinator x, which leads",
            "stands by, waits for the end of coordinator x, which leads",
        ),
        (
            "its next try in 2 s: it lost the lead",
            "stands by, waits for its next try in 2 s: it lost the lead",
        ),
        ("cannot use postgresql://db/c: no route", "stands by: cannot use postgresql://db/c: no route"),
        ("the session with the store is lost", "stands by: the session with the store is lost"),
    ],
)
def test_what_a_standby_waits_for_is_a_sentence(waits_for: str, shown: str) -> None:
    assert (
        _role(m.CoordinatorStatus(coordinator="two", online=True, leads=False, waits_for=waits_for), 5)
        == shown
    )


def test_a_standby_that_was_killed_is_not_shown_as_one() -> None:
    """Its last word stays on the bus, too. The reader's own clock does not matter."""
    view = FleetView()
    began = datetime(2026, 4, 20, 12, 0, tzinfo=UTC)

    def at(seconds: float) -> datetime:
        return began + timedelta(seconds=seconds)

    one = m.CoordinatorStatus(coordinator="one", online=True, leads=True, epoch=4)
    two = m.CoordinatorStatus(
        coordinator="two", online=True, leads=False, waits_for="another coordinator leads"
    )
    view.note_sent(two, at(0))
    view.note_sent(one, at(60))
    assert (view.silence_s("one"), view.silence_s("two")) == (0, 0)
    assert _role(two, 4, view.silence_s("two")) == "stands by: another coordinator leads"
    view.note_sent(one, at(80))
    assert _role(one, 4, view.silence_s("one")) == "leads"
    assert _role(two, 4, view.silence_s("two")) == "stood by, it has sent nothing for 80 s"
    gone = msgspec.structs.replace(two, online=False, waits_for="")
    view.note_sent(gone, at(0))
    assert _role(gone, 4, view.silence_s("two")) == "OFFLINE", "it has said so itself"
    assert view.silence_s("three") == 0
