"""Every shell block of the docs says whether it is run: by which test, or why by none.

The mark is a comment above the block, which no reader sees: ``run``, ``run in: PLACE`` (``tests/e2e/docs`` runs both, ``tests/e2e/compose`` what is run in ``compose``),
``run by: TEST`` or ``not run: WHY``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PAGES = [
    *(_ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((_ROOT / "docs").rglob("*.md")),
]
_SHELL = re.compile(r"^([ ]*)```(?:sh|bash|console|shell)\b", re.MULTILINE)
_MARK = re.compile(
    r"[ ]*<!-- (?:(run)|run in: (broker|compose|demo|host|laptop)|run by: (\S+)|not run: (.{10,})) -->"
)


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(_ROOT)))
def test_every_shell_block_says_whether_it_is_run(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        found = _SHELL.match(line)
        if not found:
            continue
        mark = _MARK.fullmatch(lines[number - 1])
        assert mark, (
            f"{page.relative_to(_ROOT)}:{number + 1}: no mark above this block; see docs/develop/docs.md"
        )
        assert lines[number - 1].startswith(f"{found[1]}<"), "indented as the block"
        if mark[3]:
            file, _, test = mark[3].partition("::")
            path = _ROOT / file
            assert path.exists(), f"{page.relative_to(_ROOT)}:{number}: {file} does not exist"
            assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), f"no {test} in {file}"


def test_blocks_without_a_language_are_not_a_way_around() -> None:
    for page in _PAGES:
        opens = True
        for line in page.read_text(encoding="utf-8").splitlines():
            if re.match(r"[ ]*```", line):
                assert not opens or re.match(r"[ ]*```\w", line), (
                    f"{page.relative_to(_ROOT)}: a block names its language"
                )
                opens = not opens
