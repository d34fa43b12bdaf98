"""English of the field in the docs: phrases that read translated, each with what the field writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from caesura_testing.english import findings

_ROOT = Path(__file__).parents[2]
_PAGES = [
    *(_ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((_ROOT / "docs").rglob("*.md")),
]
_GENERATED = re.compile(r"<!-- (reference: [\w ]+|topics: .*?) -->.*?<!-- /", re.DOTALL)
"""Those texts are the code's."""
_CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+", re.DOTALL)
"""Names of tests, output, targets of links."""


def prose(text: str) -> str:
    """``text`` without what is not written here, its lines kept."""
    for pattern in (_GENERATED, _CODE):
        text = pattern.sub(lambda found: "\n" * found[0].count("\n"), text)
    return text


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(_ROOT)))
def test_the_fields_words(page: Path) -> None:
    found = [
        f"{page.relative_to(_ROOT)}:{each}" for each in findings(prose(page.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "sentence",
    [
        "The VM stands\nstill.",
        "It goes on.",
        "Who was told?",
        "It puts the clocks right.",
        "This is no proof.",
        "A host of ours.",
    ],
)
def test_the_list_finds_what_it_is_for(sentence: str) -> None:
    assert findings(prose(sentence))


@pytest.mark.parametrize(
    "sentence", ["There is no queue.", "It is no longer there.", "`goes on`", "A leading zero is shown."]
)
def test_the_list_leaves_english_alone(sentence: str) -> None:
    assert not findings(prose(sentence))
