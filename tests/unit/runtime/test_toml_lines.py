"""Lines of keys in TOML texts, against what ``tomllib`` finds in them."""

from __future__ import annotations

import tomllib

import pytest

from caesura.runtime.toml_lines import key_lines, line_of, path_in, syntax_error_at

_TEXT = '''\
title = "a"            # 1
text = """
[[step]]
no = "key"
"""                    # 5
[[step]]
at = "1s"
"quoted key" = 1
list = [
  "[[step]]",          # ] 10
  { inner = 1 },
]
[[step]]
at = '# not a comment'
a.b = 2                # 15
[step.more]
x = 1
[[step.pause]]
for = 1
[[step.pause]]
for = 2                # 21
[ other ]
y = "\\"]"
z = 1
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("title",), 1),
        (("text",), 2),
        (("step",), 6),
        (("step", 0), 6),
        (("step", 0, "quoted key"), 8),
        (("step", 0, "list", 1, "inner"), 9),
        (("step", 1, "at"), 14),
        (("step", 1, "a", "b"), 15),
        (("step", 1, "more", "x"), 17),
        (("step", 1, "pause", 1, "for"), 21),
        (("step", 1, "missing"), 13),
        (("other", "z"), 24),
        (("missing",), 0),
    ],
)
def test_lines(path: tuple[str | int, ...], line: int) -> None:
    tomllib.loads(_TEXT)
    assert line_of(key_lines(_TEXT), path) == line


def test_nothing_in_a_value_is_taken_for_a_key() -> None:
    assert not {path for path in key_lines(_TEXT) if path[-1] in {"no", "inner"}}


def test_paths_as_msgspec_writes_them() -> None:
    assert path_in("$.step[1].event") == ("step", 1, "event")
    assert path_in("$") == ()


@pytest.mark.parametrize(("text", "line"), [("a = 1\nb = \n", 2), ("a = 1\nb = [1,\n", 2), ("x = 'a\n", 1)])
def test_syntax_errors(text: str, line: int) -> None:
    with pytest.raises(tomllib.TOMLDecodeError) as caught:
        tomllib.loads(text)
    found, reason = syntax_error_at(text, caught.value)
    assert found == line
    assert "(at " not in reason
