"""``docker compose up`` from a fresh clone, and what a person may do to it: one story, each test goes on from the last.

The engine, compose, the networks and the images' own files are real; the bases are stand-ins made from Debian's
packages (``caesura_testing.fake_images``), and Grafana is left out because there is none for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.request
from datetime import datetime
from pathlib import Path

import pytest

from caesura.runtime.processes import is_stopped
from caesura_demo.compose_fleet import STORE_SECRET, compose_layout, secret_readers
from caesura_testing.fake_images import PYTHON
from caesura_testing.fleet import HOSTS, Fleet, until
from caesura_testing.prometheus import api
from caesura_testing.queries import problems

_ROOT = Path(__file__).parents[3]
_BUDGET_S = 15.0
_OPERATOR = ("--notice", "5s", "--budget", "15s", "--soak", "1s")
_NEWCOMER_S = 120.0
_STORY_S = 300.0
"""More seconds than have passed since the first rollout began."""
_IMAGE_BYTES = 150_000_000
_VMS = 10
_VOLUMES = ("config", "broker", "coordinator", *HOSTS, "prometheus", "grafana", "store")
_DOMAINS = {
    **{("web", str(domain)): 2.0 for domain in range(3)},
    **{("db", str(domain)): 1.0 for domain in range(3)},
    ("_batch-1", "0"): 1.0,
}
"""(set, update domain) to the VMs in it."""

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def roll(fleet: Fleet, update: str) -> str:
    """Start a rollout as the operator; its id."""
    code, told, said = fleet.caesura("roll", update, "--all", "--again", "--detach", *_OPERATOR)
    assert code == 0, (told, said)
    return str(told["rollout"])


def roll_as_the_service(fleet: Fleet, update: str) -> str:
    """Start a rollout under the name of the service `rollout`, which is between two of its own; its id.

    The longer update leaves time to do something in its pause.
    """
    words = (
        "exec",
        "-T",
        "rollout",
        "caesura",
        "roll",
        update,
        "--all",
        "--again",
        "--detach",
        "--json",
        *_OPERATOR,
    )
    return str(json.loads(fleet.project.run(*words).out)["rollout"])


def _size(fleet: Fleet, image: str) -> int:
    return int(fleet.project.engine.run("image", "inspect", "-f", "{{.Size}}", image).out)


def frozen(fleet: Fleet) -> None:
    until(
        lambda: bool(fleet.frozen()),
        60.0,
        lambda: f"a VM stands still; {fleet.project.logs('coordinator')[-2000:]}",
    )


def incarnations(fleet: Fleet) -> dict[str, int]:
    """DocumentIncarnation of each set, as the bus retains it."""
    code, told, said = fleet.caesura("status")
    assert code == 0, said
    return {each["set"]: each["incarnation"] for each in told["documents"]}


def test_up_from_a_fresh_clone_shows_a_pause_within_two_minutes(fleet: Fleet) -> None:
    fleet.project.engine.run("image", "rm", "-f", "caesura:local")
    begun = time.monotonic()

    fleet.project.up()
    healthy = time.monotonic() - begun

    count = "sum(caesura_pause_seconds_count)"
    until(lambda: bool(fleet.query(count)), _NEWCOMER_S, lambda: f"a pause; {fleet.project.logs('rollout')}")
    seen_after = time.monotonic() - begun
    sys.stdout.write(
        f"after `up`: all healthy {healthy:.1f} s, first pause in Prometheus {seen_after:.1f} s\n"
    )
    assert seen_after < _NEWCOMER_S
    more = _size(fleet, "caesura:local") - _size(fleet, PYTHON)
    sys.stdout.write(f"the image has {more / 1e6:.1f} MB more than its base\n")
    assert more < _IMAGE_BYTES

    by_domain = "sum by (set, update_domain) (caesura_pause_seconds_count)"
    until(
        lambda: fleet.query(by_domain) == _DOMAINS, 90.0, lambda: f"pauses of all: {fleet.query(by_domain)}"
    )
    completed = 'caesura_rollouts{status="completed"}'
    until(
        lambda: fleet.query(completed) == {("completed",): 1.0} or 1.0 in fleet.query(completed).values(),
        60.0,
        lambda: f"it completes: {fleet.query(completed)}; {fleet.project.logs('rollout')}",
    )
    budgets = fleet.query("max by (set, update_domain) (caesura_pause_budget_seconds)")
    assert budgets == dict.fromkeys(_DOMAINS, _BUDGET_S)
    longest = fleet.query("sum(caesura_pause_seconds_sum) / sum(caesura_pause_seconds_count)")
    assert 2.0 < next(iter(longest.values())) < _BUDGET_S
    assert not any(fleet.query("caesura_pause_overruns_total").values())
    with urllib.request.urlopen(fleet.exporter_url, timeout=5) as answer:  # noqa: S310 - our own exporter
        assert answer.status == 200
        assert b"<title>" in answer.read(), "the exporter's page, from the image's wheel"
    assert fleet.frozen() == []
    (state,) = fleet.rollouts().values()
    for wave in state["waves"]:
        assert set(wave["approved"]) == set(wave["events"]), "approved by its VMs, who reach their listeners"
    assert state["requested_by"] == "rollout"
    assert len(state["waves"]) == len(HOSTS), "one host after another: each holds another domain of web"


def test_nothing_has_more_rights_than_it_needs(fleet: Fleet) -> None:
    users = {}
    for service in fleet.project.services:
        facts = fleet.project.inspect(
            service,
            "{{.Config.User}} {{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}} {{.HostConfig.CapAdd}} "
            "{{.HostConfig.SecurityOpt}} {{.HostConfig.Privileged}} {{gt .HostConfig.Memory 0}}",
        )
        user, rest = facts.split(" ", 1)
        more = "[CAP_CHOWN]" if service == "setup" else "[]"
        assert (
            rest.replace("[CHOWN]", "[CAP_CHOWN]") == f"true [ALL] {more} [no-new-privileges:true] false true"
        ), service
        users[service] = user
    assert len(set(users.values())) == len(users), "each a user of its own"
    assert users.pop("setup") == "0:0"
    assert all(not user.startswith("0") for user in users.values())


def test_every_secret_is_read_by_its_reader_alone(fleet: Fleet) -> None:
    readers = secret_readers(compose_layout())
    look = "cd /etc/caesura && for each in secrets/* broker/*; do cat $each >/dev/null 2>&1 && echo $each; done; true"
    for service in fleet.project.services:
        if service in {"setup", "caesura"}:
            continue
        uid = int(fleet.project.inspect(service, "{{.Config.User}}").split(":")[0])
        can = set(fleet.project.run("exec", "-T", service, "sh", "-c", look).out.split())
        own = {f"secrets/{name}" for name, reader in readers.items() if reader == uid}
        if service == "coordinator":
            own.add(f"secrets/{STORE_SECRET}")
        if service == "broker":
            own |= {"broker/passwords", "broker/acl", "broker/mosquitto_sub"}
        assert can == own | {"broker/mosquitto.conf"}, service


def test_a_vms_listener_is_reached_from_its_own_host_alone(fleet: Fleet) -> None:
    """Whoever reaches it approves as that VM."""
    network = f"{fleet.project.name}_metadata-1"
    template = f'{{{{(index .NetworkSettings.Networks "{network}").IPAddress}}}}'
    address = fleet.project.inspect("metadata-publisher", template)
    vm, *_ = compose_layout().on("host-1")
    assert _reaches(fleet, "host-1", vm.metadata_host, vm.port) == "reached"
    assert _reaches(fleet, "host-1", address, vm.port) == "reached"
    for service in ("host-2", "metrics-exporter", "coordinator", "rollout"):
        assert _reaches(fleet, service, vm.metadata_host, vm.port) == "gaierror", service
        assert _reaches(fleet, service, address, vm.port) in {"TimeoutError", "OSError"}, service
        # Its address on the network that all share: nothing of a VM is there.
        refused = _reaches(fleet, service, "metadata-publisher", vm.port)
        assert refused == "ConnectionRefusedError", service


def _reaches(fleet: Fleet, service: str, address: str, port: int) -> str:
    """What comes of a connection from a service's container: reached, or the error's name."""
    code = (
        "import socket\n"
        "try:\n"
        f"    socket.create_connection(({address!r}, {port}), timeout=2).close()\n"
        "    print('reached')\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
    )
    return fleet.project.run("exec", "-T", service, "python", "-c", code).out.strip()


def test_a_full_tmp_kills_nothing(fleet: Fleet) -> None:
    fill = ("sh", "-c", "dd if=/dev/zero of=/tmp/full bs=1M count=600; rm /tmp/full")
    before = fleet.workloads()
    for service in ("host-1", "broker", "metrics-exporter"):
        said = fleet.project.run("exec", "-T", service, *fill)
        assert "No space left on device" in said.err, service
        assert fleet.project.inspect(service, "{{.State.OOMKilled}} {{.RestartCount}}") == "false 0", service
    assert fleet.workloads() == before


def test_the_broker_is_away_for_ten_seconds_in_a_pause(fleet: Fleet) -> None:
    rollout = roll(fleet, "firmware-load")
    with fleet.watched() as watch:
        frozen(fleet)
        gone = time.monotonic()
        fleet.project.run("stop", "broker")
        until(lambda: time.monotonic() > gone + 10.0, 20.0, lambda: "ten seconds pass")
        assert fleet.frozen() == [], "resumed without the broker"
        fleet.project.run("start", "broker")
        fleet.completed(rollout)
    until(lambda: fleet.frozen() == [], 5.0, lambda: "nothing stands still")
    assert {each.vm for each in watch.seen} == set(fleet.workloads())
    longest = max(each.until - each.since for each in watch.seen)
    assert longest < _BUDGET_S
    assert _one_domain_at_a_time(watch.together)


def test_without_an_approval_the_notice_is_waited_for(fleet: Fleet) -> None:
    fleet.project.run("stop", "metadata-publisher")
    words = ("freeze", "--vm", "batch-1", "--for", "1s", "--detach", "--notice", "12s", "--soak", "1s")
    code, told, said = fleet.caesura(*words)
    assert code == 0, (told, said)
    waiting = "caesura_event_not_before_timestamp_seconds"
    until(lambda: bool(fleet.query(waiting)), 12.0, lambda: "Prometheus sees an event that has not started")
    assert fleet.frozen() == []
    state = fleet.completed(told["rollout"])
    fleet.project.run("start", "metadata-publisher")
    (wave,) = state["waves"]
    assert wave["approved"] == []
    assert datetime.fromisoformat(wave["started_at"]) >= datetime.fromisoformat(wave["not_before"])


async def test_every_query_of_dashboards_and_rules_has_data(fleet: Fleet) -> None:
    """Asked after the longer update and the long notice: what shows something while it lasts has seen it by now."""
    dashboards = sorted((_ROOT / "grafana" / "dashboards").glob("*.json"))
    assert dashboards
    async with api(fleet.prometheus_url) as prometheus:
        wrong = await problems(prometheus, dashboards, since=time.time() - _STORY_S)
    assert wrong == []


def test_the_coordinator_is_killed_twice_in_a_rollout(fleet: Fleet) -> None:
    rollout = roll(fleet, "hypervisor-patch")
    with fleet.watched() as watch:
        frozen(fleet)
        restarts = int(fleet.project.inspect("coordinator", "{{.RestartCount}}"))
        # Its process, not the container: that one comes back by itself.
        _kill(fleet, "coordinator", "caesura-coordinator")
        until(
            lambda: int(fleet.project.inspect("coordinator", "{{.RestartCount}}")) > restarts,
            30.0,
            lambda: "the engine starts it again",
        )
        until(lambda: fleet.frozen() == [], 20.0, lambda: "the first wave is resumed")
        frozen(fleet)
        fleet.project.run("kill", "coordinator")
        fleet.project.run("up", "-d", "--no-deps", "coordinator")
        fleet.completed(rollout)
    until(lambda: fleet.frozen() == [], 5.0, lambda: "nothing stands still")
    assert {each.vm for each in watch.seen} == set(fleet.workloads())
    assert max(each.until - each.since for each in watch.seen) < _BUDGET_S
    assert _one_domain_at_a_time(watch.together)


def test_a_host_updater_is_killed_in_a_pause_and_its_vms_live_on(fleet: Fleet) -> None:
    vms = fleet.workloads()
    rollout = roll_as_the_service(fleet, "firmware-load")
    with fleet.watched() as watch:
        frozen(fleet)
        stopped = {pid for pid in vms.values() if is_stopped(pid)}
        host = next(host for host in HOSTS if stopped & set(fleet.project.processes(host)))
        _kill(fleet, host, "caesura-host-updater")
        until(
            lambda: not any(is_stopped(pid) for pid in stopped),
            _BUDGET_S,
            lambda: f"the guard resumes {host}",
        )
        assert fleet.workloads() == vms, "the same processes: no VM was lost with the updater"
        said = len(fleet.project.logs("rollout"))
        fleet.project.run("restart", "rollout")  # it would look again when its next one is due
        until(
            lambda: "rollout.resuming" in fleet.project.logs("rollout")[said:],
            60.0,
            lambda: "the service resumes it",
        )
        until(lambda: fleet.rollouts()[rollout]["status"] == "completed", 90.0, lambda: "it completes")
    assert max(each.until - each.since for each in watch.seen) < _BUDGET_S
    assert _one_domain_at_a_time(watch.together)
    by_guard = "sum(caesura_pauses_resumed_by_guard_total)"
    until(
        lambda: any(count >= 1.0 for count in fleet.query(by_guard).values()), 15.0, lambda: "it is counted"
    )
    named = f'max by (host) (caesura_host_guard_resume_age_seconds{{host="{host}"}})'
    until(lambda: (host,) in fleet.query(named), 15.0, lambda: "Prometheus names the host")


def test_stop_in_a_pause_leaves_nothing_frozen_and_up_goes_on(fleet: Fleet) -> None:
    said = {host: len(fleet.project.logs(host)) for host in HOSTS}
    rollout = roll_as_the_service(fleet, "firmware-load")
    with fleet.watched() as watch:
        frozen(fleet)
        assert fleet.frozen()
        asked = time.monotonic()
        fleet.project.run("stop")
    told = "".join(fleet.project.logs(host)[said[host] :] for host in HOSTS)
    assert any(each.until > asked for each in watch.seen), "a pause was under way"
    for vm in {each.vm for each in watch.seen}:
        (line,) = [line for line in told.splitlines() if "pause.finished" in line and f'"vm": "{vm}"' in line]
        assert '"resumed_by": "updater", "end": "running"' in line, "resumed, then stopped"
    assert max(each.until - each.since for each in watch.seen) < _BUDGET_S
    for host in HOSTS:
        assert fleet.project.inspect(host, "{{.State.Status}} {{.State.ExitCode}}") == "exited 0", (
            "drained, not killed"
        )

    fleet.project.up()

    until(
        lambda: fleet.rollouts()[rollout]["status"] == "completed",
        180.0,
        lambda: (
            f"the service goes on with it: {fleet.rollouts()[rollout]}; {fleet.project.logs('rollout')[-3000:]}"
        ),
    )
    assert fleet.frozen() == []


def test_down_and_up_again_forgets_nothing(fleet: Fleet) -> None:
    rollouts, known = fleet.rollouts(), incarnations(fleet)
    assert set(known) == {"web", "db", "_batch-1"}

    fleet.project.run("down")
    assert fleet.project.container("host-1") == ""
    left = set(fleet.project.engine.run("volume", "ls", "-q").out.split())
    assert left <= {f"{fleet.project.name}_{name}" for name in _VOLUMES}, "and none without a name"
    fleet.project.up()

    after = incarnations(fleet)
    assert all(after[name] >= number for name, number in known.items()), (known, after)
    assert set(rollouts) <= set(fleet.rollouts())
    # The service starts its first rollout: its events count on from there.
    until(lambda: bool(set(fleet.rollouts()) - set(rollouts)), 60.0, lambda: "a rollout starts")
    until(
        lambda: all(number > known[name] for name, number in incarnations(fleet).items()),
        90.0,
        lambda: f"incarnations rise above {known}: {incarnations(fleet)}",
    )
    past = fleet.query("sum(max_over_time(caesura_pause_seconds_count[30m]))")
    assert next(iter(past.values())) >= _VMS, "Prometheus kept what it had"


def test_up_helps_while_services_are_not_well(fleet: Fleet) -> None:
    """What docs/compose.md says after a kill by hand."""
    fleet.project.run("kill", "broker", "rollout")
    health = "{{.State.Health.Status}}"
    until(
        lambda: fleet.project.inspect("host-3", health) == "unhealthy",
        90.0,
        lambda: "a host that misses its broker for long",
    )

    fleet.project.run("up", "-d", *fleet.project.services)

    assert fleet.project.inspect("rollout", "{{.State.Running}}") == "true"
    until(
        lambda: all(fleet.project.inspect(host, health) == "healthy" for host in HOSTS),
        60.0,
        lambda: "all are well again",
    )


def test_a_wrong_value_is_said_and_nothing_starts(fleet: Fleet) -> None:
    (fleet.project.folder / ".env").write_text("CAESURA_ROLLOUTS=no\n")
    try:
        failed = fleet.project.up(check=False)
        assert failed.code != 0
        said = fleet.project.logs("setup").strip().splitlines()[-1]
        assert "CAESURA_ROLLOUTS=no: it is on or off. Correct it in .env" in said
        assert fleet.project.inspect("rollout", "{{.RestartCount}}") == "0"
    finally:
        (fleet.project.folder / ".env").unlink()
    fleet.project.up()


def test_a_wrong_broker_password_is_said_and_nothing_restarts_in_a_loop(fleet: Fleet) -> None:
    """A renewed secret, which the broker does not know before it starts anew: what docs/compose.md says of it."""
    fleet.project.run("run", "--rm", "setup", "/etc/caesura", "--renew", "exporter")
    fleet.project.run("restart", "metrics-exporter")
    refused = "the broker refused the connection: Not authorized"

    until(
        lambda: refused in fleet.project.logs("metrics-exporter"),
        30.0,
        lambda: f"it says so: {fleet.project.logs('metrics-exporter')[-2000:]}",
    )

    connected = 'caesura_bus_connected{service="metrics-exporter"}'
    until(lambda: 0.0 in fleet.query(connected).values(), 30.0, lambda: "Prometheus sees it")
    assert fleet.project.inspect("metrics-exporter", "{{.State.Running}} {{.RestartCount}}") == "true 0"

    fleet.project.up("--force-recreate")

    until(
        lambda: 1.0 in fleet.query(connected).values(),
        30.0,
        lambda: "the advice of docs/compose.md helps",
    )


def test_a_broken_secret_is_named_and_how_to_make_it_anew(fleet: Fleet) -> None:
    fleet.project.run("stop")
    damage = ("run", "--rm", "--no-deps", "-T", "--entrypoint", "python", "setup", "-c")
    code = "import os; p = '/etc/caesura/secrets/exporter'; os.unlink(p); open(p, 'w').write('x')"
    fleet.project.run(*damage, code)

    failed = fleet.project.up(check=False)

    assert failed.code != 0
    said = fleet.project.logs("setup").strip().splitlines()[-1]
    assert "/etc/caesura/secrets/exporter is broken" in said
    advice = "docker compose run --rm setup /etc/caesura --renew exporter"
    assert advice in said
    assert fleet.project.inspect("broker", "{{.State.Running}}") == "false", "nothing starts on it"
    fleet.project.run(*advice.split()[2:])
    fleet.project.up("--force-recreate")


def _kill(fleet: Fleet, service: str, command: str) -> None:
    """The service's process, not its init: SIGKILL."""
    (pid,) = [pid for pid in fleet.project.processes(service) if _runs(pid, command)]
    os.kill(pid, signal.SIGKILL)


def _runs(pid: int, command: str) -> bool:
    """Whether a process is Python with this command."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):  # a health check that was over meanwhile
        return False
    return "python" in words[0] and len(words) > 1 and words[1].endswith(f"/{command}")


def _one_domain_at_a_time(together: list[frozenset[str]]) -> bool:
    """Whether no two VMs of different update domains of a set stood still at once. web-1 and web-2 are domain 0, ..."""
    for vms in together:
        for name in ("web", "db"):
            numbers = [int(vm.rpartition("-")[2]) for vm in vms if vm.startswith(f"{name}-")]
            if len({(number - 1) // 2 if name == "web" else number for number in numbers}) > 1:
                return False
    return True
