"""How much of the fleet a request may touch: options, and the question when nothing was selected."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from caesura.contract import messages as m
from caesura_ctl import blast
from caesura_ctl.blast import limits_from
from caesura_ctl.cli import caesura
from caesura_ctl.commands import rollouts

_NOTHING: dict[str, Any] = {"sets": (), "hosts": (), "vms": (), "all_hosts": False}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The bodies that would be run; no broker is needed."""
    found: list[Any] = []
    monkeypatch.setattr(rollouts, "run", lambda body, *_, **__: found.append(body))
    return found


@pytest.mark.parametrize("words", [["roll", "patch"], ["roll", "patch", "--json"], ["freeze", "--for", "2s"]])
def test_without_a_selection_nothing_is_paused_unless_all_is_said(words: list[str], asked: list[Any]) -> None:
    result = CliRunner().invoke(caesura, words)
    assert result.exit_code == 2
    assert "--all for the whole fleet" in result.stderr
    assert not asked
    assert CliRunner().invoke(caesura, [*words, "--all"]).exit_code == 0
    assert len(asked) == 1


def test_an_exclusion_is_no_selection(asked: list[Any]) -> None:
    assert CliRunner().invoke(caesura, ["roll", "patch", "--exclude-host", "h1"]).exit_code == 2
    assert not asked


def test_all_and_a_selection_contradict_each_other(asked: list[Any]) -> None:
    result = CliRunner().invoke(caesura, ["roll", "patch", "--all", "--set", "web"])
    assert (result.exit_code, "or --all" in result.stderr) == (2, True)
    assert not asked


def test_a_plan_changes_nothing_so_nobody_is_asked(asked: list[Any]) -> None:
    assert CliRunner().invoke(caesura, ["plan", "patch"]).exit_code == 0
    assert CliRunner().invoke(caesura, ["freeze", "--for", "2s", "--plan-only"]).exit_code == 0
    assert len(asked) == 2


@pytest.mark.parametrize(("answer", "done"), [("y", True), ("n", False), ("", False)])
def test_on_a_terminal_it_asks(monkeypatch: pytest.MonkeyPatch, answer: str, *, done: bool) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(blast, "sys", type("S", (), {"stdin": Terminal(), "stderr": Terminal()}))
    told: list[str] = []

    def confirm(text: str, *, abort: bool, err: bool) -> bool:
        told.append(text)
        if answer != "y":
            raise click.Abort
        return abort and err

    monkeypatch.setattr(click, "confirm", confirm)
    if done:
        blast.confirm("roll out", _NOTHING, as_json=False, what="patch")
    else:
        with pytest.raises(click.Abort):
            blast.confirm("roll out", _NOTHING, as_json=False, what="patch")
    assert told == ["Nothing was selected: roll out patch on ALL hosts of the fleet?"]
    with pytest.raises(click.UsageError):
        blast.confirm("roll out", _NOTHING, as_json=True)


def test_the_options_become_limits() -> None:
    given: dict[str, Any] = {
        "max_hosts": 3,
        "canary": "h1",
        "exclude_hosts": ("h2",),
        "exclude_sets": ("db",),
        "exclude_vms": ("w1",),
        "again": True,
    }
    assert limits_from(given) == m.Limits(
        max_hosts=3,
        canary_host="h1",
        exclude_hosts=("h2",),
        exclude_sets=("db",),
        exclude_vms=("w1",),
        again=True,
    )
    assert limits_from({**given, "canary": "2"}).canary_count == 2
    assert limits_from({**given, "canary": "2"}).canary_host == ""


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--canary", "0"], "at least 1"),
        (["--canary", "a/b"], "is not a name"),
        (["--max-hosts", "0"], "x>=1"),
        (["--exclude-vm", "a b"], "is not a name"),
    ],
)
def test_a_limit_that_says_nothing_is_bad_usage(words: list[str], why: str) -> None:
    result = CliRunner().invoke(caesura, ["roll", "patch", "--all", *words])
    assert (result.exit_code, why in result.stderr) == (2, True), result.stderr
