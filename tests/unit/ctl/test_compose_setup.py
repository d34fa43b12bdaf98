"""What the compose project is made of: its fleet, its secrets, and the loop that rolls out."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.contract.access import access_rules
from caesura.runtime.logs import configure_logging, flush_logs
from caesura.runtime.settings import Secret
from caesura_demo.compose_fleet import (
    HEALTH_USER,
    UPDATES,
    compose_layout,
    config_files,
    secret_readers,
    users,
)
from caesura_demo.resume_policy import (
    MOST_RESUMES,
    RESUME_AFTER_S,
    HaltSnapshot,
    HostFacts,
    NextAction,
    ResumeHistory,
    facts_from,
    next_action,
    update_for,
)
from caesura_demo.rollout_loop import LoopSettings, Rollouts, RolloutsError, settings_from
from caesura_demo.setup import SetupError, check_variables, copy_files, main, prepare
from caesura_host_updater.inventory.host_config import parse_host_file
from caesura_host_updater.inventory.updates import UpdateFile, parse_update
from caesura_metadata_publisher.listeners import parse_listeners
from caesura_testing.broker import mosquitto, mosquitto_installed
from caesura_testing.fleet import until
from caesura_testing.patience import patient

_HOSTS = tuple(HostFacts(f"host-{number}", online=True, guard="ready") for number in (1, 2, 3))


def facts(**changes: Any) -> HaltSnapshot:
    return HaltSnapshot(**{"coordinator_online": True, "hosts": _HOSTS, **changes})


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
        assert read.options.freezer == "sigstop"
        assert [vm.name for vm in read.vm] == [vm.name for vm in layout.on(host)]
        for table in tomllib.loads(files[f"{host}.toml"])["vm"]:
            agent, workload = (each["environ"] for each in table["process"])
            assert agent["CAESURA_VM_AGENT_BROKER_USERNAME"] == f"vm_{table['name']}"
            assert agent["CAESURA_VM_AGENT_BROKER_PASSWORD_FILE"] == f"/s/vm_{table['name']}"
            assert workload["CAESURA_DEMO_URL"].startswith(f"http://metadata-of-{host}:181")
    host_of = {vm.name: vm.host for vm in layout.vms}
    listeners = parse_listeners(files["listeners.toml"], "listeners.toml")
    assert {each.vm for each in listeners} == set(host_of)
    assert all(each.listen.startswith(f"metadata-of-{host_of[each.vm]}:") for each in listeners)
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


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"CAESURA_ROLLOUTS": "no"}, "CAESURA_ROLLOUTS=no: it is on or off. Correct it in .env"),
        ({"CAESURA_ROLLOUT_PAUSE": "1m"}, "CAESURA_ROLLOUT_PAUSE=1m: it is a number of seconds"),
    ],
)
def test_a_wrong_value_is_said_before_anything_starts(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SetupError, match=said):
        check_variables(environ)


def test_files_of_the_image_are_copied_for_everybody_and_old_ones_go(tmp_path: Path) -> None:
    source, folder = tmp_path / "image", tmp_path / "config"
    for name in ("prometheus/rules/a.yml", "prometheus/rules/b.yml", "broker/mosquitto.conf"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
        (source / name).chmod(0o600)
    prepare(folder, state="/v")
    copy_files(source, folder)
    (source / "prometheus/rules/a.yml").rename(source / "prometheus/rules/c.yml")
    copy_files(source, folder)
    assert {path.name for path in (folder / "prometheus").rglob("*.yml")} == {"b.yml", "c.yml"}
    assert stat.S_IMODE((folder / "prometheus" / "rules" / "b.yml").stat().st_mode) == 0o444
    assert {path.name for path in (folder / "broker").iterdir()} == {
        "acl",
        "mosquitto.conf",
        "mosquitto_sub",
        "passwords",
    }


def test_the_command_says_why_on_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [each for each in os.environ if each.startswith("CAESURA_")]:
        monkeypatch.delenv(name)
    file = tmp_path / "file"
    file.write_text("")
    assert main([str(file / "below")]) == 2
    flush_logs()
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

_LAYOUT_HOSTS = tuple(each.name for each in _HOSTS)
_AWAY = "cannot continue: host-2 is offline"
_AWAY_CODES = ("host_offline",)


def step_for(known: HaltSnapshot, **past: Any) -> NextAction:
    return next_action(known, client="rollout", hosts=_LAYOUT_HOSTS, past=ResumeHistory(**past))


def halted(reason: str = _AWAY, codes: tuple[str, ...] = _AWAY_CODES, **changes: Any) -> HaltSnapshot:
    return facts(
        **{
            "status": "halted",
            "rollout": "r",
            "reason": reason,
            "codes": codes,
            "requested_by": "rollout",
            **changes,
        }
    )


def test_all_well_and_nothing_under_way_rolls() -> None:
    assert step_for(facts()).what == "roll"
    assert step_for(facts(status="completed", rollout="r")).what == "roll"


@pytest.mark.parametrize("status", ["running", "aborting"])
def test_what_is_under_way_is_watched_whatever_is_missing(status: str) -> None:
    step = step_for(facts(status=status, rollout="r", hosts=()))
    assert (step.what, step.rollout) == ("watch", "r")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"coordinator_online": False}, "the coordinator is not on the bus"),
        ({"hosts": _HOSTS[:2]}, "host-3 was never on the bus"),
        ({"hosts": (*_HOSTS[:2], HostFacts("host-3", online=False, guard="ready"))}, "host-3 is offline"),
        (
            {"hosts": (*_HOSTS[:2], HostFacts("host-3", online=True, guard="absent"))},
            "host-3 has no pause guard",
        ),
    ],
)
def test_what_is_missing_is_waited_for_by_name(changes: dict[str, Any], why: str) -> None:
    step = step_for(facts(**changes))
    assert (step.what, step.why) == ("wait", why)
    step = step_for(halted(**changes), halted_s=1000.0)
    assert step.what == "wait"
    assert why in step.why


def test_a_halted_rollout_is_resumed_later_each_time_and_then_left_to_a_person() -> None:
    for resumed, after_s in enumerate(RESUME_AFTER_S):
        step = step_for(halted(), resumed=resumed, halted_s=after_s - 0.1)
        assert (step.what, step.why) == ("wait", f"halted: {_AWAY}; resumed {after_s:g} s after it halted")
        step = step_for(halted(), resumed=resumed, halted_s=after_s)
        assert (step.what, step.rollout, step.why) == ("resume", "r", f"halted: {_AWAY}")
    assert list(RESUME_AFTER_S) == sorted(RESUME_AFTER_S)
    assert RESUME_AFTER_S[-1] > 90.0, "beyond the broker's will for a host that hangs"
    step = step_for(halted(), resumed=MOST_RESUMES, halted_s=10_000.0)
    assert step.what == "leave"
    assert f"resumed {MOST_RESUMES} times" in step.why


def test_what_is_no_matter_of_being_away_is_left_to_a_person_at_once() -> None:
    reason = "web-1 changed in memory during the pause: a is not b"
    step = step_for(halted(reason, ("memory_changed",)), halted_s=10_000.0)
    assert (step.what, step.why) == ("leave", f"halted: {reason}; that is for a person to judge")
    assert step.how == "docker compose run --rm caesura resume r   (or abort)"


def test_what_a_person_started_is_theirs() -> None:
    step = step_for(halted(requested_by="ops"), halted_s=10_000.0)
    assert (step.what, step.why) == ("leave", f"halted: {_AWAY}; ops started it")


def test_after_an_abort_nothing_is_rolled_until_told_so() -> None:
    aborted = facts(status="aborted", rollout="r", reason="aborted: wrong update", requested_by="rollout")
    step = step_for(aborted, found="before")
    assert (step.what, step.rollout) == ("leave", "r")
    assert step.why == "aborted: wrong update; nothing is rolled out until you say so"
    assert step.how == "docker compose restart rollout"
    assert step_for(aborted, found="r").what == "roll", "whoever starts us after that says so"


def test_facts_are_read_from_what_the_command_prints() -> None:
    document = {
        "coordinator": {"online": True, "epoch": 3},
        "hosts": [{"online": True, "inventory": {"host": "host-1", "guard": "armed"}}],
        "rollout": {
            "rollout": "r",
            "status": "halted",
            "reason": "why",
            "requested_by": "ops",
            "waves": [{"status": "completed"}, {"status": "failed"}, {"status": "pending"}],
        },
    }
    assert facts_from(document) == HaltSnapshot(
        coordinator_online=True,
        hosts=(HostFacts("host-1", online=True, guard="armed"),),
        rollout="r",
        status="halted",
        reason="why",
        requested_by="ops",
        waves_done=1,
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
        settings_from(environ)


def test_values_as_they_are_given() -> None:
    assert settings_from({}) == LoopSettings(on=True, pause_s=20.0, client="")
    given = {"CAESURA_ROLLOUTS": "OFF", "CAESURA_ROLLOUT_PAUSE": "1.5", "CAESURA_CTL_CLIENT": "rollout"}
    assert settings_from(given) == LoopSettings(on=False, pause_s=1.5, client="rollout")


_SCRIPT = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
log = folder / "log"
with log.open("a") as file:
    file.write(sys.argv[2] + "\\n")
told = json.loads((folder / "told.json").read_text())
now = {"rollout": "r1", "update": "patch", "reason": told.get("reason", ""), "requested_by": "rollout"}
now |= {"codes": told.get("codes", ())}
now |= {"status": told["status"], "waves": [{"status": "completed"}] * told.get("waves", 0)}
if sys.argv[2] == "status":
    host = {"online": True, "inventory": {"host": "host-1", "guard": "ready"}}
    rollout = now if told["status"] else None
    print(json.dumps({"coordinator": {"online": True}, "hosts": [host], "rollout": rollout}))
    sys.exit()
if told.get("refuses"):
    print(json.dumps({"accepted": False, "reason": "not yet"}))
    sys.exit(told["refuses"])
(folder / "told.json").write_text(json.dumps(told["then"]))
print(json.dumps({"rollout": now | {"status": told["then"]["status"]}, "pauses": []}))
sys.exit(told["then"]["status"] != "completed")
"""


