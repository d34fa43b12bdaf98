"""Which line of a TOML text an error is about: ``tomllib`` says it of syntax errors only. Pure."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping

KeyPath = tuple[str | int, ...]
"""Of a key: the names of its tables, for an array of tables followed by the element, and its own name."""

_SYNTAX = re.compile(r"\s*\(at line (?P<line>\d+), column \d+\)$")
_AT_END = "(at end of document)"
_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_HEADER = re.compile(rf"\s*(?P<array>\[)?\[\s*(?P<keys>{_DOTTED})\s*\]")
_ASSIGNMENT = re.compile(rf"\s*(?P<keys>{_DOTTED})\s*=")
_STEP = re.compile(r"\.(\w[\w-]*)|\[(\d+)\]")
_TOKEN = re.compile(r'"""|\'\'\'|"(?:[^"\\]|\\.)*"|\'[^\']*\'|#.*|[\[\]{}]')


def syntax_error_at(text: str, error: tomllib.TOMLDecodeError) -> tuple[int, str]:
    """The line of a syntax error, counted from 1, and what is wrong, without the location."""
    said = str(error)
    if found := _SYNTAX.search(said):
        return int(found["line"]), said[: found.start()]
    if said.endswith(_AT_END):
        return max(1, len(text.splitlines())), said.removesuffix(_AT_END).rstrip()
    return 0, said


def path_in(place: str) -> KeyPath:
    """The path that msgspec writes as ``$.step[1].event``."""
    return tuple(name or int(index) for name, index in _STEP.findall(place))


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """The line that sets the key, or begins the innermost table around it that is there; 0: none of them is."""
    return next((lines[path[:length]] for length in range(len(path), 0, -1) if path[:length] in lines), 0)


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, counted from 1, of each key and table header of a valid TOML text. Keys of inline tables have none of their own."""
    found: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for number, line in _statements(text):
        if header := _HEADER.match(line):
            names = _names(header["keys"])
            table = _resolved(names if not header["array"] else names[:-1], counts)
            if header["array"]:
                array: KeyPath = (*table, names[-1])
                counts[array] = counts.get(array, -1) + 1
                found.setdefault(array, number)
                table = (*array, counts[array])
            found.setdefault(table, number)
        elif key := _ASSIGNMENT.match(line):
            path = table
            for name in _names(key["keys"]):
                path = (*path, name)
                found.setdefault(path, number)
    return found


def _resolved(names: tuple[str, ...], counts: Mapping[KeyPath, int]) -> KeyPath:
    """The path of a table; inside an array of tables it belongs to the last element so far."""
    path: KeyPath = ()
    for name in names:
        path = (*path, name)
        if path in counts:
            path = (*path, counts[path])
    return path


def _names(dotted: str) -> tuple[str, ...]:
    return tuple(each.strip("\"'") for each in re.findall(_KEY, dotted))


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """The first line of each statement: values may go over several lines."""
    quote, depth = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not quote and depth == 0:
            yield number, line
            if _HEADER.match(line):
                continue
        at = 0
        while at < len(line):
            if quote:
                end = line.find(quote, at)
                if end < 0:
                    break
                quote, at = "", end + len(quote)
                continue
            token = _TOKEN.search(line, at)
            if token is None:
                break
            at = token.end()
            if token[0] in ('"""', "'''"):
                quote = token[0]
            elif token[0] in "[{":
                depth += 1
            elif token[0] in "]}":
                depth -= 1
