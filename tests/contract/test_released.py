"""What a released version promised is kept: by this contract, and the comparison finds whatever would break it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import pytest
from msgspec import Meta

from caesura.contract import released
from caesura.contract.envelope import Instant, Message
from caesura.contract.released import Contract, broken, contract, versions, written
from caesura.contract.topics import Channel

_RELEASED = Path(__file__).parent / "released"


@pytest.mark.parametrize("version", sorted(versions(_RELEASED)))
def test_the_contract_of_a_released_version_only_grew(version: str) -> None:
    """ADR 14. A version that is not released yet is written again: python -m caesura.contract.released --write VERSION."""
    found = broken(versions(_RELEASED)[version], contract())
    assert not found, f"broken since {version}:\n" + "\n".join(found)


def test_there_is_a_released_version_to_compare_with() -> None:
    """And its file is whole: it is compared with each rule below, too."""
    (first, *_) = versions(_RELEASED).values()
    assert len(first.rows) > 25
    assert set(first.messages) == {row.type for row in first.rows}


# --- the comparison, with a small contract of its own ---


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A record."""

    description: str = ""
    """A member that is called like a keyword of a schema."""
    weight: float = 0.0


class Lighter(msgspec.Struct, frozen=True, kw_only=True):
    """The record without a member."""

    weight: float = 0.0


class Higher(Part, frozen=True, kw_only=True):
    """The record with one more."""

    height: float = 0.0


class Shorter(Lighter, frozen=True, kw_only=True):
    """The record with a pattern."""

    description: Annotated[str, Meta(pattern="^a")] = ""


def _message(**members: Any) -> type[Message]:
    """A message with these members: name to type, or to (type, default)."""
    fields = [(name, *each) if isinstance(each, tuple) else (name, each) for name, each in members.items()]
    made: type[Message] = msgspec.defstruct(  # type: ignore[assignment]
        "Said",
        fields,
        bases=(Message,),
        namespace={"TYPE": "caesura.thing.said.v1"},
        frozen=True,
        kw_only=True,
    )
    return made


_MEMBERS: dict[str, Any] = {
    "name": Annotated[str, Meta(pattern=r"^[a-z]{1,8}\Z", max_length=8)],
    "count": (Annotated[int, Meta(ge=0, le=9)], 0),
    "above": (Annotated[float, Meta(gt=0)], 1.0),
    "colour": (Literal["red", "green"], "red"),
    "one": (Literal["digest"], "digest"),
    "at": (Instant | None, None),
    "parts": (Annotated[tuple[Part, ...], Meta(max_length=3)], ()),
    "by_name": (dict[str, Annotated[int, Meta(le=5)]], {}),
    "part": (Part, Part()),
}


def _contract(
    members: dict[str, Any] = _MEMBERS, *, codes: tuple[str, ...] = ("a", "b"), **row: Any
) -> Contract:
    values: dict[str, Any] = {
        "address": "caesura/v1/fleet/{thing}/said",
        "message": _message(**members),
        "writer": "coordinator",
        "readers": ("host", "ctl"),
        "summary": "Something was said.",
    }
    return contract([Channel(**(values | row))], reason_codes=codes)


def _changed(**members: Any) -> Contract:
    return _contract(_MEMBERS | members)


