"""English of the field: phrases that read translated, each with what the field writes, and where a text has them."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

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
_FOUND = {re.compile(rf"\b(?:{words})\b".replace(" ", r"\s+"), re.IGNORECASE): instead for words, instead in WORDS.items()}  # fmt: skip
_BETWEEN = r"""(?:\W|\\[nrt]|[bfru](?=["']))+"""
_MAYBE = re.compile(
    "|".join(WORDS).replace(r"(?<!there\s)", "").replace(" ", _BETWEEN).replace("hear", "(?<!re)hear"),
    re.IGNORECASE,
)
"""More than the list finds, in source as it is written, where a comment or a string may be cut between two words. Most modules have
none of it: to parse all of them takes seconds."""
_CODE = re.compile(r"``[^`]*``|`[^`]*`|https?://\S+")
"""Names, output and addresses in a text."""


class Finding(NamedTuple):
    """A phrase of the list; ``line`` is counted from 1."""

    line: int
    phrase: str
    instead: str

    def __str__(self) -> str:
        return f"{self.line}: {self.phrase!r}: write {self.instead!r}"


def findings(text: str, first_line: int = 1) -> list[Finding]:
    """What of the list is in a text, in order."""
    found = [
        Finding(first_line + text.count("\n", 0, match.start()), match[0], instead)
        for words, instead in _FOUND.items()
        for match in words.finditer(text)
    ]
    return sorted(found)


def findings_in_code(source: str) -> list[Finding]:
    """The same for the comments, docstrings and sentences of a Python module."""
    if not _MAYBE.search(source):
        return []
    return sorted({each for line, text in _texts(source) for each in findings(_plain(text), line)})


def _plain(text: str) -> str:
    return _CODE.sub(lambda found: "\n" * found[0].count("\n"), text)


def _texts(source: str) -> Iterator[tuple[int, str]]:
    """First line and text of each. A string with a space in it is a sentence, or part of one."""
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if block and token.start[0] != last + 1:
            yield last - len(block) + 1, "\n".join(block)
            block = []
        block.append(token.string.lstrip("#"))
        last = token.start[0]
    if block:
        yield last - len(block) + 1, "\n".join(block)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
