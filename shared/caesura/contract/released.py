"""The contract of each released version, and what a later one breaks of it (ADR 14).

``python -m caesura.contract.released --write 0.1.0`` writes the contract as it is now to ``tests/contract/released/0.1.0.json``,
``--check`` compares the current contract with every version stored there. Additions pass. The comparison covers what is on the wire:
topics, members, types, bounds and vocabularies, but not class names, descriptions or the order of rows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from caesura.contract.codec import MAX_PAYLOAD_BYTES
from caesura.contract.envelope import Header, Message
from caesura.contract.reasons import ReasonCode
from caesura.contract.topics import CHANNELS, Channel

FOLDER = Path("tests/contract/released")
_WORDS = frozenset({"description", "title", "examples"})
"""Keywords of a schema that do not affect what is on the wire."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the topic table, as far as clients rely on it."""

    address: str
    type: str
    writer: str
    readers: tuple[str, ...]
    retain: bool
    qos: int
    deprecated: bool = False


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """A contract at one time."""

    max_payload_bytes: int
    rows: tuple[Row, ...]
    envelope: Any
    """The JSON schema of a message without its data."""
    messages: dict[str, Any]
    """CloudEvents type to the JSON schema of its data."""
    records: dict[str, Any]
    """The definitions that the schemas refer to."""
    reason_codes: tuple[str, ...]


def contract(
    channels: Sequence[Channel] = CHANNELS, *, reason_codes: Sequence[str] = get_args(ReasonCode)
) -> Contract:
    """The contract of this code."""
    kinds: list[type[Message]] = [channel.message for channel in channels]
    schemas, records = msgspec.json.schema_components([Header, *kinds], ref_template="{name}")
    made = Contract(
        max_payload_bytes=MAX_PAYLOAD_BYTES,
        rows=tuple(_row(channel) for channel in channels),
        envelope=_bare(schemas[0]),
        messages={kind.TYPE: _bare(schema) for kind, schema in zip(kinds, schemas[1:], strict=True)},
        records={name: _bare(schema) for name, schema in sorted(records.items())},
        reason_codes=tuple(sorted(reason_codes)),
    )
    # As read back from a file, where defaults are JSON.
    return msgspec.json.decode(msgspec.json.encode(made), type=Contract)


def _row(channel: Channel) -> Row:
    return Row(
        address=channel.address,
        type=channel.message.TYPE,
        writer=channel.writer,
        readers=tuple(sorted(channel.readers)),
        retain=channel.retain,
        qos=channel.qos,
        deprecated=channel.deprecated,
    )


def _bare(schema: Any) -> Any:
    """The schema without descriptive keywords; a member keeps its name even if it equals such a keyword."""
    if not isinstance(schema, dict):
        return [_bare(each) for each in schema] if isinstance(schema, list) else schema
    return {
        key: {name: _bare(part) for name, part in value.items()}
        if key == "properties"
        else (value if key in {"default", "enum", "required"} else _bare(value))
        for key, value in schema.items()
        if key not in _WORDS
    }


# --- comparison ------------------------------------------------------------------------------------------


def broken(before: Contract, now: Contract) -> list[str]:
    """What ``now`` breaks of what clients of ``before`` may rely on, each by name; empty if it only grew."""
    found = [*_rows_broken(before, now)]
    if before.max_payload_bytes != now.max_payload_bytes:
        found.append(f"the largest payload is {now.max_payload_bytes} bytes, was {before.max_payload_bytes}")
    gone = sorted(set(before.reason_codes) - set(now.reason_codes))
    found += [f"reason code {code}: removed" for code in gone]
    differ = _Differ(before.records, now.records)
    found += differ.compare("the envelope", before.envelope, now.envelope)
    for kind, schema in before.messages.items():
        if kind in now.messages:  # a type that is gone is named with its row
            found += differ.compare(kind, schema, now.messages[kind])
    return found


