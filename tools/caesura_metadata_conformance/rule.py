"""A rule of the API as a numbered check, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from caesura_metadata_conformance.exchange import Ask, NoAnswer, Reply
from caesura_metadata_conformance.probe import Probe

Verdict = Literal["passes", "fails", "cannot tell"]


class RuleBroken(Exception):
    """The server does not keep the rule; the text says what it did."""


class CannotTell(Exception):
    """What the rule is about did not occur."""


class Rule(msgspec.Struct, frozen=True):
    """One thing that clients of the real service rely on."""

    number: str
    title: str
    source: str
    """Document, or the client that relies on it."""
    check: Callable[[Probe], None]
    """Returns if it is kept.

    Raises:
        RuleBroken, CannotTell, NoAnswer: otherwise.
    """


class RuleResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one check found."""

    number: str
    title: str
    source: str
    verdict: Verdict
    why: str = ""
    exchanges: tuple[tuple[Ask, Reply | None], ...] = ()


class RuleBook:
    """Collects rules: each module of them has one."""

    def __init__(self, letter: str, about: str) -> None:
        self.letter = letter
        self.about = about
        self.rules: list[Rule] = []

    def rule(self, title: str, source: str) -> Callable[[Callable[[Probe], None]], Callable[[Probe], None]]:
        """The decorated function is the next rule."""

        def take(check: Callable[[Probe], None]) -> Callable[[Probe], None]:
            self.add(title, source, check)
            return check

        return take

    def add(self, title: str, source: str, check: Callable[[Probe], None]) -> None:
        """Add a rule; its number follows from its place, so new ones come last."""
        self.rules.append(Rule(f"{self.letter}{len(self.rules) + 1:02}", title, source, check))


def expect(condition: object, why: str) -> None:
    """Break the rule unless the condition holds."""
    if not condition:
        raise RuleBroken(why)


def expect_status(reply: Reply, *allowed: int) -> None:
    """Break the rule unless the answer has one of these statuses."""
    expect(reply.status in allowed, f"status {reply.status} instead of {' or '.join(map(str, allowed))}")


def need(value: object, why: str) -> None:
    """Nothing can be judged without this."""
    if not value:
        raise CannotTell(why)


def judge(rule: Rule, probe: Probe) -> RuleResult:
    """Check one rule."""
    probe.begin()
    verdict: Verdict = "passes"
    why = ""
    try:
        rule.check(probe)
    except RuleBroken as error:
        verdict, why = "fails", str(error)
    except CannotTell as error:
        verdict, why = "cannot tell", str(error)
    except NoAnswer as error:
        verdict, why = "fails", str(error)
    return RuleResult(
        number=rule.number,
        title=rule.title,
        source=rule.source,
        verdict=verdict,
        why=why,
        exchanges=tuple(probe.exchanges),
    )


def judge_all(books: Sequence[RuleBook], probe: Probe, only: Sequence[str] = ()) -> list[RuleResult]:
    """Check every rule, or those whose numbers begin like one of ``only``."""
    wanted = tuple(each.upper() for each in only)
    return [
        judge(rule, probe)
        for book in books
        for rule in book.rules
        if not wanted or rule.number.startswith(wanted)
    ]
