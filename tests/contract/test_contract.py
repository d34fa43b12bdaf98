"""The contract: examples, golden payloads, topics, access rules, and every way a message can be wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from caesura.bus.filters import matches
from caesura.contract import messages as m
from caesura.contract.access import Principal, VmPlacement, access_rules, readable
from caesura.contract.codec import (
    ContractError,
    Malformed,
    Oversized,
    UnknownTopic,
    UnknownType,
    decode,
    encode,
)
from caesura.contract.envelope import Message
from caesura.contract.examples import examples
from caesura.contract.generated import asyncapi, golden_payload
from caesura.contract.names import InvalidName, check_name, own_set
from caesura.contract.topics import CHANNELS, PREFIX, TopicError, channel_of, match_topic

_GOLDEN = Path(__file__).parent / "golden"
_NUMBERS = range(len(CHANNELS))


def test_examples_and_table_have_the_same_rows() -> None:
    assert [type(each.message) for each in examples()] == [channel.message for channel in CHANNELS]


@pytest.mark.parametrize("number", _NUMBERS, ids=[channel.message.TYPE for channel in CHANNELS])
def test_golden_payloads_still_decode_to_the_examples(number: int) -> None:
    """v1 only ever grows: what an older version wrote must mean the same today."""
    channel, example = CHANNELS[number], examples()[number]
    golden = (_GOLDEN / f"{channel.message.TYPE}.json").read_bytes()
    received = decode(channel.topic(**example.parameters), golden)
    assert received.message == example.message
    assert dict(received.parameters) == dict(example.parameters)
    assert msgspec.json.decode(golden_payload(number)) == msgspec.json.decode(golden)


@pytest.mark.parametrize("number", _NUMBERS, ids=[channel.message.TYPE for channel in CHANNELS])
def test_unknown_members_are_ignored(number: int) -> None:
    channel, example = CHANNELS[number], examples()[number]
    event = json.loads(golden_payload(number))
    event["extension"] = 1
    event["data"]["of_a_later_version"] = {"deep": [1]}
    assert decode(channel.topic(**example.parameters), json.dumps(event).encode()).message == example.message


@pytest.mark.parametrize("channel", CHANNELS, ids=lambda channel: channel.message.TYPE)
def test_types_and_topics_are_well_formed(channel: object) -> None:
    assert channel in CHANNELS
    row = CHANNELS[CHANNELS.index(channel)]
    noun, fact, version = row.message.TYPE.removeprefix("caesura.").rsplit(".", 2)
    assert noun
    assert fact
    assert version == "v1"
    writer_segment = row.address.removeprefix(f"{PREFIX}/").split("/")[0]
    assert writer_segment == {"coordinator": "fleet"}.get(row.writer, row.writer)
    assert row.readers, "a message nobody reads"
    assert not (row.retain and row.qos == 0)


def test_no_two_channels_claim_one_topic() -> None:
    for example in examples():
        topic = channel_of(type(example.message)).topic(**example.parameters)
        found = match_topic(topic)
        assert found is not None
        assert [row for row in CHANNELS if row.match(topic) is not None] == [found[0]]


def test_commands_are_never_retained() -> None:
    for kind in (
        m.StartOperation,
        m.AbortOperation,
        m.RolloutRequested,
        m.FreezeRequested,
        m.AbortRequested,
    ):
        assert not channel_of(kind).retain


def test_no_message_can_carry_a_command_line() -> None:
    """Updates are named over the bus and defined on the host."""
    for channel in CHANNELS:
        if channel.writer in {"coordinator", "ctl"}:
            schema = json.dumps(msgspec.json.schema(channel.message))
            for word in ("argv", "command_line", "script", "shell", "environ"):
                assert f'"{word}"' not in schema, f"{channel.message.__name__} has a member {word}"


def test_topic_parameters_are_checked() -> None:
    channel = channel_of(m.HostPresence)
    for bad in ("", "a/b", "+", "#", "a.b", "x" * 65, "ä"):
        with pytest.raises(TopicError):
            channel.topic(host=bad)
    with pytest.raises(TopicError, match="takes"):
        channel.topic(vm="v")


_TOPIC = f"{PREFIX}/host/host-1/presence"
_GOOD = golden_payload([channel.message for channel in CHANNELS].index(m.HostPresence))


def _changed(**members: object) -> bytes:
    return json.dumps({**json.loads(_GOOD), **members}).encode()


@pytest.mark.parametrize(
    ("topic", "payload", "error", "words"),
    [
        (_TOPIC, b"", Malformed, "not a CloudEvent"),
        (_TOPIC, b"null", Malformed, "not a CloudEvent"),
        (_TOPIC, b"\xff", Malformed, "not a CloudEvent"),
        (_TOPIC, b"[" * 50_000, Malformed, "not a CloudEvent"),
        (_TOPIC, b"x" * (256 * 1024 + 1), Oversized, "at most"),
        (_TOPIC, _changed(type="caesura.vm.ready.v1"), UnknownType, "does not belong here"),
        (_TOPIC, _changed(specversion="2.0"), Malformed, "specversion"),
        (_TOPIC, _changed(time="yesterday"), Malformed, "time"),
        (_TOPIC, _changed(time="2026-04-20T12:00:00"), Malformed, "time"),
        (_TOPIC, _changed(data={"host": "host-1"}), Malformed, "online"),
        (_TOPIC, _changed(data={"host": "host-2", "online": True, "instance": "x"}), Malformed, "host-2"),
        (_TOPIC, _changed(data={"host": "host-1", "online": "yes", "instance": "x"}), Malformed, "online"),
        ("caesura/v1/nowhere", _GOOD, UnknownTopic, "not in the topic table"),
        ("caesura/v2/host/host-1/presence", _GOOD, UnknownTopic, "not in the topic table"),
    ],
)
def test_what_breaks_the_contract(topic: str, payload: bytes, error: type[ContractError], words: str) -> None:
    with pytest.raises(error, match=words):
        decode(topic, payload)


@given(st.binary(max_size=300), st.sampled_from(range(len(CHANNELS))))
def test_no_payload_raises_anything_but_a_contract_error(payload: bytes, number: int) -> None:
    topic = CHANNELS[number].topic(**examples()[number].parameters)
    try:
        decode(topic, payload)
    except ContractError:
        return
    pytest.fail("random bytes were taken for a message")


@given(st.sampled_from(range(len(CHANNELS))), st.data())
def test_a_damaged_message_raises_a_contract_error_or_means_something(
    number: int, data: st.DataObject
) -> None:
    golden = bytearray(golden_payload(number))
    at = data.draw(st.integers(0, len(golden) - 1))
    golden[at] = data.draw(st.integers(0, 255))
    try:
        decode(CHANNELS[number].topic(**examples()[number].parameters), bytes(golden))
    except ContractError:
        return


def test_an_oversized_message_is_refused_before_it_is_sent() -> None:
    message = m.VmReady(vm="v", event_id="e", ready=True, reason="x" * 300_000)
    with pytest.raises(Oversized):
        encode(message, source="/s", event_id="1", time=datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("budget", [0, -1, 30.001, "9"])
def test_budgets_above_the_promise_do_not_decode(budget: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"budget_s": budget}, m.Policy)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 64, "x" * 63, "_mine", "a.b", "+", "#", "naïve"])
def test_names_that_cannot_stand_in_a_topic(name: str) -> None:
    with pytest.raises(InvalidName):
        check_name("VM", name)


def test_a_vm_in_no_set_is_a_set_of_its_own_that_no_operator_can_name() -> None:
    assert own_set("cache") == "_cache"
    with pytest.raises(InvalidName, match="underscore"):
        check_name("set", own_set("cache"))


# --- access rules ---


def _may(rules: str, user: str, right: str, topic: str) -> bool:
    """What Mosquitto makes of an acl_file."""
    block = next(part for part in rules.split("\n\n") if part.startswith(f"user {user}\n"))
    patterns = [line.split(" ", 2)[2] for line in block.splitlines() if line.startswith(f"topic {right} ")]
    return any(matches(pattern, topic) for pattern in patterns)


_FLEET = (
    Principal("coordinator"),
    Principal("exporter"),
    Principal("host", "host-1"),
    Principal("host", "host-2"),
    Principal("vm", "web-1", "web"),
    Principal("vm", "host-1", "web"),  # a VM with a host's name must not become the host
    Principal("metadata", "fleet"),
    Principal("ctl", "ops"),
)


@pytest.mark.parametrize("number", _NUMBERS, ids=[channel.message.TYPE for channel in CHANNELS])
def test_every_topic_has_exactly_its_writer(number: int) -> None:
    channel = CHANNELS[number]
    topic = channel.topic(**examples()[number].parameters)
    rules = access_rules(_FLEET)
    writers = {each.party for each in _FLEET if _may(rules, each.username, "write", topic)}
    assert writers == (set() if channel.deprecated else {channel.writer})


@pytest.mark.parametrize("number", _NUMBERS, ids=[channel.message.TYPE for channel in CHANNELS])
def test_every_reader_in_the_table_may_read_and_nobody_else(number: int) -> None:
    channel = CHANNELS[number]
    topic = channel.topic(**examples()[number].parameters)
    rules = access_rules(_FLEET)
    readers = {
        each.party
        for each in _FLEET
        if each.username not in {"vm_host-1", "host_host-2"} and _may(rules, each.username, "read", topic)
    }
    assert readers == set(channel.readers)


def test_a_host_reads_its_own_commands_only() -> None:
    rules = access_rules(_FLEET)
    topic = channel_of(m.StartOperation).topic(host="host-1")
    assert _may(rules, "host_host-1", "read", topic)
    assert not _may(rules, "host_host-2", "read", topic)
    assert not _may(rules, "vm_host-1", "read", topic)


def test_a_vm_reads_its_own_set_only() -> None:
    assert f"{PREFIX}/fleet/set/web/document" in readable(Principal("vm", "web-1", "web"))
    assert not any("+/document" in each for each in readable(Principal("vm", "web-1", "web")))


def test_a_vm_whose_host_is_known_reads_the_words_of_no_other() -> None:
    fleet = (Principal("vm", "web-1", "web", host="host-1"), Principal("vm", "web-2", "web"))
    rules = access_rules(fleet)
    places: dict[type[Message], dict[str, str]] = {
        m.ClockSyncAnswered: {},
        m.VmResumed: {"set": "web", "ud": "0"},
    }
    for kind, place in places.items():
        for vm, host, may in (
            ("web-1", "host-1", True),
            ("web-1", "host-2", False),
            ("web-2", "host-1", True),
            ("web-2", "host-2", True),
        ):
            topic = channel_of(kind).topic(host=host, vm=vm, **place)
            assert _may(rules, f"vm_{vm}", "read", topic) == may, topic


def test_a_publisher_and_a_host_may_be_bound_to_their_vms() -> None:
    bound = ("web-1", "web-2")
    rules = access_rules(
        (
            Principal("metadata", "h1", vms=bound),
            Principal("metadata", "fleet"),
            Principal("host", "h1", vms=bound),
        )
    )
    for vm, may in (("web-1", True), ("web-2", True), ("db-1", False)):
        approval = channel_of(m.VmApproved)
        assert _may(rules, "metadata_h1", "write", approval.topic(instance="h1", vm=vm)) == may
        assert _may(rules, "metadata_fleet", "write", approval.topic(instance="fleet", vm=vm))
        answer = channel_of(m.ClockSyncAnswered).topic(host="h1", vm=vm)
        assert _may(rules, "host_h1", "write", answer) == may
    assert not _may(rules, "metadata_h1", "write", channel_of(m.EventApproved).topic(instance="h1")), (
        "the topic of before has no VM in it"
    )


def test_a_host_may_be_bound_to_the_places_of_its_vms_and_then_its_topics_have_an_end() -> None:
    places = (VmPlacement("web-1", "web", 3), VmPlacement("db-1", "db"))
    host = Principal("host", "h1", vms=("web-1", "db-1"), places=places)
    rules = access_rules((host,))
    for kind in (m.VmFrozen, m.VmResumed, m.VmClockSynced):
        for vm, set_name, domain, may in (
            ("web-1", "web", "3", True),
            ("web-1", "web", "4", False),
            ("web-1", "db", "3", False),
            ("db-1", "db", "0", True),
            ("db-1", "db", "19", True),
            ("db-1", "db", "20", False),
            ("db-1", "db", "more", False),
        ):
            topic = channel_of(kind).topic(host="h1", set=set_name, ud=domain, vm=vm)
            assert _may(rules, "host_h1", "write", topic) == may, topic
    assert host.bounded
    assert not Principal("host", "h1", vms=("web-1", "db-1"), places=places[:1]).bounded
    assert not Principal("host", "h1").bounded
    assert not Principal("metadata", "m").bounded
    assert Principal("metadata", "m", vms=("a",)).bounded
    assert Principal("vm", "a", "web").bounded
    assert Principal("ctl", "ops").bounded


_IDENTIFIERS = (
    "operation",
    "request",
    "rollout",
    "event_id",
    "coordinator",
    "instance",
    "exchange",
    "boot_id",
)
_WITH_IDENTIFIERS = [
    (number, name)
    for number, channel in enumerate(CHANNELS)
    for name in channel.message.__struct_fields__
    if name in _IDENTIFIERS
]


@pytest.mark.parametrize(("number", "name"), _WITH_IDENTIFIERS)
@pytest.mark.parametrize(
    "value", ["../../../victim", "..", ".", "a/b", "a\0b", "a\n", "a b", "é", "x" * 65, "$(reboot)"]
)
def test_an_identifier_is_a_name_and_no_path(number: int, name: str, value: str) -> None:
    """`operation = "../../../victim"` removed a folder of others, and a NUL in an environment ended agents."""
    event = json.loads(golden_payload(number))
    event["data"][name] = value
    topic = CHANNELS[number].topic(**examples()[number].parameters)
    with pytest.raises(Malformed):
        decode(topic, json.dumps(event).encode())


@pytest.mark.parametrize("value", [10**30, 2**64, -1])
def test_an_integer_has_bounds(value: int) -> None:
    kinds = [channel.message for channel in CHANNELS]
    number = kinds.index(m.ClockSyncAnswered)
    event = json.loads(golden_payload(number))
    event["data"]["t2_ns"] = value
    with pytest.raises(Malformed):
        decode(CHANNELS[number].topic(**examples()[number].parameters), json.dumps(event).encode())


def _unbounded(kind: object, path: str, seen: set[type]) -> Iterator[str]:
    """What in a type may be as long or as large as a sender likes."""
    match kind:
        case inspect.StructType(cls=cls, fields=fields):
            if cls not in seen:
                seen.add(cls)
                for field in fields:
                    yield from _unbounded(field.type, f"{cls.__name__}.{field.encode_name}", seen)
        case inspect.IntType(ge=least, gt=above, le=most):
            if most is None or (least is None and above is None):
                yield path
        case inspect.StrType(pattern=pattern, max_length=longest):
            if longest is None and not (pattern or "").endswith(r"\Z"):
                yield path
        case inspect.UnionType(types=types):
            for each in types:
                yield from _unbounded(each, path, seen)
        case inspect.VarTupleType(item_type=item):
            yield from _unbounded(item, path, seen)


def test_every_number_and_every_text_of_a_message_has_bounds() -> None:
    seen: set[type] = set()
    found = [
        path
        for channel in CHANNELS
        for path in _unbounded(inspect.type_info(channel.message), channel.message.__name__, seen)
    ]
    assert found == []
    assert m.VmRecord in seen, "the walk goes down"


def test_readers_of_the_schemas_get_patterns_that_they_understand() -> None:
    """JSON Schema's patterns are ECMA-262's, where an escaped Z is the letter."""
    text = json.dumps(asyncapi())
    assert '"pattern": "^[A-Za-z0-9_-]{1,64}$"' in text
    assert r"\\Z" not in text


def test_everything_that_code_is_generated_from_has_a_name() -> None:
    """Generators number what has none: ``AnonymousSchema_17``. A const, a plain type and a reference make no type."""
    document = asyncapi()
    messages = document["components"]["messages"].values()
    assert all(each["payload"].keys() == {"$ref"} for each in messages)
    nameless: list[str] = []

    def walk(schema: Any, path: str) -> None:
        if isinstance(schema, dict):
            if {"enum", "properties", "items"} & schema.keys() and not isinstance(schema.get("title"), str):
                nameless.append(path)
            for key, part in schema.items():
                if key not in ("default", "examples"):
                    walk(part, f"{path}/{key}")
        elif isinstance(schema, list):
            for number, part in enumerate(schema):
                walk(part, f"{path}/{number}")

    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        walk(schema, name)
    assert nameless == []
    titles = [schema["title"] for schema in schemas.values()]
    assert len(set(titles)) == len(titles)
