"""What the compose project is made of: its fleet, its secrets, and the loop that rolls out."""

from __future__ import annotations

import asyncio
import stat
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.contract.access import access_rules
from caesura.runtime.settings import Secret
from caesura.testing.broker import mosquitto, mosquitto_installed
from caesura.testing.fleet import until
from caesura_ctl.demo.fleet import HEALTH_USER, UPDATES, compose_layout, config_files, secret_readers, users
from caesura_ctl.demo.patience import MOST_RESUMES, Facts, HostFacts, facts_from, next_step, update_for
from caesura_ctl.demo.rollouts import Plan, Rollouts, RolloutsError, plan_from
from caesura_ctl.demo.setup import SetupError, check_variables, main, prepare
from caesura_host_updater.hostfile import parse_host_file
from caesura_host_updater.updates import UpdateFile, parse_update
from caesura_metadata_publisher.listeners import parse_listeners

_HOSTS = tuple(HostFacts(f"host-{number}", online=True, guard="ready") for number in (1, 2, 3))


def facts(**changes: Any) -> Facts:
    return Facts(**{"coordinator_online": True, "hosts": _HOSTS, **changes})


def names(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "secrets").iterdir()}


# -- the fleet --


def test_no_host_holds_two_domains_of_a_set_and_domains_are_not_hosts() -> None:
    layout = compose_layout()
    places: dict[tuple[str, str], set[int]] = {}
    for vm in layout.vms:
        if vm.set:
            places.setdefault((vm.host, vm.set), set()).add(vm.update_domain)
    assert all(len(domains) == 1 for domains in places.values())
    assert {name for _, name in places} == {"web", "db"}
    for name in ("web", "db"):
        assert {domain for (_, of), domains in places.items() if of == name for domain in domains} == {
            0,
            1,
            2,
        }
    assert all(places[host, "web"] != places[host, "db"] for host in layout.hosts)


def test_the_files_are_accepted_by_those_who_read_them() -> None:
    layout = compose_layout()
    files = config_files(layout, secrets="/s", state="/v")
    for host in layout.hosts:
        read = parse_host_file(files[f"{host}.toml"], host)
        assert read.process.freezer == "sigstop"
        assert [vm.name for vm in read.vm] == [vm.name for vm in layout.on(host)]
        for table in tomllib.loads(files[f"{host}.toml"])["vm"]:
            agent, workload = (each["environ"] for each in table["process"])
            assert agent["CAESURA_VM_AGENT_BROKER_USERNAME"] == f"vm_{table['name']}"
            assert agent["CAESURA_VM_AGENT_BROKER_PASSWORD_FILE"] == f"/s/vm_{table['name']}"
            assert workload["CAESURA_DEMO_URL"].startswith("http://metadata-publisher:181")
    assert len(parse_listeners(files["listeners.toml"], "listeners.toml")) == len(layout.vms)
    for name in UPDATES:
        update = parse_update(name, files[f"updates.d/{name}.toml"], find=lambda program: program)
        assert isinstance(update, UpdateFile)
        assert update.name == name
    assert files["broker/acl"] == access_rules(user.principal for user in users(layout))
    assert HEALTH_USER not in files["broker/acl"], "it may log in and do nothing"


def test_agents_of_a_host_are_read_by_that_host_alone() -> None:
    readers = secret_readers(compose_layout())
    for vm in compose_layout().vms:
        assert readers[f"vm_{vm.name}"] == readers[f"host_{vm.host}"]
    hosts = [uid for name, uid in readers.items() if name.startswith("host_")]
    assert len(set(hosts)) == 3


# -- secrets --


def test_secrets_are_made_once_kept_and_all_different(tmp_path: Path) -> None:
    prepare(tmp_path, state="/v")
    first = names(tmp_path)
    assert set(first) == set(secret_readers(compose_layout()))
    assert len(set(first.values())) == len(first)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o440 for path in (tmp_path / "secrets").iterdir())
    assert stat.S_IMODE((tmp_path / "broker" / "passwords").stat().st_mode) == 0o400

    prepare(tmp_path, state="/v")
    assert names(tmp_path) == first


def test_a_missing_secret_is_made_and_the_others_are_kept(tmp_path: Path) -> None:
    prepare(tmp_path, state="/v")
    first = names(tmp_path)
    (tmp_path / "secrets" / "exporter").unlink()
    prepare(tmp_path, state="/v")
    changed = {name for name, text in names(tmp_path).items() if text != first[name]}
    assert changed == {"exporter"}