_BROKEN: dict[str, tuple[Callable[[], Contract], str]] = {
    "a member is removed": (
        lambda: _contract({k: v for k, v in _MEMBERS.items() if k != "count"}),
        "caesura.thing.said.v1.count: removed",
    ),
    "a member is renamed": (
        lambda: _contract({("number" if k == "count" else k): v for k, v in _MEMBERS.items()}),
        "caesura.thing.said.v1.count: removed",
    ),
    "a type is another": (lambda: _changed(count=(str, "0")), "count: its type is string, was integer"),
    "a whole number may have a fraction": (lambda: _changed(count=(float, 0)), "count: its type is number"),
    "an instant is text": (lambda: _changed(at=(str | None, None)), "at: its type is no longer date-time"),
    "a member may be null": (lambda: _changed(count=(int | None, 0)), "count: its type is null, too"),
    "a member may not be null": (lambda: _changed(at=Instant), "at: its type is no longer null"),
    "an optional member is required": (
        lambda: _changed(colour=Literal["red", "green"]),
        "colour: required now, was optional",
    ),
    "a new member is required": (lambda: _changed(newest=int), "newest: new and required"),
    "a default is another": (
        lambda: _changed(count=(_MEMBERS["count"][0], 1)),
        "count: its default is 1, was 0",
    ),
    "an upper bound is lower": (
        lambda: _changed(count=(Annotated[int, Meta(ge=0, le=8)], 0)),
        "count: maximum is narrower: maximum 8, was maximum 9",
    ),
    "a lower bound is higher": (
        lambda: _changed(count=(Annotated[int, Meta(ge=1, le=9)], 0)),
        "count: minimum is narrower",
    ),
    "a bound is not reached any more": (
        lambda: _changed(count=(Annotated[int, Meta(gt=0, le=9)], 0)),
        "count: minimum is narrower: exclusiveMinimum 0, was minimum 0",
    ),
    "there is a bound where none was": (
        lambda: _changed(above=(Annotated[float, Meta(gt=0, lt=100)], 1.0)),
        "above: maximum is narrower",
    ),
    "a text may be less long": (
        lambda: _changed(name=Annotated[str, Meta(pattern=r"^[a-z]{1,8}\Z", max_length=7)]),
        "name: maxLength is narrower",
    ),
    "there may be fewer": (
        lambda: _changed(parts=(Annotated[tuple[Part, ...], Meta(max_length=2)], ())),
        "parts: maxItems is narrower",
    ),
    "a pattern allows fewer characters": (
        lambda: _changed(name=Annotated[str, Meta(pattern=r"^[a-z]{1,7}\Z", max_length=8)]),
        "name: its pattern is",
    ),
    "a pattern is another": (
        lambda: _changed(name=Annotated[str, Meta(pattern=r"^[A-Z]{1,8}\Z", max_length=8)]),
        "name: its pattern is",
    ),
    "there is a pattern where none was": (
        lambda: _changed(part=(Shorter, Shorter())),
        "part.description: its pattern is '^a', was None",
    ),
    "a value of a vocabulary is removed": (
        lambda: _changed(colour=(Literal["red", "blue"], "red")),
        "colour: value 'green' removed",
    ),
    "the only value is another": (
        lambda: _changed(one=(Literal["canary"], "canary")),
        "one: value 'digest' removed",
    ),
    "a text has a closed vocabulary": (
        lambda: _changed(name=Literal["a", "b"]),
        "name: its type is a vocabulary, was string",
    ),
    "a member of a record is removed": (
        lambda: _changed(
            part=(Lighter, Lighter()), parts=(Annotated[tuple[Lighter, ...], Meta(max_length=3)], ())
        ),
        "parts[].description: removed",
    ),
    "a bound in a mapping is lower": (
        lambda: _changed(by_name=(dict[str, Annotated[int, Meta(le=4)]], {})),
        "by_name{}: maximum is narrower",
    ),
    "a topic is another": (
        lambda: _contract(address="caesura/v1/fleet/{thing}/told"),
        "caesura.thing.said.v1: moved from caesura/v1/fleet/{thing}/said to caesura/v1/fleet/{thing}/told",
    ),
    "somebody else writes it": (
        lambda: _contract(writer="ctl"),
        "written by ctl, was written by coordinator",
    ),
    "a reader may not read it": (lambda: _contract(readers=("ctl",)), "no longer read by host"),
    "it is retained": (lambda: _contract(retain=True), "retained now"),
    "its QoS is lower": (lambda: _contract(qos=0), "QoS 0, was 1"),
    "nobody writes it": (lambda: _contract(deprecated=True), "no longer written (deprecated)"),
    "a reason code is removed": (lambda: _contract(codes=("a",)), "reason code b: removed"),
    "a message may be less large": (
        lambda: msgspec.structs.replace(_contract(), max_payload_bytes=1024),
        "the largest payload is 1024 bytes, was 262144",
    ),
}


@pytest.mark.parametrize("what", _BROKEN)
def test_what_breaks_a_promise_is_found_by_name(what: str) -> None:
    change, words = _BROKEN[what]
    found = broken(_contract(), change())
    assert any(words in each for each in found), found


