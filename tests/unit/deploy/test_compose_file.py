"""``docker-compose.yml`` and the Dockerfile, read as files: rights, ports, secrets, and that they fit the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from caesura.runtime.settings import ServiceSettings, read_settings
from caesura_coordinator.settings import CoordinatorSettings
from caesura_coordinator.store_options import check_store
from caesura_ctl.settings import CtlSettings
from caesura_demo.compose_fleet import GRAFANA_UID, STORE_SECRET, compose_layout, secret_readers, users
from caesura_demo.setup import VARIABLES
from caesura_host_updater.settings import HostUpdaterSettings
from caesura_metadata_publisher.settings import MetadataPublisherSettings
from caesura_metrics_exporter.settings import MetricsExporterSettings

_ROOT = Path(__file__).parents[3]
_TOOLS = Path(sys.executable).parent
_COMPOSE = (_ROOT / "docker-compose.yml").read_text(encoding="utf-8")
_DOCKERFILE = (_ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
_OURS: dict[str, tuple[str, type[ServiceSettings]]] = {
    "coordinator": ("CAESURA_COORDINATOR_", CoordinatorSettings),
    "host-1": ("CAESURA_HOST_UPDATER_", HostUpdaterSettings),
    "host-2": ("CAESURA_HOST_UPDATER_", HostUpdaterSettings),
    "host-3": ("CAESURA_HOST_UPDATER_", HostUpdaterSettings),
    "metadata-publisher": ("CAESURA_METADATA_PUBLISHER_", MetadataPublisherSettings),
    "metrics-exporter": ("CAESURA_METRICS_EXPORTER_", MetricsExporterSettings),
    "rollout": ("CAESURA_CTL_", CtlSettings),
    "caesura": ("CAESURA_CTL_", CtlSettings),
}
_HEALTH_PORTS = {
    "coordinator": 9301,
    "host-1": 9302,
    "host-2": 9302,
    "host-3": 9302,
    "metadata-publisher": 9303,
    "metrics-exporter": 9310,
}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(_COMPOSE)["services"]
    return found


def test_every_service_has_as_few_rights_as_it_can(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("cap_add", []) == (["CHOWN"] if name == "setup" else []), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"] is True, name
        assert service["mem_limit"], name
        assert service["pids_limit"], name
        assert "privileged" not in service, name
        assert not any("docker.sock" in str(each) for each in service.get("volumes", [])), name
    numbers = [service["user"] for service in services.values()]
    assert len(set(numbers)) == len(numbers)
    assert [name for name, service in services.items() if service["user"].startswith("0")] == ["setup"]
    assert services["setup"]["network_mode"] == "none"


def test_ports_are_published_on_this_machine_only_and_each_can_be_changed(services: dict[str, Any]) -> None:
    published = {name: port for name, service in services.items() for port in service.get("ports", [])}
    assert set(published) == {"broker", "metrics-exporter", "prometheus", "grafana"}
    for name, port in published.items():
        assert re.fullmatch(r"127\.0\.0\.1:\$\{CAESURA_PORT_[A-Z]+:-(\d+)\}:\1", port), name


def test_every_service_comes_back_and_is_waited_for(services: dict[str, Any]) -> None:
    once = {"setup", "caesura", "store"}
    for name, service in services.items():
        assert service["restart"] == ("no" if name in once else "unless-stopped")
        if name not in once | {"rollout"}:
            assert service["healthcheck"]["test"][0] == "CMD", name
    waits = services["rollout"]["depends_on"]
    assert {name for name, each in waits.items() if each["condition"] == "service_started"} == set(
        _HEALTH_PORTS
    ), "one that is not well must not keep `up` from starting the rest"
    for name in ("host-1", "host-2", "host-3"):
        drain_s = read_settings(HostUpdaterSettings, "X_", {"X_HOST_FILE": "x"}).drain_timeout_s
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > drain_s


@pytest.mark.parametrize("name", list(_OURS))
def test_the_environment_is_one_that_the_service_accepts(
    name: str, services: dict[str, Any], tmp_path: Path
) -> None:
    prefix, settings = _OURS[name]
    environ = dict(services[name]["environment"])
    given = f"{prefix}BROKER_PASSWORD_FILE"
    secret = Path(environ[given])
    environ[given] = str(tmp_path / secret.name)
    (tmp_path / secret.name).touch(mode=0o600)
    (tmp_path / secret.name).write_text("a password of some length")
    read = read_settings(settings, prefix, environ)

    user = {user.name: user for user in users(compose_layout())}[read.broker_username]
    assert secret == Path("/etc/caesura/secrets") / user.name
    assert services[name]["user"] == f"{user.uid}:{user.uid}", "the one that may read the secret"
    assert read.broker_url == "mqtt://broker:1883"
    if name in _HEALTH_PORTS:
        listen = environ.get(f"{prefix}HEALTH_LISTEN") or environ[f"{prefix}LISTEN"]
        assert listen == f"0.0.0.0:{_HEALTH_PORTS[name]}"
        assert services[name]["healthcheck"]["test"][-1] == f"http://127.0.0.1:{_HEALTH_PORTS[name]}/ready"


def test_prometheus_scrapes_the_services_where_they_listen(services: dict[str, Any]) -> None:
    text = (_ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    targets = {
        target
        for job in yaml.safe_load(text)["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    }
    assert targets == {f"{name}:{port}" for name, port in _HEALTH_PORTS.items()}


def test_the_second_coordinator_is_scraped_once_its_profile_was_started_and_not_before(
    services: dict[str, Any], tmp_path: Path
) -> None:
    """Where nobody started it nobody misses it; where it was started, it is missed while it is away."""
    text = (_ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    jobs = {job["job_name"]: job for job in yaml.safe_load(text)["scrape_configs"]}
    ((file,),) = ([Path(each) for each in found["files"]] for found in _discovered(jobs))
    (mount,) = (each for each in services["prometheus"]["volumes"] if each.startswith("store:"))
    assert mount == f"store:{file.parent}:ro"
    shell, option, script = services["store"]["command"]
    assert services["store"]["volumes"] == [f"store:{file.parent}"]
    done = subprocess.run(
        [shell, option, script.replace(str(file.parent), str(tmp_path))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {each.name for each in tmp_path.iterdir()} == {"postgresql", file.name}
    (group,) = json.loads((tmp_path / file.name).read_text(encoding="utf-8"))
    (known,) = jobs["caesura-coordinator"]["static_configs"]
    assert group == {"targets": ["coordinator-2:9301"], "labels": known["labels"]}
    assert services["coordinator-2"]["environment"]["CAESURA_COORDINATOR_HEALTH_LISTEN"] == "0.0.0.0:9301"


def _discovered(jobs: dict[str, Any]) -> list[Any]:
    """What Prometheus reads from files."""
    return [found for job in jobs.values() for found in job.get("file_sd_configs", [])]


def test_no_secret_is_in_a_file_of_ours(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for variable, value in (service.get("environment") or {}).items():
            if "PASSWORD" in variable:
                assert variable.endswith("_FILE"), name
                assert value.startswith("/etc/caesura/secrets/"), name
    readers = secret_readers(compose_layout())
    assert services["grafana"]["user"] == f"{GRAFANA_UID}:{GRAFANA_UID}"
    assert (
        readers[Path(services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"]).name]
        == GRAFANA_UID
    )


def test_every_variable_is_known_and_explained() -> None:
    used = set(re.findall(r"\$\{(CAESURA_\w+)", _COMPOSE))
    assert used == set(VARIABLES)
    example = (_ROOT / "deploy" / "compose" / "env.example").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"\$\{(CAESURA_\w+):-([^}]*)\}", _COMPOSE))
    assert dict(re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE)) == defaults
    page = (_ROOT / "docs" / "compose.md").read_text(encoding="utf-8")
    assert [name for name in VARIABLES if name not in page] == []


def test_nothing_is_mounted_from_the_checkout_and_what_is_needed_is_in_the_image(
    services: dict[str, Any],
) -> None:
    """A checkout's files are not for everybody to read everywhere (umask), nor is it always on the engine's machine."""
    for name, service in services.items():
        for volume in service.get("volumes", []):
            assert re.fullmatch(r"[a-z0-9-]+:/\S+", volume), (name, volume)
    copied = re.findall(r"^COPY (?:--chmod=\d+ )?(\S+) /usr/local/share/caesura/", _DOCKERFILE, re.MULTILINE)
    assert copied
    kept = [
        line[1:]
        for line in (_ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line[:1] == "!"
    ]
    for source in copied:
        assert (_ROOT / source).exists(), source
        assert any(each == source or each.startswith(f"{source}/") for each in kept), source


def test_memory_files_are_limited(services: dict[str, Any]) -> None:
    """What is written to a tmpfs counts as the container's memory."""
    for name, service in services.items():
        for mount in service.get("tmpfs", []):
            size = re.search(r"[:,]size=(\d+)m\b", mount)
            assert size is not None, (name, mount)
            assert int(size[1]) <= int(service["mem_limit"].removesuffix("m")) / 4, (name, mount)


