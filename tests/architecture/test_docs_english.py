"""English of the field in the docs: phrases that read translated, each with what the field writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PAGES = [
    *(_ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((_ROOT / "docs").rglob("*.md")),
]
WORDS = {
    r"(stands?|stood|standing) still": "is paused",
    r"hear(s|d)?( of)?": "receives, observed",
    r"(go|goes|going|went|gone) on": "continues",
    r"told": "is notified, published",
    r"for ever": "indefinitely",
    r"whoever": "a client that, the engineer who",
    r"meanwhile": "in the meantime, at the same time",
    r"anew": "again, restarted",
    r"of (ours|yours|mine)": "our, your",
    r"put(s|ting)? (\w+ ){0,3}right": "corrects",
    r"let(s|ting)? (\w+ ){0,2}go": "releases, resumes",
    r"earlier li(fe|ves)": "previous run",
    r"(?<!there\s)(is|are|was|were) no (?!longer\b|more\b|less\b|later\b)[a-z]+": "is not an X",
}
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
    text = prose(page.read_text(encoding="utf-8"))
    found = [
        f"{page.relative_to(_ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}: write {instead!r}"
        for words, instead in WORDS.items()
        for match in re.finditer(rf"\b(?:{words})\b".replace(" ", r"\s+"), text, re.IGNORECASE)
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
    assert any(
        re.search(rf"\b(?:{words})\b".replace(" ", r"\s+"), prose(sentence), re.IGNORECASE) for words in WORDS
    )


@pytest.mark.parametrize(
    "sentence", ["There is no queue.", "It is no longer there.", "`goes on`", "A leading zero is shown."]
)
def test_the_list_leaves_english_alone(sentence: str) -> None:
    assert not any(
        re.search(rf"\b(?:{words})\b".replace(" ", r"\s+"), prose(sentence), re.IGNORECASE) for words in WORDS
    )
