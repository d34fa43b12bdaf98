"""Settings: a misspelt variable is refused, a secret is never shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from msgspec import Meta

from caesura.runtime.settings import (
    Secret,
    ServiceSettings,
    SettingsError,
    describe_settings,
    read_settings,
    show_settings,
)


class Sample(ServiceSettings, frozen=True, kw_only=True):
    """Some of every kind."""

    name: Annotated[str, Meta(min_length=2, description="Who.")]
    count: Annotated[int, Meta(ge=1)] = 3
    words: tuple[str, ...] = ()
    loud: bool = False
    kinds: tuple[Literal["a", "b"], ...] = ()


_GIVEN = {"X_NAME": "me"}


def test_defaults_and_conversions() -> None:
    settings = read_settings(
        Sample, "X_", {**_GIVEN, "X_COUNT": "7", "X_WORDS": '["a", "b"]', "X_LOUD": "true", "OTHER": "1"}
    )
    assert (settings.name, settings.count, settings.words, settings.loud) == ("me", 7, ("a", "b"), True)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({**_GIVEN, "X_COUTN": "7"}, "unknown setting X_COUTN, did you mean X_COUNT"),
        ({**_GIVEN, "X_ZZZZZZ": "7"}, "unknown setting X_ZZZZZZ; run with --help"),
        ({**_GIVEN, "CAESURA_COUNT": "7"}, "unknown setting CAESURA_COUNT, did you mean X_COUNT?"),
        ({**_GIVEN, "CAESURA_MOON": "7"}, "unknown setting CAESURA_MOON, no service has it"),
        ({}, "missing setting X_NAME"),
        ({**_GIVEN, "X_COUNT": "0"}, "X_COUNT='0'"),
        ({**_GIVEN, "X_COUNT": "many"}, "X_COUNT='many'"),
        ({"X_NAME": "m"}, "X_NAME='m'"),
        ({**_GIVEN, "X_WORDS": "a b"}, "X_WORDS='a b'"),
        (
            {**_GIVEN, "X_BROKER_PROTOCOL": "4"},
            "X_BROKER_PROTOCOL='4': Invalid enum value '4': write '3.1.1', '5' or 'auto'",
        ),
        ({**_GIVEN, "X_LOG_LEVEL": "loud"}, "write 'debug', 'error', 'info' or 'warning'"),
        (
            {**_GIVEN, "X_KINDS": '["a", "c"]'},
            "X_KINDS='[\"a\", \"c\"]': Invalid enum value 'c': write 'a' or 'b'",
        ),
        (
            {**_GIVEN, "X_BROKER_PASSWORD": "hunter2"},
            "unknown setting X_BROKER_PASSWORD, did you mean X_BROKER_PASSWORD_FILE",
        ),
        (
            {**_GIVEN, "X_BROKER_PASSWORD_FILE": "/nowhere/at/all"},
            "cannot read the file that it names: No such file",
        ),
    ],
)
def test_what_is_refused_names_the_variable(environ: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings(Sample, "X_", environ)
    assert words in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_secret_comes_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2\n")
    file.chmod(0o640)  # a group of its own may read it: units and containers hand it on so
    settings = read_settings(Sample, "X_", {**_GIVEN, "X_BROKER_PASSWORD_FILE": str(file)})
    assert settings.broker_password.reveal() == "hunter2"
    assert "hunter2" not in show_settings(settings, "X_")
    assert "hunter2" not in repr(settings)
    assert "X_BROKER_PASSWORD_FILE=(set, not shown)" in show_settings(settings, "X_")


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"hunter2\n", 0o604, "every user of this machine can use the file"),
        (b"hunter2\n", 0o602, "chmod 600"),
        (b"", 0o600, "is empty"),
        (b" \n\n", 0o600, "is empty"),
        (b"hunter2\nhunter3\n", 0o600, "has more than one line"),
        (b"hunter2\rhunter3", 0o600, "has more than one line"),
        (b"hunter2\xff", 0o600, "is not UTF-8"),
        (b"hunter2" * 1000, 0o600, "more than 4096 bytes"),
    ],
)
def test_a_file_that_can_be_no_secret_is_refused(
    content: bytes, mode: int, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    file.chmod(mode)
    with pytest.raises(SettingsError) as caught:
        read_settings(Sample, "X_", {**_GIVEN, "X_BROKER_PASSWORD_FILE": str(file)})
    assert words in str(caught.value)
    assert "X_BROKER_PASSWORD_FILE: " in str(caught.value)
    assert str(file) in str(caught.value)
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    "typed", ["hunter2", "/hunter2", "hunter2/x", "hunter2" * 100, "/no/such/hunter2", "hunter2\0"]
)
def test_a_password_in_the_place_of_a_file_name_is_not_printed(typed: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings(Sample, "X_", {**_GIVEN, "X_BROKER_PASSWORD_FILE": typed})
    assert "hunter2" not in str(caught.value)
    assert "it is the name of a file with the secret" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "nor in a traceback"


def test_what_is_printed_can_be_read_again() -> None:
    settings = read_settings(Sample, "X_", {**_GIVEN, "X_WORDS": '["a b"]', "X_LOUD": "true"})
    lines = dict(line.split("=", 1) for line in show_settings(settings, "X_").splitlines())
    given = {
        name: value.lower() if value in {"True", "False"} else value for name, value in lines.items() if value
    }
    again = read_settings(Sample, "X_", given)
    assert (again.words, again.loud, again.name) == (settings.words, settings.loud, settings.name)


def test_the_reference_lists_every_setting_once() -> None:
    rows = describe_settings(Sample, "X_")
    assert len({name for name, _, _ in rows}) == len(rows)
    assert ("X_NAME", "required", "Who.") in rows
    assert any(name == "X_BROKER_PASSWORD_FILE" for name, _, _ in rows)


def test_an_empty_secret_is_false() -> None:
    assert not Secret()
    assert Secret("x")