def test_a_hosts_vms_share_a_network_with_the_publisher_alone(services: dict[str, Any]) -> None:
    networks = yaml.safe_load(_COMPOSE)["networks"]
    members: dict[str, set[str]] = {}
    for name, service in services.items():
        for network in service.get("networks", []):
            members.setdefault(network, set()).add(name)
    publisher = services["metadata-publisher"]["networks"]
    for host in compose_layout().hosts:
        network = f"metadata-{host.removeprefix('host-')}"
        assert members[network] == {host, "metadata-publisher"}
        assert networks[network] == {"internal": True}
        (alias,) = publisher[network]["aliases"]
        assert {vm.metadata_host for vm in compose_layout().on(host)} == {alias}
        assert alias not in services, "a name that this network alone knows"
    assert publisher["default"] is None


def test_setup_sees_the_variables_that_it_judges(services: dict[str, Any]) -> None:
    given, used = services["setup"]["environment"], services["rollout"]["environment"]
    assert given == {name: used[name] for name in VARIABLES if name in used}


def test_scripts_keep_their_line_ends_whatever_the_checkout_is_on() -> None:
    told = (_ROOT / ".gitattributes").read_text(encoding="utf-8").splitlines()
    assert {"*.sh text eol=lf", "*.conf text eol=lf"} <= set(told)


