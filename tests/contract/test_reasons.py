"""The vocabulary of reasons is closed for us, and open for those who read an older or a newer version."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from caesura.contract import messages as m
from caesura.contract.reasons import DESCRIPTIONS, KNOWN, TRANSIENT, Reason, codes_of

_ROOT = Path(__file__).parents[2]
_SOURCES = sorted((_ROOT / "services").rglob("*.py"))


def _words(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_code_is_explained_and_said_by_somebody() -> None:
    assert set(DESCRIPTIONS) == KNOWN
    assert TRANSIENT < KNOWN
    assert all(text.endswith(".") for text in DESCRIPTIONS.values())
    # `update_unusable` is the default of its message.
    said = {word for path in _SOURCES for word in _words(path)} | {"update_unusable"}
    assert said >= KNOWN, f"nobody says {sorted(KNOWN - said)}"


def test_codes_stand_once_in_the_order_of_their_sentences() -> None:
    reasons = [Reason("host_offline", "a"), Reason("guard_absent", "b"), Reason("host_offline", "c")]
    assert codes_of(reasons) == ("host_offline", "guard_absent")


def test_a_code_of_a_later_version_can_be_read() -> None:
    text = b'{"subject": "web-1", "reason": "for a reason", "code": "moon_in_the_way"}'
    assert msgspec.json.decode(text, type=m.Refusal).code == "moon_in_the_way"


@pytest.mark.parametrize("code", ["", "Upper", "with space", "a" * 41, "trailing\n", "1st"])
def test_what_is_no_code_is_refused(code: str) -> None:
    text = msgspec.json.encode({"subject": "web-1", "reason": "for a reason", "code": code})
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=m.Refusal)