@pytest.mark.parametrize(
    "content", [b"", b"short", b"\xff\xfe" * 12, "p\u00e4ssword of some length".encode()]
)
def test_a_broken_secret_is_named_with_what_to_do_and_nothing_is_touched(
    content: bytes, tmp_path: Path
) -> None:
    prepare(tmp_path, state="/v")
    (tmp_path / "secrets" / "host_host-2").chmod(0o600)
    (tmp_path / "secrets" / "host_host-2").write_bytes(content)
    before = (tmp_path / "broker" / "passwords").read_text()

    with pytest.raises(
        SetupError, match=r"host_host-2 .*docker compose run --rm setup \S+ --renew host_host-2"
    ):
        prepare(tmp_path, state="/v")

    assert (tmp_path / "broker" / "passwords").read_text() == before
    prepare(tmp_path, state="/v", renew=["host_host-2"])


def test_a_secret_nobody_has_cannot_be_renewed(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no secret is named nonsense; there are coordinator"):
        prepare(tmp_path, state="/v", renew=["nonsense"])


def test_a_misspelt_variable_is_named_with_the_nearest_one() -> None:
    with pytest.raises(SetupError, match="unknown variable CAESURA_ROLOUTS, did you mean CAESURA_ROLLOUTS"):
        check_variables({"CAESURA_ROLOUTS": "off", "PATH": "/bin"})
    check_variables({"CAESURA_ROLLOUTS": "off", "PATH": "/bin"})


def test_the_command_says_why_on_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CAESURA_ROLLOUTS", "CAESURA_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "file"
    file.write_text("")
    assert main([str(file / "below")]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "setup.failed" in line
    assert "Not a directory" in line


async def test_mosquitto_takes_the_passwords_and_the_rules(tmp_path: Path) -> None:
    if not mosquitto_installed():
        pytest.skip("mosquitto is not installed (on Debian: apt-get install mosquitto)")
    prepare(tmp_path / "made", state="/v")
    files = tmp_path / "made" / "broker"
    data = tmp_path / "data"
    data.mkdir()
    broker = mosquitto(data, users={}, acl=(files / "acl").read_text())
    (data / "passwords").write_text((files / "passwords").read_text())
    options = (files / "mosquitto_sub").read_text().split()
    assert options[::2] == ["-u", "-P"]
    async with broker:
        for user, password, welcome in (
            (options[1], options[3], True),
            ("coordinator", names(tmp_path / "made")["coordinator"].strip(), True),
            ("coordinator", names(tmp_path / "made")["exporter"].strip(), False),
        ):
            bus = MqttBus(
                BrokerOptions(
                    url=broker.url, protocol="5", client_id=user, username=user, password=Secret(password)
                ),
                filters=[],
            )
            assert await _connects(bus) is welcome, user


async def _connects(bus: Any) -> bool:
    async def nothing(_: Any) -> None:
        return

    running = asyncio.create_task(bus.run(nothing))
    try:
        return bool(await bus.wait_connected(1.5))
    finally:
        await bus.close()
        await running


# -- one rollout after another --


def test_all_well_and_nothing_under_way_rolls() -> None:
    assert next_step(facts(), client="rollout", resumed=0).what == "roll"
    assert next_step(facts(status="completed", rollout="r"), client="rollout", resumed=0).what == "roll"
    assert next_step(facts(status="aborted", rollout="r"), client="rollout", resumed=0).what == "roll"


@pytest.mark.parametrize("status", ["running", "aborting"])
def test_what_is_under_way_is_watched_whatever_is_missing(status: str) -> None:
    step = next_step(facts(status=status, rollout="r", hosts=()), client="rollout", resumed=0)
    assert (step.what, step.rollout) == ("watch", "r")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"coordinator_online": False}, "the coordinator is not on the bus"),
        ({"hosts": ()}, "no host is on the bus"),
        ({"hosts": (*_HOSTS[:2], HostFacts("host-3", online=False, guard="ready"))}, "host-3 is offline"),
        (
            {"hosts": (*_HOSTS[:2], HostFacts("host-3", online=True, guard="absent"))},
            "host-3 has no pause guard",
        ),
    ],
)
def test_what_is_missing_is_waited_for_by_name(changes: dict[str, Any], why: str) -> None:
    step = next_step(facts(**changes), client="rollout", resumed=0)
    assert (step.what, step.why) == ("wait", why)
    halted = {"status": "halted", "rollout": "r", "reason": "why", "requested_by": "rollout"}
    step = next_step(facts(**halted, **changes), client="rollout", resumed=0)
    assert step.what == "wait"
    assert why in step.why


def test_a_halted_rollout_is_resumed_some_times_and_then_left_to_a_person() -> None:
    halted = facts(status="halted", rollout="r", reason="host-2 did not report", requested_by="rollout")
    for resumed in range(MOST_RESUMES):
        step = next_step(halted, client="rollout", resumed=resumed)
        assert (step.what, step.rollout) == ("resume", "r")
        assert "host-2 did not report" in step.why
    step = next_step(halted, client="rollout", resumed=MOST_RESUMES)
    assert step.what == "leave"
    assert f"resumed {MOST_RESUMES} times" in step.why


