"""English of the field in the code: comments, docstrings and sentences; the same list as for the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from caesura_testing.english import findings_in_code

_ROOT = Path(__file__).parents[2]
_SOURCES = ("services", "shared", "tools", "tests/support")
_THE_LIST = "tests/support/caesura_testing/english.py"


@pytest.mark.parametrize("source", _SOURCES)
def test_the_fields_words(source: str) -> None:
    found = [
        f"{path.relative_to(_ROOT)}:{each}"
        for path in sorted((_ROOT / source).rglob("*.py"))
        if path != _ROOT / _THE_LIST
        for each in findings_in_code(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "# It goes on.",
        "# It goes\n# on.",
        'def f():\n    """Whoever calls it."""',
        'x = 1\n"""Told by the broker."""',
        'print("It was told.")',
        'print("It was\\ntold.")',
        'print("It stands\\n" \n f"still {1}")',
        "# There it stands\n    # still.",
        'print(f"{1} stands " "still")',
        'print(f"{1} is no number")',
    ],
)
def test_the_list_finds_what_it_is_for(code: str) -> None:
    assert findings_in_code(code)


@pytest.mark.parametrize(
    "code",
    [
        'told = heard = "told"',
        'def goes_on(anew):\n    """Of ``told``, and ``anew``."""',
        "# there is no queue",
    ],
)
def test_the_list_leaves_names_alone(code: str) -> None:
    assert not findings_in_code(code)
