"""What the reliable publisher promises, whatever the broker does: order, no loss, and nobody held up by somebody else's refusal."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from structlog.testing import capture_logs

from caesura.bus.port import BusUnavailable, PublishRefused, PublishTooLarge
from caesura.delivery.message import OutboxMessage
from caesura.delivery.outbox_store import MemoryOutbox
from caesura.delivery.policy import NEWEST, DeliveryPolicy
from caesura.delivery.publisher import IN_FLIGHT, ReliablePublisher
from caesura.runtime.errors import StoreError

pytestmark = pytest.mark.looptime


def message(topic: str, number: int = 0, *, retain: bool = False) -> OutboxMessage:
    """A message on a topic."""
    name = f"{topic}-{number}"
    return OutboxMessage(event_id=name, type="t", topic=topic, payload=name.encode(), retain=retain)


class Broker:
    """A bus and its broker: what was taken, in order, and what it does to each message."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.tries: Counter[str] = Counter()
        self.refused: set[str] = set()
        self.at_once = 0
        self.most_at_once = 0
        self.topics: Counter[str] = Counter()
        self.up = asyncio.Event()
        self.up.set()
        self.answers = asyncio.Event()
        self.answers.set()
        self.latency_s = 0.001
        self.line = asyncio.Lock()
        """One connection: a broker takes messages, and answers, in the order in which they were sent."""

    async def wait_connected(self, timeout_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.up.wait()
        return self.up.is_set()

    async def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, timeout_s: float = 10.0
    ) -> None:
        assert qos == 1
        assert retain is topic.startswith("s")
        self.tries[payload.decode()] += 1
        self.at_once += 1
        self.topics[topic] += 1
        assert self.topics[topic] == 1, "two messages of one topic at once"
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            async with self.line:
                await self.answer(topic, payload.decode(), timeout_s)
        finally:
            self.at_once -= 1
            self.topics[topic] -= 1

    async def answer(self, topic: str, name: str, timeout_s: float) -> None:
        await asyncio.sleep(self.latency_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self.answers.wait()
        except TimeoutError:
            raise BusUnavailable("no answer in time") from None
        if not self.up.is_set():
            raise BusUnavailable("the connection ended")
        if topic in self.refused:
            raise PublishRefused(topic, "Not authorized")
        self.taken.append(name)


@asynccontextmanager
async def running(publisher: ReliablePublisher) -> AsyncIterator[ReliablePublisher]:
    """Runs for the block."""
    task = asyncio.create_task(publisher.run())
    try:
        yield publisher
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_several_are_in_flight_and_all_arrive_in_order() -> None:
    broker = Broker()
    async with running(ReliablePublisher(broker)) as publisher:
        names = [message(f"t{number % 30}", number) for number in range(300)]
        publisher.put(*names)
        assert await publisher.drained(60)
    assert broker.taken == [each.event_id for each in names]
    assert broker.most_at_once == IN_FLIGHT
    assert set(broker.tries.values()) == {1}


async def test_of_one_topic_there_is_one_at_a_time() -> None:
    broker = Broker()
    async with running(ReliablePublisher(broker)) as publisher:
        publisher.put(*(message("one", number) for number in range(20)))
        assert await publisher.drained(60)
    assert broker.taken == [f"one-{number}" for number in range(20)]
    assert broker.most_at_once == 1


async def test_a_lost_connection_costs_neither_a_message_nor_the_order() -> None:
    broker = Broker()
    async with running(ReliablePublisher(broker)) as publisher:
        broker.answers.clear()
        publisher.put(*(message(f"t{number}") for number in range(25)))
        await asyncio.sleep(1)
        assert broker.at_once == IN_FLIGHT
        broker.up.clear()
        broker.answers.set()
        await asyncio.sleep(5)
        assert broker.taken == []
        assert len(publisher) == 25
        broker.up.set()
        assert await publisher.drained(60)
    assert broker.taken == [f"t{number}-0" for number in range(25)]


async def test_a_refused_topic_is_tried_again_ever_less_often_while_the_others_are_published() -> None:
    broker = Broker()
    broker.refused = {"no"}
    publisher = ReliablePublisher(broker, retry_s=2.0, retry_most_s=60.0)
    with capture_logs() as logs:
        async with running(publisher):
            for number in range(5):
                publisher.put(message("no", number), message("yes", number))
            assert not await publisher.drained(60), "what is refused is left"
            assert broker.taken == [f"yes-{number}" for number in range(5)]
            assert (len(publisher), publisher.refused) == (5, 5)
            assert "5 messages wait for the broker: the broker refused a message on 'no'" in publisher.ping()
            await asyncio.sleep(600)
            assert 10 <= broker.tries["no-0"] <= 16
            assert set(broker.tries) == {"no-0", *broker.taken}
            publisher.put(message("no", 5), message("yes", 5))
            broker.refused.clear()
            await asyncio.sleep(61)
            assert await publisher.drained(60)
    assert broker.taken[5:] == ["yes-5", *(f"no-{number}" for number in range(6))]
    assert (publisher.refused, publisher.ping()) == (0, "")
    said = [each["event"] for each in logs]
    assert said.count("outbox.refused") == 2, "once, and every five minutes"
    assert said[-1] == "outbox.accepted_again"


async def test_one_that_is_too_large_waits_alone() -> None:
    class Small(Broker):
        limit = 100

        async def answer(self, topic: str, name: str, timeout_s: float) -> None:
            if name == "answers-1" and self.limit:
                raise PublishTooLarge(topic, 300, self.limit)
            await super().answer(topic, name, timeout_s)

    broker = Small()
    async with running(ReliablePublisher(broker)) as publisher:
        publisher.put(*(message("answers", number) for number in range(4)))
        assert not await publisher.drained(60)
        assert broker.taken == ["answers-0", "answers-2", "answers-3"]
        assert publisher.refused == 1
        assert "max_packet_size" in publisher.ping()
        broker.limit = 0
        await asyncio.sleep(61)
        assert await publisher.drained(60)
        assert (publisher.refused, publisher.ping()) == (0, "")
    assert broker.taken[-1] == "answers-1"


async def test_one_that_turns_out_too_large_when_its_topic_is_tried_again_waits_alone() -> None:
    """Its topic was refused, it is what is tried when the access rules were corrected, and the others must not wait for it."""

    class Strict(Broker):
        corrected = False

        async def answer(self, topic: str, name: str, timeout_s: float) -> None:
            if not self.corrected:
                raise PublishRefused(topic, "not authorized")
            if name == "answers-0":
                raise PublishTooLarge(topic, 300, 100)
            await super().answer(topic, name, timeout_s)

    broker = Strict()
    async with running(ReliablePublisher(broker)) as publisher:
        publisher.put(*(message("answers", number) for number in range(3)))
        assert not await publisher.drained(5)
        broker.corrected = True
        await asyncio.sleep(61)
        assert not await publisher.drained(60)
        assert broker.taken == ["answers-1", "answers-2"]
        assert publisher.refused == 1


async def test_of_a_state_the_newest_is_published() -> None:
    broker = Broker()
    async with running(ReliablePublisher(broker)) as publisher:
        broker.answers.clear()
        for number in range(4):
            publisher.put(message("state", number, retain=True), policy=NEWEST)
            await asyncio.sleep(0.01)
        publisher.put(message("fact"))
        broker.answers.set()
        assert await publisher.drained(60)
    assert broker.taken == ["state-0", "state-3", "fact-0"], "the first one was on its way"


async def test_a_state_that_failed_on_its_way_is_not_sent_after_a_newer_one() -> None:
    broker = Broker()
    async with running(ReliablePublisher(broker)) as publisher:
        broker.answers.clear()
        publisher.put(message("state", 0, retain=True), policy=NEWEST)
        await asyncio.sleep(0.01)
        publisher.put(message("state", 1, retain=True), policy=NEWEST)
        broker.up.clear()
        broker.answers.set()
        await asyncio.sleep(1)
        broker.up.set()
        assert await publisher.drained(60)
    assert broker.taken == ["state-1"]


async def test_of_a_refused_state_the_newest_is_tried() -> None:
    broker = Broker()
    broker.refused = {"state"}
    async with running(ReliablePublisher(broker)) as publisher:
        for number in range(8):
            publisher.put(message("state", number, retain=True), policy=NEWEST)
            await asyncio.sleep(1.9)
        assert (len(publisher), publisher.refused) == (1, 1)
        broker.refused.clear()
        await asyncio.sleep(61)
        assert await publisher.drained(60)
    assert broker.taken == ["state-7"]


async def test_a_refused_one_that_is_replaced_just_when_it_is_tried_again_leaves_its_topic_free() -> None:
    broker = Broker()
    broker.refused = {"state"}
    async with running(ReliablePublisher(broker, retry_s=1.0)) as publisher:
        publisher.put(message("state", 0, retain=True), policy=NEWEST)
        await asyncio.sleep(0.5)
        broker.up.clear()  # the next try cannot go out
        publisher.put(message("other"))
        await asyncio.sleep(1.5)
        publisher.put(message("state", 1, retain=True), policy=NEWEST)
        broker.refused.clear()
        broker.up.set()
        await asyncio.sleep(10)
        assert await publisher.drained(60)
    assert broker.taken == ["other-0", "state-1"]


async def test_what_has_a_limit_is_given_up_and_what_has_none_is_not() -> None:
    broker = Broker()
    broker.refused = {"no"}
    limited = DeliveryPolicy(give_up_s=60.0)
    with capture_logs() as logs:
        async with running(ReliablePublisher(broker)) as publisher:
            publisher.put(message("no"), policy=limited)
            await asyncio.sleep(1)
            broker.up.clear()
            publisher.put(message("a"), message("no", 1), policy=limited)
            publisher.put(message("a", 1))
            with pytest.raises(BusUnavailable):
                await publisher.deliver(message("b"), limited)
            assert len(publisher) == 1
            broker.up.set()
            broker.refused.clear()
            assert await publisher.drained(60)
    assert broker.taken == ["a-1"]
    assert [each["topic"] for each in logs if each["event"] == "outbox.given_up"] == ["no", "a", "no", "b"]


async def test_a_broker_that_does_not_answer_is_given_up_on_time() -> None:
    broker = Broker()
    broker.answers.clear()
    async with running(ReliablePublisher(broker)) as publisher:
        began = asyncio.get_running_loop().time()
        with pytest.raises(BusUnavailable):
            await publisher.deliver(message("a"), DeliveryPolicy(give_up_s=25.0))
        assert 24 <= asyncio.get_running_loop().time() - began <= 26
        assert len(publisher) == 0


async def test_whoever_waits_hears_of_a_refusal_where_that_is_the_end() -> None:
    broker = Broker()
    broker.refused = {"no"}
    async with running(ReliablePublisher(broker)) as publisher:
        with pytest.raises(PublishRefused):
            await publisher.deliver(message("no"), DeliveryPolicy(refusal_ends=True))
        assert (len(publisher), publisher.refused) == (0, 0)
        await publisher.deliver(message("yes"), DeliveryPolicy(refusal_ends=True))
    assert broker.taken == ["yes-0"]


async def test_what_is_repeated_is_repeated_while_it_is_wanted_under_the_same_id() -> None:
    broker = Broker()
    wanted = True
    accepted: list[OutboxMessage] = []
    publisher = ReliablePublisher(broker, on_accepted=accepted.append)
    policy = DeliveryPolicy(give_up_s=5.0, refusal_ends=True, repeat_s=2.0, wanted=lambda: wanted)
    async with running(publisher):
        await publisher.deliver(message("approval"), policy)
        assert len(publisher) == 0
        await asyncio.sleep(5)
        broker.refused = {"approval"}  # for a while: it was taken before, and is wanted
        await asyncio.sleep(30)
        broker.refused.clear()
        await asyncio.sleep(70)
        taken = len(broker.taken)
        assert taken > 5
        wanted = False
        await asyncio.sleep(10)
        assert len(broker.taken) <= taken + 1
        assert await publisher.drained(60)
    assert set(broker.taken) == {"approval-0"}
    assert accepted == [message("approval")], "counted once"


async def test_one_that_waits_already_is_not_sent_twice() -> None:
    broker = Broker()
    async with running(ReliablePublisher(broker)) as publisher:
        broker.answers.clear()
        publisher.put(message("a"), message("a"))
        await asyncio.sleep(0.1)
        publisher.put(message("a"))
        broker.answers.set()
        assert await publisher.drained(60)
        publisher.put(message("a"))
        assert await publisher.drained(60)
    assert broker.taken == ["a-0", "a-0"], "a repetition after it was taken is one"


async def test_it_is_removed_from_the_store_when_the_broker_has_it_and_what_is_left_is_loaded() -> None:
    broker, store = Broker(), MemoryOutbox()
    await store.add([message("a"), message("s", 1, retain=True), message("b")])
    broker.refused = {"a"}
    async with running(ReliablePublisher(broker, store)) as publisher:
        await publisher.load()
        assert not await publisher.drained(60)
        assert await store.load() == [message("a")]
    broker.refused.clear()
    async with running(ReliablePublisher(broker, store)) as publisher:
        await publisher.load()
        assert await publisher.drained(60)
        assert await store.load() == []
    assert broker.taken == ["s-1", "b-0", "a-0"]


async def test_a_store_that_does_not_forget_holds_nothing_up() -> None:
    class Full(MemoryOutbox):
        broken = True

        async def remove(self, event_ids: object) -> None:
            if self.broken:
                raise StoreError("disk full")
            await super().remove(event_ids)  # type: ignore[arg-type]

    broker, store = Broker(), Full()
    await store.add([message(f"t{number}") for number in range(20)])
    async with running(ReliablePublisher(broker, store)) as publisher:
        await publisher.load()
        assert not await publisher.drained(10)
        assert len(broker.taken) == publisher.unremoved == 20
        store.broken = False
        await asyncio.sleep(5)
        assert await publisher.drained(60)
        assert await store.load() == []
    assert len(broker.taken) == 20


async def test_what_cannot_be_sent_at_all_is_dropped_by_name() -> None:
    class Strict(Broker):
        async def answer(self, topic: str, name: str, timeout_s: float) -> None:
            if topic == "bad/#":
                raise ValueError("a wildcard")
            await super().answer(topic, name, timeout_s)

    broker = Strict()
    with capture_logs() as logs:
        async with running(ReliablePublisher(broker)) as publisher:
            publisher.put(message("bad/#"), message("good"))
            assert await publisher.drained(60)
    assert broker.taken == ["good-0"]
    assert "outbox.unsendable" in [each["event"] for each in logs]


class Fickle(Broker):
    """Refuses topics for a while, loses connections before and after it took a message, is slow at times."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance
        self.bad = 0.4

    async def answer(self, topic: str, name: str, timeout_s: float) -> None:
        await asyncio.sleep(min(timeout_s, self.chance.uniform(0, 0.01)))
        dice = self.chance.random()
        if dice < self.bad * 0.2:
            raise BusUnavailable("it ended before")
        if dice < self.bad * 0.5:
            raise PublishRefused(topic, "Not authorized")
        self.taken.append(name)
        if dice < self.bad * 0.7:
            raise BusUnavailable("it ended after")


@pytest.mark.parametrize("seed", range(40))
async def test_whatever_happens_each_topic_is_in_order_and_complete(seed: int) -> None:
    chance = random.Random(seed)
    broker, store = Fickle(chance), MemoryOutbox()
    put: defaultdict[str, list[str]] = defaultdict(list)
    counters: defaultdict[str, Callable[[], int]] = defaultdict(lambda: iter(range(10**6)).__next__)
    publisher = ReliablePublisher(broker, store, retry_s=0.05, retry_most_s=0.4)
    async with running(publisher):
        for _ in range(60):
            topic = chance.choice(("s0", "s1", "t0", "t1", "t2", "t3"))
            retained = topic in ("s0", "s1")
            made = message(topic, counters[topic](), retain=retained)
            await store.add([made])
            publisher.put(made, policy=NEWEST if retained else DeliveryPolicy())
            put[topic].append(made.event_id)
            if chance.random() < 0.5:
                await asyncio.sleep(chance.uniform(0, 0.1))
        broker.bad = 0.0
        await asyncio.sleep(5)
        assert await publisher.drained(60)
    assert await store.load() == []
    for topic, names in put.items():
        came = list(dict.fromkeys(each for each in broker.taken if each.startswith(f"{topic}-")))
        assert came[-1] == names[-1]
        if topic in ("s0", "s1"):
            assert came == sorted(came, key=names.index), "a newer state is never followed by an older one"
        else:
            assert came == names