def test_upstream_versions_are_pinned(services: dict[str, Any]) -> None:
    for name, service in services.items():
        image = service["image"]
        assert image == "${CAESURA_IMAGE:-caesura:local}" or re.search(r":v?\d+\.\d+", image), name


def test_the_image_says_what_it_is() -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f'org.opencontainers.image.version="{project["version"]}"' in _DOCKERFILE
    assert f'org.opencontainers.image.licenses="{project["license"]}"' in _DOCKERFILE
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", _DOCKERFILE, re.MULTILINE), "a number: nothing to look up"
    assert "PYTHONDONTWRITEBYTECODE=1" in _DOCKERFILE


def test_the_compose_file_fits_its_schema() -> None:
    done = subprocess.run(
        [
            str(_TOOLS / "check-jsonschema"),
            "--builtin-schema",
            "vendor.compose-spec",
            str(_ROOT / "docker-compose.yml"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run(
        [str(_TOOLS / "hadolint"), str(_ROOT / "deploy" / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_broker_settings_are_those_of_a_real_fleet_but_for_tls() -> None:
    def lines(path: str) -> set[str]:
        text = (_ROOT / "deploy" / path).read_text(encoding="utf-8")
        return {line for line in text.splitlines() if line and not line.startswith("#")}

    ours, real = lines("compose/mosquitto.conf"), lines("broker/mosquitto.conf")
    own = {
        "persistence_location",
        "password_file",
        "acl_file",
        "log_dest",
        "listener",
        "cafile",
        "certfile",
        "keyfile",
        "connection_messages",
    }
    assert {line for line in ours ^ real if line.split()[0] not in own} == set()
    assert "allow_anonymous false" in ours


@pytest.mark.parametrize("name", ["host.sh", "coordinator.sh"])
def test_scripts_of_containers_are_posix_sh(name: str) -> None:
    shell = shutil.which("dash") or "sh"
    script = str(_ROOT / "deploy" / "compose" / name)
    assert subprocess.run([shell, "-n", script], check=False).returncode == 0


def test_two_coordinators_share_a_store_and_nothing_else(services: dict[str, Any], tmp_path: Path) -> None:
    script, mark, store, password = services["coordinator"]["command"]
    services["coordinator"]["environment"] |= {
        "CAESURA_COORDINATOR_STORE": store,
        "CAESURA_COORDINATOR_STORE_PASSWORD_FILE": password,
    }
    stores = set()
    for name in ("coordinator", "coordinator-2"):
        service = services[name]
        assert service["group_add"] == [str(secret_readers(compose_layout())[STORE_SECRET])]
        environ = dict(service["environment"])
        for given in ("CAESURA_COORDINATOR_BROKER_PASSWORD_FILE", "CAESURA_COORDINATOR_STORE_PASSWORD_FILE"):
            secret = Path(environ[given])
            assert secret.name in secret_readers(compose_layout())
            environ[given] = str(tmp_path / secret.name)
            (tmp_path / secret.name).touch(mode=0o600)
            (tmp_path / secret.name).write_text("a password of some length")
        read = read_settings(CoordinatorSettings, "CAESURA_COORDINATOR_", environ)
        check_store(read)
        user = {user.name: user for user in users(compose_layout())}[read.broker_username]
        assert service["user"] == f"{user.uid}:{user.uid}"
        stores.add((read.store, read.store_password.reveal(), read.fleet, read.broker_url, read.lease_s))
    assert len(stores) == 1, "what all must have alike"
    database = services["database"]
    assert database["environment"]["POSTGRES_PASSWORD_FILE"] == password
    assert database["group_add"] == services["coordinator"]["group_add"]
    assert "ports" not in database
    assert f"deploy/compose/coordinator.sh /usr/local/bin/{script}" in _DOCKERFILE
    assert Path(mark).parent == Path("/var/lib/caesura-store")


def test_there_is_no_second_store_before_the_mark_of_the_first(services: dict[str, Any]) -> None:
    """Should the mark not be made, the coordinator has SQLite, as without the profile, and is the only one."""
    profiles = {name: service["profiles"] for name, service in services.items() if "profiles" in service}
    assert profiles == {
        "caesura": ["tools"],
        "store": ["ha"],
        "database": ["ha"],
        "coordinator-2": ["ha"],
    }
    for name in ("database", "coordinator-2"):
        assert services[name]["depends_on"]["store"] == {"condition": "service_completed_successfully"}
    _, mark, *_ = services["coordinator"]["command"]
    marks = services["store"]
    assert re.match(rf"until\s[^;]*\btouch {mark}\ndo ", marks["command"][-1]), (
        "it has made the mark, or it has not ended"
    )
    assert marks["depends_on"] == {}, "nothing that fails comes before it"
    assert marks["volumes"] == ["store:/var/lib/caesura-store"]
    assert "store:/var/lib/caesura-store:ro" in services["coordinator"]["volumes"]
    uid = marks["user"].split(":")[0]
    assert f"-o {uid} -g {uid} /var/lib/caesura-store" in _DOCKERFILE, "its volume begins as this"
    assert services["coordinator"]["depends_on"]["store"] == {
        "condition": "service_completed_successfully",
        "required": False,
    }