def _rows_broken(before: Contract, now: Contract) -> Iterator[str]:
    rows = {row.type: row for row in now.rows}
    for old in before.rows:
        new = rows.get(old.type)
        if new is None:
            yield f"{old.type}: removed (it was on {old.address})"
            continue
        if new.address != old.address:
            yield f"{old.type}: moved from {old.address} to {new.address}"
        if new.writer != old.writer:
            yield f"{old.type}: written by {new.writer}, was written by {old.writer}"
        if lost := set(old.readers) - set(new.readers):
            yield f"{old.type}: no longer read by {', '.join(sorted(lost))}"
        if new.retain != old.retain:
            yield f"{old.type}: {'retained now' if new.retain else 'no longer retained'}"
        if new.qos != old.qos:
            yield f"{old.type}: QoS {new.qos}, was {old.qos}"
        if new.deprecated and not old.deprecated:
            yield f"{old.type}: no longer written (deprecated)"


_LOWER = (("minimum", "exclusiveMinimum"), ("minLength", ""), ("minItems", ""), ("minProperties", ""))
_UPPER = (("maximum", "exclusiveMaximum"), ("maxLength", ""), ("maxItems", ""), ("maxProperties", ""))
_REPEATED = re.compile(r"(?P<set>\^\[[^\]]+\])\{(?P<least>\d+),(?P<most>\d+)\}(?P<end>\\Z|\$)")
"""A pattern that can be checked for being narrower: a bounded number of characters of one set."""


