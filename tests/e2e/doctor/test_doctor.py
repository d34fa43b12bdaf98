"""``caesura doctor`` beside real services: what is well, and each thing that is not, with its remedy."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from caesura.bus.local_broker import LocalBroker
from caesura.contract.access import Principal, access_rules
from caesura_testing.broker import mosquitto

_HOST = Principal("host", "host-1")
_BLIND = Principal("metadata", "fleet")
"""May read, and may not publish about hosts."""


def environment(stage: Any, host: str = "host-1", **more: str) -> dict[str, str]:
    """The host updater's, as its unit would have it."""
    _, own = stage.sandbox.environments[host]
    return {**os.environ, **own, **more}


async def asked(environ: dict[str, str], *words: str) -> tuple[int, dict[str, list[tuple[str, str, str]]]]:
    """Its exit code, and level, text and remedy of each finding by name."""
    process = await asyncio.create_subprocess_exec(
        "caesura", "doctor", "--json", *words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert output, errors.decode()
    found: dict[str, list[tuple[str, str, str]]] = {}
    answer = json.loads(output)
    for each in answer["findings"]:
        found.setdefault(each["name"], []).append((each["level"], each["about"], each.get("remedy", "")))
        assert each["level"] == "ok" or each["remedy"], each
    assert answer["healthy"] == (process.returncode == 0)
    return process.returncode or 0, found


async def test_on_a_host_that_is_well(pair: Any) -> None:
    code, found = await asked(environment(pair))
    assert code == 0, found
    for name in (
        "host_file",
        "state_dir",
        "updates_dir",
        "guard",
        "broker.connection",
        "broker.rights",
        "coordinator.clock",
    ):
        assert found[name][0][0] == "ok", found[name]
    assert "process.freezer" in found
    # The test's broker has no access rules, which is named and not an error.
    assert found["broker.least_rights"][0][0] == "warning"
    assert pair.fleet_view.hosts["host-1"].guard == "ready"


async def test_what_is_missing_is_named_with_its_remedy(pair: Any, tmp_path: Path) -> None:
    sandbox = pair.sandbox
    await sandbox.kill("host-1")
    await sandbox.kill("coordinator")
    empty = tmp_path / "state"
    empty.mkdir(mode=0o755)
    code, found = await asked(
        environment(
            pair,
            CAESURA_HOST_UPDATER_STATE_DIR=str(empty),
            CAESURA_HOST_UPDATER_BROKER_URL="mqtt://127.0.0.1:1",
        )
    )
    assert code == 1
    assert found["state_dir"][0][0] == "wrong"
    assert f"chmod 700 {empty}" in found["state_dir"][0][2]
    assert found["guard"][0][0] == "wrong"
    assert found["broker.connection"][0][0] == "wrong"
    code, found = await asked(environment(pair, CAESURA_HOST_UPDATER_HOST_FIEL="x"))
    assert code == 1
    assert "CAESURA_HOST_UPDATER_HOST_FIEL" in found["settings"][0][1]
    bad = tmp_path / "host.toml"
    bad.write_text('host = "host-1"\ndriver = "qemo"\n')
    code, found = await asked(environment(pair, CAESURA_HOST_UPDATER_HOST_FILE=str(bad)))
    assert code == 1
    assert "'qemo'" in found["host_file"][0][1]


@pytest.mark.parametrize(("user", "rights"), [(_HOST, "ok"), (_BLIND, "wrong")])
async def test_rights_at_the_broker_are_really_tried(
    pair: Any, tmp_path: Path, user: Principal, rights: str
) -> None:
    password = tmp_path / "password"
    password.write_text("secret")
    password.chmod(0o600)
    broker: LocalBroker
    async with mosquitto(
        tmp_path,
        users={_HOST.username: "secret", _BLIND.username: "secret"},
        acl=access_rules((_HOST, _BLIND)),
    ) as broker:
        code, found = await asked(
            environment(
                pair,
                CAESURA_HOST_UPDATER_BROKER_URL=broker.url,
                CAESURA_HOST_UPDATER_BROKER_USERNAME=user.username,
                CAESURA_HOST_UPDATER_BROKER_PASSWORD_FILE=str(password),
            )
        )
    assert found["broker.rights"][0][0] == rights
    if rights == "ok":
        assert found["broker.least_rights"][0][0] == "ok"
        assert found["coordinator"][0][0] == "warning"
    assert code == (0 if rights == "ok" else 1)


async def test_settings_of_the_file_that_systemd_reads(pair: Any, tmp_path: Path) -> None:
    own = environment(pair)
    file = tmp_path / "host-updater.env"
    file.write_text(
        "# settings\n"
        + "".join(
            f'{name}="{value}"\n' for name, value in own.items() if name.startswith("CAESURA_HOST_UPDATER_")
        )
    )
    bare = {name: value for name, value in own.items() if not name.startswith("CAESURA_")}
    code, found = await asked(bare, "--env-file", str(file), "--no-broker")
    assert code == 0, found
    assert found["host_file"][0][0] == "ok"
    code, found = await asked(bare, "--env-file", str(tmp_path / "none"), "--no-broker")
    assert code == 1
    assert "cannot be read" in found["settings"][0][1]
