"""Arguments that differ from VM to VM."""

from __future__ import annotations

import pytest

from caesura_rehearse.simulation.placeholders import UnknownPlaceholder, fill

VALUES = {"vm": "web-2", "set": "web", "n": "2", "port": "8081"}


@pytest.mark.parametrize(
    ("word", "filled"),
    [
        ("{port}", "8081"),
        ("--listen=127.0.0.1:{port}", "--listen=127.0.0.1:8081"),
        ("{vm}-{n}.log", "web-2-2.log"),
        ("app{n}", "app2"),
        ("{{vm}}", "{vm}"),
        ("echo ${port} ${HOME}", "echo ${port} ${HOME}"),
        ('{"a": {"b": 1}}', '{"a": {"b": 1}}'),
        ('{"name": "{vm}", "of": {n}}', '{"name": "web-2", "of": 2}'),
    ],
)
def test_words(word: str, filled: str) -> None:
    assert fill((word,), VALUES, strict=True) == (filled,)
    assert fill((word,), VALUES, strict=False) == (filled,)


def test_other_words_in_braces() -> None:
    program = ("awk", "{print}", "{{print}}")
    assert fill(program, VALUES, strict=False) == program, "with one VM nothing else is changed"
    with pytest.raises(
        UnknownPlaceholder,
        match=r"argument 1 of the program has the unknown placeholder \{print\}.*write \{\{print\}\}",
    ):
        fill(program, VALUES, strict=True)
    assert fill(("{{print}}",), VALUES, strict=True) == ("{print}",)
    with pytest.raises(UnknownPlaceholder, match="did you mean port"):
        fill(("{prt}",), VALUES, strict=True)
