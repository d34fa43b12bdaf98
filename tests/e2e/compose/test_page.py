"""What docs/compose.md shows to somebody whose project is up, run as it stands there."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from caesura_testing.fleet import Fleet
from caesura_testing.patience import patient

_PAGE = Path(__file__).parents[3] / "docs" / "compose.md"
_BLOCK = re.compile(r"^<!-- run in: compose -->\n```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def shell(fleet: Fleet, script: str) -> str:
    """What ``script`` wrote, run in the project's folder; it must end well."""
    project = fleet.project
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", script],
        cwd=project.folder,
        env={**project.engine.environ, **project.environ, "COMPOSE_PROJECT_NAME": project.name},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patient(180),
        check=False,
    )
    assert done.returncode == 0, f"{script}\nended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_page_is_followed_from_up_to_a_consumer(fleet: Fleet) -> None:
    fleet.project.up()
    looks, freezes, consumes = _BLOCK.findall(_PAGE.read_text(encoding="utf-8"))

    looked = shell(fleet, looks)
    assert "coordinator" in looked
    assert "host-1" in looked

    fleet.quiet()  # "and wait for the end of what it started"
    shell(fleet, freezes)

    # Another port than the page's, since this is not the only project of the machine; and it ends after one message.
    port = fleet.project.environ["CAESURA_PORT_BROKER"]
    once = consumes.replace("mosquitto_sub -p 1883", f"mosquitto_sub -p {port} -C 1 -W {int(patient(120))}")
    assert once != consumes
    fleet.quiet()
    with ThreadPoolExecutor(1) as pool:
        consumer = pool.submit(shell, fleet, once)
        while not consumer.done():  # the first may be over before the consumer has subscribed
            code, _, said = fleet.caesura("freeze", "--vm", "web-1", "--for", "1s", "--notice", "1s")
            assert code == 0, said
        received = consumer.result()
    assert '"caesura.vm.resumed.v1"' in received