def test_what_a_person_started_is_theirs() -> None:
    halted = facts(status="halted", rollout="r", reason="why", requested_by="ops")
    step = next_step(halted, client="rollout", resumed=0)
    assert (step.what, step.why) == ("leave", "halted: why; ops started it")


def test_facts_are_read_from_what_the_command_prints() -> None:
    document = {
        "coordinator": {"online": True, "epoch": 3},
        "hosts": [{"online": True, "inventory": {"host": "host-1", "guard": "armed"}}],
        "rollout": {"rollout": "r", "status": "halted", "reason": "why", "requested_by": "ops"},
    }
    assert facts_from(document) == Facts(
        coordinator_online=True,
        hosts=(HostFacts("host-1", online=True, guard="armed"),),
        rollout="r",
        status="halted",
        reason="why",
        requested_by="ops",
    )
    assert facts_from({"coordinator": None, "hosts": [], "rollout": None}) == facts(
        coordinator_online=False, hosts=()
    )


def test_updates_take_turns() -> None:
    assert [update_for(("a", "b"), count) for count in range(4)] == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"CAESURA_ROLLOUTS": "of"}, "CAESURA_ROLLOUTS=of: it is on or off"),
        ({"CAESURA_ROLLOUT_PAUSE": "soon"}, "CAESURA_ROLLOUT_PAUSE=soon: it is a number of seconds"),
        ({"CAESURA_ROLLOUT_PAUSE": "-1"}, "CAESURA_ROLLOUT_PAUSE=-1: it is a number of seconds"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_may_be(environ: dict[str, str], said: str) -> None:
    with pytest.raises(RolloutsError, match=said):
        plan_from(environ)


def test_values_as_they_are_given() -> None:
    assert plan_from({}) == Plan(on=True, pause_s=20.0, client="")
    given = {"CAESURA_ROLLOUTS": "OFF", "CAESURA_ROLLOUT_PAUSE": "1.5", "CAESURA_CTL_CLIENT": "rollout"}
    assert plan_from(given) == Plan(on=False, pause_s=1.5, client="rollout")


_SCRIPT = """
import json, pathlib, sys
log = pathlib.Path(sys.argv[1])
said = log.read_text().splitlines() if log.exists() else []
log.write_text("\\n".join([*said, sys.argv[2]]) + "\\n")
state = {"rollout": "r1", "update": "hypervisor-patch", "status": "completed", "reason": ""}
if sys.argv[2] == "status":
    steered = [each for each in said if each != "status"]
    now = {0: None, 1: state | {"status": "halted", "reason": "why"}}.get(len(steered), state)
    if now:
        now = now | {"requested_by": "rollout"}
    host = {"online": True, "inventory": {"host": "host-1", "guard": "ready"}}
    print(json.dumps({"coordinator": {"online": True}, "hosts": [host], "rollout": now}))
elif sys.argv[2] == "roll":
    print(json.dumps({"rollout": state | {"status": "halted", "reason": "why"}, "pauses": []}))
    print(json.dumps({"error": "NotCompleted", "reason": "halted", "exit_code": 1}), file=sys.stderr)
    sys.exit(1)
else:
    print(json.dumps({"rollout": state, "pauses": [{"pause_s": 2.0}]}))
"""


def test_it_rolls_survives_a_halt_and_ends_when_told(tmp_path: Path) -> None:
    script, log = tmp_path / "caesura.py", tmp_path / "log"
    script.write_text(_SCRIPT)
    rollouts = Rollouts(
        Plan(on=True, pause_s=3600.0, client="rollout"),
        command=(sys.executable, str(script), str(log)),
        look_again_s=0.0,
    )
    running = threading.Thread(target=rollouts.run)
    running.start()
    try:
        until(lambda: log.exists() and "resume" in log.read_text(), 20.0, lambda: "it resumes")
    finally:
        rollouts.stop()
        running.join(timeout=20)
    assert not running.is_alive()
    assert log.read_text().split() == ["status", "roll", "status", "resume"]


def test_a_configuration_that_the_command_refuses_ends_it(tmp_path: Path) -> None:
    script = tmp_path / "caesura.py"
    script.write_text("import sys; print('caesura: unknown setting X', file=sys.stderr); sys.exit(2)")
    rollouts = Rollouts(Plan(on=True, pause_s=0.0, client=""), command=(sys.executable, str(script)))
    with pytest.raises(RolloutsError, match="unknown setting X"):
        rollouts.run()


def test_switched_off_it_waits_to_be_told_to_stop() -> None:
    rollouts = Rollouts(Plan(on=False, pause_s=0.0, client=""), command=("/nonexistent",))
    rollouts.stop()
    rollouts.run()