def test_a_message_that_is_gone_is_found() -> None:
    nothing = msgspec.structs.replace(_contract(), rows=(), messages={})
    assert broken(_contract(), nothing) == [
        "caesura.thing.said.v1: removed (it was on caesura/v1/fleet/{thing}/said)"
    ]


def test_a_change_of_the_envelope_is_found() -> None:
    now = _contract()
    envelope = dict(now.records["Header"])
    envelope["properties"] = {k: v for k, v in envelope["properties"].items() if k != "source"}
    changed = msgspec.structs.replace(now, records={**now.records, "Header": envelope})
    assert "the envelope.source: removed" in broken(now, changed)


_GROWN: dict[str, Callable[[], Contract]] = {
    "nothing is another": _contract,
    "a new member has a default": lambda: _changed(newest=(int, 0)),
    "a required member has a default": lambda: _changed(name=(_MEMBERS["name"], "a")),
    "a vocabulary has one value more": lambda: _changed(colour=(Literal["red", "green", "blue"], "red")),
    "bounds are wider": lambda: _changed(count=(Annotated[int, Meta(ge=-1, le=10)], 0)),
    "there is no bound": lambda: _changed(count=(int, 0)),
    "a pattern allows more characters": lambda: _changed(
        name=Annotated[str, Meta(pattern=r"^[a-z]{1,9}\Z", max_length=9)]
    ),
    "a record has one member more": lambda: _changed(
        part=(Higher, Higher()),
        parts=(Annotated[tuple[Higher, ...], Meta(max_length=3)], ()),
    ),
    "somebody more reads it": lambda: _contract(readers=("host", "ctl", "vm")),
    "there is one reason code more": lambda: _contract(codes=("a", "b", "c")),
}


@pytest.mark.parametrize("what", _GROWN)
def test_what_only_grows_passes(what: str) -> None:
    assert broken(_contract(), _GROWN[what]()) == []


def test_a_new_message_passes() -> None:
    class Heard(Message, frozen=True, kw_only=True):
        TYPE: ClassVar[str] = "caesura.thing.heard.v1"

    channel = Channel(
        address="caesura/v1/host/{host}/heard",
        message=Heard,
        writer="host",
        readers=("ctl",),
        summary="Heard.",
    )
    now = contract([channel])
    both = msgspec.structs.replace(
        _contract(),
        rows=(*_contract().rows, *now.rows),
        messages=_contract().messages | now.messages,
        records=_contract().records | now.records,
    )
    assert broken(_contract(), both) == []


def test_names_of_records_and_what_is_said_of_them_are_not_on_the_wire() -> None:
    class Whole(msgspec.Struct, frozen=True, kw_only=True):
        """Other words."""

        description: str = ""
        weight: float = 0.0

    renamed = _changed(part=(Whole, Whole()), parts=(Annotated[tuple[Whole, ...], Meta(max_length=3)], ()))
    assert broken(_contract(), renamed) == []


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """A record that holds itself."""

    height: Annotated[int, Meta(le=9)] = 0
    branches: tuple[Tree, ...] = ()


def test_a_record_that_holds_itself_comes_to_an_end() -> None:
    assert broken(_changed(tree=(Tree, Tree())), _changed(tree=(Tree, Tree()))) == []


def test_what_is_written_to_a_file_is_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "1.2.3.json").write_bytes(written(contract()))
    assert versions(tmp_path) == {"1.2.3": contract()}


def test_the_command_writes_a_version_and_says_what_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["released", *words, "--root", str(tmp_path)])
        released.main()
        return capsys.readouterr().out

    assert "tests/contract/released/0.2.0.json" in run("--write", "0.2.0")
    assert run("--check") == "nothing is broken\n"
    path = tmp_path / released.FOLDER / "0.2.0.json"
    path.write_bytes(
        path.read_bytes().replace(b"caesura/v1/ctl/{client}/abort", b"caesura/v1/ctl/{client}/end")
    )
    with pytest.raises(
        SystemExit,
        match=re.escape("0.2.0: caesura.abort.requested.v1: moved from caesura/v1/ctl/{client}/end"),
    ):
        run("--check")
