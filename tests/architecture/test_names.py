"""One concept, one name: no two classes of the product share one."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_PRODUCT = ("services", "shared", "tools")
_CLASS = re.compile(r"^[ \t]*class (\w+)[(:]", re.MULTILINE)
"""As ruff formats it. Parsing the whole product takes ten times as long."""


def test_no_two_classes_have_one_name() -> None:
    places: defaultdict[str, list[str]] = defaultdict(list)
    for root in _PRODUCT:
        for path in sorted((_ROOT / root).rglob("*.py")):
            for name in _CLASS.findall(path.read_text(encoding="utf-8")):
                places[name].append(str(path.relative_to(_ROOT)))
    assert len(places) > 500, "the product's classes were found"
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert twice == {}, "give one of them a more specific name"
