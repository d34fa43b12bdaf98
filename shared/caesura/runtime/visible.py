"""Text from others, shown to a person without side effects.

A text may hold control characters, which move a cursor or change colours and titles (C0 and C1, ECMA-48), and
characters that reverse the direction of reading (Unicode standard annex 9), which make a text look like another.
All of them are shown by their code point.
"""

from __future__ import annotations

import unicodedata

_KINDS = ("Cc", "Cf", "Zl", "Zp")  # controls, formats (direction, invisible), line and paragraph separators
_BMP = range(0x10000)
_TABLE = {
    code: f"\\u{code:04x}"
    for code in _BMP
    if unicodedata.category(chr(code)) in _KINDS and chr(code) not in "\n\t"
} | {code: f"\\U{code:08x}" for code in range(0xE0000, 0xE0080)}  # tags: invisible letters
_JSON_TABLE = {code: text for code, text in _TABLE.items() if code < 0x10000} | {
    code: "".join(f"\\u{unit:04x}" for unit in (0xD800 + ((code - 0x10000) >> 10), 0xDC00 + (code & 0x3FF)))
    for code in range(0xE0000, 0xE0080)
}


def visible(text: str) -> str:
    """The text, with everything that would affect a terminal shown by its code point."""
    return text.translate(_TABLE)


def visible_json(encoded: bytes) -> str:
    """The same for a JSON document: it remains valid and equivalent."""
    return encoded.decode().translate(_JSON_TABLE)
