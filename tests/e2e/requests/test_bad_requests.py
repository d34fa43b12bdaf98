"""Requests that cannot be carried out: a clear answer, and nothing changed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from caesura.contract import messages as m
from caesura.contract.codec import MAX_PAYLOAD_BYTES
from caesura_ctl.session import new_request_id
from caesura_testing.patience import patient
from caesura_testing.sandbox import Vm

_TOPIC = "caesura/v1/ctl/e2e/start"
_HEAD = {"specversion": "1.0", "id": "1", "source": "/test", "time": "2026-04-20T12:00:00Z"}


def _event(**changes: Any) -> bytes:
    data = {"request": "r", "update": "patch", **changes.pop("data", {})}
    return json.dumps({**_HEAD, "type": "caesura.rollout.requested.v1", "data": data, **changes}).encode()


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"{not json", "not a CloudEvent"),
        (b"\xff\xfe", "not a CloudEvent"),
        (b"[" * 100_000, "not a CloudEvent"),
        (_event(type="caesura.unknown.v1"), "does not belong here"),
        (_event(data={"update": 7}), "update"),
        (_event(data={"policy": {"notice_s": 0}}), "notice_s"),
        (_event(data={"policy": {"budget_s": 31}}), "budget_s"),
        (
            _event(data={"update": "x" * MAX_PAYLOAD_BYTES}),
            "at most",
        ),  # the broker takes a little more than the contract
        (_event(specversion="0.3"), "specversion"),
        (json.dumps(_HEAD).encode(), "not a CloudEvent"),
    ],
    ids=[
        "not-json",
        "not-utf8",
        "deep",
        "unknown-type",
        "wrong-type",
        "no-notice",
        "long-budget",
        "oversized",
        "old-spec",
        "no-data",
    ],
)
async def test_a_message_that_breaks_the_contract_is_answered_and_changes_nothing(
    payload: bytes, words: str, pair: Any
) -> None:
    answers: list[m.RequestAnswered] = []

    async def listen(received: Any) -> None:
        if isinstance(received.message, m.RequestAnswered):
            answers.append(received.message)

    pair.session.post.listeners.append(listen)
    await pair.session.bus.publish(_TOPIC, payload)
    await pair.sandbox.until(lambda: bool(answers), 10, "an answer")
    assert not answers[0].accepted
    assert words in answers[0].reason
    assert not pair.fleet_view.rollouts
    plan = await pair.session.ask(
        m.RolloutRequested(request=new_request_id(), update="patch", plan_only=True)
    )
    assert plan.accepted, "the coordinator is well"


async def test_what_a_plan_refuses_by_name(stages: Callable[..., Any]) -> None:
    stage = await stages(
        # Whose web-1 is depends on who came first: host-1 has two domains either way.
        host_1=[
            Vm(name="web-1", set="web", update_domain=0),
            Vm(name="web-2", set="web", update_domain=1),
            Vm(name="web-3", set="web", update_domain=0),
        ],
        host_2=[Vm(name="web-1", set="web", update_domain=0)],
        up=False,
    )
    await stage.sandbox.start("coordinator", "host-1", "host-2")
    await stage.sandbox.until(
        lambda: (
            len(stage.fleet_view.hosts) == 2 and all(map(stage.fleet_view.is_online, stage.fleet_view.hosts))
        ),
        20,
        "two hosts",
    )

    async def reasons(**selection: Any) -> str:
        answer = await stage.session.ask(
            m.RolloutRequested(request=new_request_id(), update="patch", selection=m.Selection(**selection))
        )
        assert not answer.accepted
        return str(answer.reason)

    assert "host-1: holds VMs of set web in 2 domains" in await reasons()
    # Whoever names the VM that two hosts have is told so, by name; all others get a plan without it. The coordinator may
    # receive the second inventory later than we do.
    told = (
        r"web-1: it belongs to (host-1, and host-2|host-2, and host-1) names a VM of this name, too|"
        "web-1: host-1, host-2 all name a VM of this name, and none has it on record"  # both came before the coordinator led
    )
    async with asyncio.timeout(patient(20)):
        while not re.search(told, named := await reasons(vms=("web-1",))):
            assert "web-1" in named or "single VMs" in named
    assert "host-7: no host of this name" in await reasons(hosts=("host-7",))
    assert not stage.fleet_view.rollouts


async def test_one_rollout_per_set(pair: Any) -> None:
    pair.notice_s = 30.0
    first = await pair.roll()
    answer = await pair.session.ask(m.RolloutRequested(request=new_request_id(), update="patch"))
    assert not answer.accepted
    assert f"set web is held by rollout {first}" in answer.reason
    same = m.AbortRequested(request=new_request_id(), rollout=first)
    assert (await pair.session.ask(same)).accepted
    assert (await pair.session.ask(same)).accepted, "a repeated request gets the same answer"
    other = await pair.session.ask(m.AbortRequested(request=new_request_id(), rollout=first))
    assert not other.accepted
    assert "'aborted'" in other.reason


async def _caesura(pair: Any, *words: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "caesura_ctl",
        *words,
        env={**os.environ, "CAESURA_CTL_BROKER_URL": pair.sandbox.broker.url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(patient(60)):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_command_says_what_is_wrong_and_exits_with_its_code(pair: Any) -> None:
    code, _, err = await _caesura(pair, "roll", "patch", "--all", "--notice", "0s")
    assert (code, "'--notice': it must be longer than zero" in err) == (2, True), err
    code, _, err = await _caesura(pair, "roll", "patch", "--all", "--budget", "31s")
    assert (code, "'--budget': 31s is too long: at most 30s" in err) == (2, True), err
    code, _, err = await _caesura(pair, "roll", "pach", "--all")
    assert (code, "did you mean 'patch'" in err) == (3, True), err
    code, _, err = await _caesura(pair, "status", "--broker", "mqtt://127.0.0.1:1")
    assert (code, "cannot reach the broker" in err) == (4, True), err
    await pair.sandbox.kill("coordinator")
    code, _, err = await _caesura(pair, "plan", "patch")
    assert (code, "coordinator" in err) == (5, True), err
    assert not pair.sandbox.watch.pauses


async def test_the_command_from_plan_to_history(pair: Any) -> None:
    code, out, err = await _caesura(pair, "plan", "patch", "--json")
    assert code == 0, err
    assert [wave["hosts"] for wave in json.loads(out)["plan"]["waves"]] == [["host-1"], ["host-2"]]
    code, out, err = await _caesura(
        pair, "freeze", "--vm", "web-2", "--for", "1s", "--notice", "1s", "--budget", "5s", "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    assert [each["vm"] for each in result["pauses"]] == ["web-2"]
    assert 1.0 <= result["pauses"][0]["pause_s"] < min(patient(2.0), 5.0)
    assert result["pauses_complete"]
    code, out, err = await _caesura(pair, "roll", "patch", "--all", "--notice", "1s", "--budget", "8s")
    assert code == 0, err
    assert "web-1: paused" in out
    code, out, err = await _caesura(pair, "watch", "--json")
    assert code == 0, err
    late = json.loads(out)
    assert (late["rollout"]["status"], late["pauses"], late["pauses_complete"]) == ("completed", [], False)
    code, out, err = await _caesura(pair, "status")
    assert code == 0, err
    assert "2/2 waves" in out
    assert "0/1" not in out, "nobody says that nothing was paused"
    code, out, err = await _caesura(pair, "history", "--json")
    assert [each["status"] for each in json.loads(out)] == ["completed", "completed"]
    code, out, err = await _caesura(pair, "status", "--json")
    assert len(json.loads(out)["hosts"]) == 2
    code, out, err = await _caesura(pair, "updates")
    assert "patch" in out
    code, out, err = await _caesura(pair, "tail", "--count", "3", "--json")
    assert all(json.loads(line)["specversion"] == "1.0" for line in out.splitlines())
    assert len(out.splitlines()) == 3
    code, out, err = await _caesura(pair, "abort")
    assert code == 3, err
    pair.assert_order()


async def test_a_set_may_be_named_as_the_tables_show_it(stages: Callable[..., Any]) -> None:
    stage = await stages(host_1=[Vm(name="cache-1")])
    code, out, err = await _caesura(stage, "status")
    assert (code, "(cache-1)" in out) == (0, True), err
    code, out, err = await _caesura(stage, "plan", "patch", "--set", "(cache-1)", "--json")
    assert code == 0, err
    assert [vm["vm"] for vm in json.loads(out)["plan"]["waves"][0]["vms"]] == ["cache-1"]
    code, out, err = await _caesura(
        stage, "tail", "--set", "(cache-1)", "--type", "caesura.set.document.v1", "--count", "1", "--json"
    )
    assert (code, json.loads(out)["data"]["set"]) == (0, "_cache-1"), err


async def test_an_update_that_a_host_refused_is_said_to_be_refused(pair: Any) -> None:
    pair.sandbox.update("three", ["no-such-program"])
    await pair.sandbox.until(
        lambda: all(host.refused_updates for host in pair.fleet_view.hosts.values()), 20, "both to refuse it"
    )
    code, _, err = await _caesura(pair, "roll", "three", "--all")
    assert code == 3, err
    assert "three.toml was refused by host-1, host-2: see caesura updates" in err


async def test_a_broker_that_goes_away_is_said_and_its_return_too(pair: Any, broker: Any) -> None:
    pair.notice_s = 300.0
    rollout = await pair.roll()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "caesura_ctl", "watch", rollout),
        env={**os.environ, "CAESURA_CTL_BROKER_URL": broker.url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(patient(60)):
        assert b"running" in await process.stdout.readline()
        await broker.kill()
        assert b"connection to the broker lost, trying again" in await process.stderr.readline()
        await broker.start()
        assert b"connected to the broker again" in await process.stderr.readline()
        assert await pair.session.bus.wait_connected(patient(30))
        await pair.give_up(rollout)
        out, err = await process.communicate()
    assert (process.returncode, b"aborted" in out) == (1, True), err
    assert err.count(b"\n") == 1, "nothing is said twice"


async def test_a_host_that_has_the_update_is_not_paused_again_and_nothing_to_do_ends_well(pair: Any) -> None:
    code, _, err = await _caesura(pair, "roll", "patch")
    assert (code, "--all" in err) == (2, True), err
    first = ("roll", "patch", "--host", "host-1", "--notice", "1s", "--budget", "8s")
    code, _, err = await _caesura(pair, *first)
    assert code == 0, err
    await pair.sandbox.until(lambda: bool(pair.fleet_view.hosts["host-1"].installed), 20, "host-1 to have it")
    code, out, err = await _caesura(pair, "plan", "patch", "--canary", "host-2", "--json")
    assert code == 0, err
    plan = json.loads(out)["plan"]
    assert [(wave["hosts"], wave["canary"]) for wave in plan["waves"]] == [(["host-2"], True)]
    assert {(vm["host"], vm["skip"]) for vm in plan["skipped"]} == {("host-1", "installed")}
    code, out, err = await _caesura(pair, *first)
    assert (code, "nothing to do" in out) == (0, True), (out, err)
    code, out, err = await _caesura(pair, "updates")
    assert "host-1" in out.split("installed on")[1], out
    code, out, err = await _caesura(pair, *first, "--again")
    assert code == 0, err
    assert len(pair.fleet_view.rollouts) == 2