class Play:
    """The loop against a command that tells what a test says; every second of the clock is the test's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.now = 0.0
        (folder / "caesura.py").write_text(_SCRIPT)
        self.rollouts = Rollouts(
            LoopSettings(on=True, pause_s=20.0, client="rollout"),
            command=(sys.executable, str(folder / "caesura.py"), str(folder)),
            hosts=("host-1",),
            look_again_s=5.0,
            clock=lambda: self.now,
        )

    def tell(self, **told: Any) -> None:
        (self._folder / "told.json").write_text(json.dumps(told))

    def step(self, after_s: float = 0.0) -> str:
        """One look, and what it did besides looking."""
        self.now += after_s
        log = self._folder / "log"
        log.write_text("")
        self.rollouts.once()
        return " ".join(log.read_text().split()[1:])


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path)


_HALTED = {"status": "halted", "reason": _AWAY, "codes": _AWAY_CODES}


def test_it_rolls_and_resumes_later_each_time(play: Play) -> None:
    play.tell(status="", then={**_HALTED, "then": {**_HALTED, "then": {**_HALTED, "then": _HALTED}}})
    assert play.step() == "roll"
    for after_s in RESUME_AFTER_S:
        assert play.step() == ""
        assert play.step(after_s - 1.0) == ""
        assert play.step(1.0) == "resume"
    assert play.step() == ""
    assert play.step(10_000.0) == "", "left to a person"


@pytest.mark.parametrize("code", [3, 5])
def test_a_resume_that_was_not_accepted_does_not_count(play: Play, code: int) -> None:
    play.tell(**_HALTED, refuses=code)
    assert play.step() == ""
    assert [play.step(10.0) for _ in range(MOST_RESUMES + 1)] == ["resume"] * (MOST_RESUMES + 1)


def test_a_wave_that_completed_is_the_end_of_the_count(play: Play) -> None:
    play.tell(**_HALTED, then={**_HALTED, "waves": 1, "then": _HALTED})
    assert play.step() == ""
    assert play.step(10.0) == "resume"
    assert play.step() == ""
    assert play.step(10.0) == "resume", "as for the first time"


def test_what_was_aborted_is_left_and_a_new_start_goes_on(play: Play, tmp_path: Path) -> None:
    play.tell(status="", then={"status": "aborted", "reason": "aborted: wrong update"})
    assert play.step() == "roll"
    assert play.step(10_000.0) == ""
    again = Play(tmp_path)
    again.tell(status="aborted", reason="aborted: wrong update", then={"status": "completed"})
    assert again.step() == "roll"


def test_what_is_aborted_while_it_watches_is_left_whoever_began_it(play: Play) -> None:
    play.tell(status="running", then={"status": "aborted", "reason": "aborted: wrong update"})
    assert play.step() == "watch"
    assert play.step(10_000.0) == ""


def _in_thread(rollouts: Rollouts) -> threading.Thread:
    running = threading.Thread(target=rollouts.run)
    running.start()
    return running


def test_it_ends_when_told(play: Play, tmp_path: Path) -> None:
    play.tell(status="", then={"status": "completed"})
    running = _in_thread(play.rollouts)
    try:
        until(lambda: "roll" in _log(tmp_path), 20.0, lambda: "it rolls")
    finally:
        play.rollouts.stop()
        running.join(timeout=patient(20))
    assert not running.is_alive()
    assert _log(tmp_path) == ["status", "roll"]


def _log(folder: Path) -> list[str]:
    return (folder / "log").read_text().split() if (folder / "log").exists() else []


def test_a_configuration_that_the_command_refuses_ends_it(tmp_path: Path) -> None:
    script = tmp_path / "caesura.py"
    script.write_text("import sys; print('caesura: unknown setting X', file=sys.stderr); sys.exit(2)")
    rollouts = Rollouts(LoopSettings(on=True, pause_s=0.0, client=""), command=(sys.executable, str(script)))
    with pytest.raises(RolloutsError, match="unknown setting X"):
        rollouts.run()


def test_switched_off_it_waits_to_be_told_to_stop(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("rollout")
    used = tmp_path / "used"
    rollouts = Rollouts(
        LoopSettings(on=False, pause_s=0.0, client=""),
        command=(sys.executable, "-c", f"open({str(used)!r}, 'w')"),
        look_again_s=0.0,
    )
    running = _in_thread(rollouts)
    said = ""

    def says_so() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "rollouts.off" in said

    try:
        until(says_so, 20.0, lambda: "it says that it is off")
        assert running.is_alive()
    finally:
        rollouts.stop()
        running.join(timeout=patient(20))
    assert not running.is_alive()
    assert not used.exists()


def test_a_signal_stops_it_while_it_waits(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "caesura_demo.rollout_loop"],
        env={**os.environ, "CAESURA_ROLLOUTS": "off"},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr is not None
        assert "rollouts.off" in process.stderr.readline()
        process.terminate()
        assert process.wait(patient(20)) == 0