class _Differ:
    """Compares schemas; ``before`` and ``now`` are what they refer to."""

    def __init__(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        self._before = before
        self._now = now

    def compare(self, where: str, old: Any, new: Any) -> list[str]:
        """What became narrower, or changed its type."""
        return [*self._compare(where, old, new, frozenset())]

    def _compare(self, where: str, old: Any, new: Any, above: frozenset[str]) -> Iterator[str]:
        name = old.get("$ref", "")
        if name in above:
            return  # a recursive record
        yield from _default_changed(where, old, new)
        old, new = _resolved(old, self._before), _resolved(new, self._now)
        above |= {name} if name else set()
        if "anyOf" in old or "anyOf" in new:
            yield from self._alternatives(where, old, new, above)
            return
        kinds = [(each.get("type"), each.get("format")) for each in (old, new)]
        # One value of a vocabulary has no type of its own in a schema.
        if kinds[0] != kinds[1] and not ("enum" in old and "enum" in new):
            yield f"{where}: its type is {_kind(new)}, was {_kind(old)}"
            return
        yield from _vocabulary(where, old, new)
        yield from _bounds(where, old, new)
        yield from self._members(where, old, new, above)
        for key, step in (("items", "[]"), ("additionalProperties", "{}")):
            if isinstance(old.get(key), dict):
                if isinstance(new.get(key), dict):
                    yield from self._compare(where + step, old[key], new[key], above)
                else:
                    yield f"{where}: its type changed: {key} is {new.get(key)}"

    def _members(self, where: str, old: Any, new: Any, above: frozenset[str]) -> Iterator[str]:
        members, now = old.get("properties", {}), new.get("properties", {})
        required, required_now = set(old.get("required", ())), set(new.get("required", ()))
        for name, schema in members.items():
            if name not in now:
                yield f"{where}.{name}: removed"
                continue
            if name in required_now - required:
                yield f"{where}.{name}: required now, was optional"
            yield from self._compare(f"{where}.{name}", schema, now[name], above)
        for name in sorted(required_now - members.keys()):
            yield f"{where}.{name}: new and required: messages written before it cannot be read"

    def _alternatives(self, where: str, old: Any, new: Any, above: frozenset[str]) -> Iterator[str]:
        """Each former alternative is still one, and there is no additional one: ``null`` too is a type that readers must know."""
        were = {_shape(each): each for each in self._parts(old, self._before)}
        are = {_shape(each): each for each in self._parts(new, self._now)}
        for shape, part in were.items():
            if shape not in are:
                yield f"{where}: its type is no longer {shape}"
            else:
                yield from self._compare(where, part, are[shape], above)
        for shape in are.keys() - were.keys():
            yield f"{where}: its type is {shape}, too"

    def _parts(self, schema: Any, records: Mapping[str, Any]) -> list[Any]:
        return [_resolved(each, records) for each in schema.get("anyOf", [schema])]


def _resolved(schema: Any, records: Mapping[str, Any]) -> Any:
    return records[schema["$ref"]] if "$ref" in schema else schema


def _shape(schema: Any) -> str:
    return "a vocabulary" if "enum" in schema else str(schema.get("format") or schema.get("type", "anything"))


def _kind(schema: Any) -> str:
    kind = str(schema.get("type", "a vocabulary" if "enum" in schema else "anything"))
    return f"{kind} ({schema['format']})" if "format" in schema else kind


def _default_changed(where: str, old: Any, new: Any) -> Iterator[str]:
    """The meaning of an absent member. A record's default may grow with the record."""
    if "default" not in old:
        return
    was, now = old["default"], new.get("default", "none")
    if isinstance(was, dict) and isinstance(now, dict):
        now = {key: value for key, value in now.items() if key in was}
    if was != now:
        yield f"{where}: its default is {now!r}, was {was!r}"


def _vocabulary(where: str, old: Any, new: Any) -> Iterator[str]:
    if "enum" not in old and "enum" in new:
        yield f"{where}: a closed vocabulary now"
    elif "enum" in old and "enum" in new:
        for value in old["enum"]:
            if value not in new["enum"]:
                yield f"{where}: value {value!r} removed"


def _bounds(where: str, old: Any, new: Any) -> Iterator[str]:
    for sign, names in ((1, _LOWER), (-1, _UPPER)):
        for inclusive, exclusive in names:
            was, now = (_bound(each, sign, inclusive, exclusive) for each in (old, new))
            if now is not None and (was is None or now > was):
                yield f"{where}: {inclusive} is narrower: {_said(new, inclusive, exclusive)}, was {_said(old, inclusive, exclusive)}"
    if new.get("multipleOf") != old.get("multipleOf"):
        yield f"{where}: multipleOf is {new.get('multipleOf')}, was {old.get('multipleOf')}"
    was, now = old.get("pattern"), new.get("pattern")
    if now is not None and was != now and not _wider(was, now):
        yield f"{where}: its pattern is {now!r}, was {was!r}"


def _bound(schema: Any, sign: int, inclusive: str, exclusive: str) -> tuple[float, bool] | None:
    """A minimum: the larger, the narrower."""
    found = [
        (sign * schema[key], key == exclusive)
        for key in (inclusive, exclusive)
        if schema.get(key) is not None
    ]
    return max(found, default=None)


def _said(schema: Any, inclusive: str, exclusive: str) -> str:
    said = [f"{key} {schema[key]}" for key in (inclusive, exclusive) if schema.get(key) is not None]
    return " and ".join(said) or "none"


def _wider(was: str | None, now: str) -> bool:
    one, two = _REPEATED.fullmatch(was or ""), _REPEATED.fullmatch(now)
    return (
        one is not None
        and two is not None
        and (one["set"], one["end"]) == (two["set"], two["end"])
        and int(two["least"]) <= int(one["least"])
        and int(one["most"]) <= int(two["most"])
    )


# --- the files -------------------------------------------------------------------------------------------


def versions(folder: Path) -> dict[str, Contract]:
    """Maps a version to its contract, for every file in ``folder``."""
    return {
        path.stem: msgspec.json.decode(path.read_bytes(), type=Contract)
        for path in sorted(folder.glob("*.json"))
    }


def written(of: Contract) -> bytes:
    """The content of the file."""
    return msgspec.json.format(msgspec.json.encode(of, order="sorted"), indent=1) + b"\n"


def main() -> None:
    """Entry point of ``python -m caesura.contract.released``. Exit code 1: something is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", metavar="VERSION", help="write the current contract as that of VERSION")
    mode.add_argument("--check", action="store_true", help="report what it breaks of each version")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the checkout (default: this folder)")
    arguments = parser.parse_args()
    folder = arguments.root / FOLDER
    if arguments.write:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{arguments.write}.json").write_bytes(written(contract()))
        print(f"wrote {FOLDER / arguments.write}.json")  # noqa: T201
        return
    found = [
        f"{version}: {each}" for version, was in versions(folder).items() for each in broken(was, contract())
    ]
    if found:
        sys.exit("\n".join(found))
    print("nothing is broken")  # noqa: T201


if __name__ == "__main__":
    main()
