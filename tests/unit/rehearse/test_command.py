"""Usage: what is refused before anything is started, and orders."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from caesura_ctl.cli import caesura
from caesura_rehearse.commands.rehearse import rehearse
from caesura_rehearse.network.address import AddressRefused, with_port
from caesura_rehearse.simulation.orders import MAX_PAUSE_S, MINIMUM_NOTICE_S, Order, OrderRefused, order_from


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("python3", "app.py"), "put the program after two dashes: -- python3 app.py"),
        (("--freeze", "9s", "--"), "no program after --"),
        (("--freeze", "9s", "--reboot", "--", "true"), "--freeze and --reboot exclude each other"),
        (("--freeze", "9s", "--pid", "77", "--", "true"), "exclude each other"),
        (("--freeze", "31s", "--", "true"), "too long: at most 27s"),
        (("--notice", "9s", "--", "true"), "need an event"),
        (("--freeze", "9s", "--expect", "aproved", "--", "true"), "is not an expectation"),
        (("--freeze", "9s", "--expect", "drained-within", "soon", "--", "true"), "is not an expectation"),
        (("--freeze", "9s", "--proxy"), "--proxy needs a program"),
        (("--netns", "--proxy", "--", "true"), "--netns and --proxy exclude each other"),
        (("--publish", "80", "--", "true"), "--publish needs --netns"),
        (("--address", "nowhere", "--", "true"), "is not an IPv4 address"),
        (("--address", "gateway", "--", "true"), "--address gateway needs --container"),
        (("--container", "web", "--", "true"), "a program after -- and --container exclude each other"),
        (("--container", "web", "--compose-service", "web"), "exclude each other"),
        (("--engine", "/run/x.sock", "--", "true"), "--engine needs --container"),
        (("--container", "web", "--proxy"), "--proxy needs a program"),
        (("--container", "web", "--netns", "--publish", "80"), "--publish needs --netns and a program"),
        (("--container", "a b", "--engine", "/no/x.sock"), "cannot be the name of a container"),
        (("--container", "web", "--engine", "/no/x.sock"), "no container engine at /no/x.sock: No such file"),
        (("--container", "web", "--engine", "tcp://1.2.3.4:2375"), "give the path of a unix socket"),
        (("--freeze", "1s", "--", "no-such-program"), "cannot start no-such-program: it is not on the PATH"),
        (("--freeze", "1s", "--", "/etc/passwd"), "cannot start /etc/passwd: it is not executable"),
        (("--freeze", "1s", "--", "./nothing"), "cannot start ./nothing: there is no such file"),
        (("--freeze", "1s", "--pid", "4194304"), "there is no process 4194304"),
        (("--freeze", "1s", "--cgroup", "/etc"), "is not a cgroup that can be frozen"),
        (("--vms", "0", "--", "true"), "0 is not in the range 1<=x<=50"),
        (("--vms", "51", "--", "true"), "51 is not in the range 1<=x<=50"),
        (
            ("--vms", "2", "--vm", "one", "--", "true"),
            "--vm and --vms exclude each other: with --vms the names are app-1 to app-2",
        ),
        (("--vms", "2", "--pid", "77"), "several VMs need a program after --"),
        (("--vms", "2", "--address", "127.0.0.1:8099", "--", "true"), "--address is for one VM, here are 2"),
        (
            ("--vms", "2", "--", "echo", "{prot}"),
            "argument 1 of the program has the unknown placeholder {prot}",
        ),
        (("--vms", "2", "--set", "_own", "--", "true"), "starts with an underscore"),
        (
            ("--vms", "2", "--port", "65535", "--", "true"),
            "there is no port 65536 for app-2: the last one is 65535",
        ),
        (
            ("--freeze", "1s", "--expect", "app-2: seen", "--", "true"),
            "there is no VM app-2 here, did you mean app-1?",
        ),
        (
            ("--freeze", "1s", "--fault", "app-2: 500", "--", "true"),
            "there is no VM app-2 here, did you mean app-1?",
        ),
        (
            ("--scenario", "host-updat", "--", "true"),
            "there is no scenario 'host-updat', did you mean host-update?",
        ),
        (
            ("--scenario", "./none.toml", "--", "true"),
            "./none.toml: cannot be read: No such file or directory",
        ),
        (
            ("--scenario", "host-update", "--freeze", "1s", "--", "true"),
            "--scenario and --freeze exclude each other",
        ),
        (
            ("--scenario", "host-update", "--notice", "1s", "--", "true"),
            "--notice is for an event of the command line",
        ),
        (
            ("--scenario", "two-sets", "--vms", "3", "--", "true"),
            "--vms: this scenario says itself which VMs there are",
        ),
        (("--freeze", "1s", "--speed", "0.5", "--", "true"), "0.5 is not in the range 1<=x<=3600"),
    ],
)
def test_bad_usage_is_one_clear_line_and_2(words: tuple[str, ...], says: str) -> None:
    result = CliRunner().invoke(rehearse, list(words))
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_it_is_a_command_of_caesura() -> None:
    assert "rehearse" in CliRunner().invoke(caesura, ["--help"]).output


def test_its_help_names_the_notices_of_the_real_one() -> None:
    output = " ".join(CliRunner().invoke(rehearse, ["--help"]).output.split())
    assert "15m for Freeze and Reboot, 10m Redeploy, 5m Terminate, 30s Preempt" in output
    assert (MINIMUM_NOTICE_S["Freeze"], MINIMUM_NOTICE_S["Redeploy"], MINIMUM_NOTICE_S["Preempt"]) == (
        900,
        600,
        30,
    )


def test_an_order_has_the_real_ones_notice_words_and_duration() -> None:
    order = Order(event="Freeze", duration_s=8.2)
    assert (order.notice, order.shown_duration) == (900.0, 9)
    assert order.text == "Host server is undergoing maintenance."
    reboot = Order(event="Reboot", source="User")
    assert (reboot.shown_duration, "restarted as requested" in reboot.text) == (-1, True)
    assert Order(event="Freeze", duration_s=0.0).shown_duration == 0


@pytest.mark.parametrize(
    "arguments", [{"event": "Pause"}, {"duration_s": MAX_PAUSE_S + 0.1}, {"notice": 5}, {"notice_s": -1}]
)
def test_an_order_that_is_not_valid_is_refused_by_name(arguments: object) -> None:
    with pytest.raises(OrderRefused, match=r"order is not valid: .*(event|duration_s|notice)"):
        order_from(arguments)


def test_addresses() -> None:
    assert with_port("169.254.169.254") == "169.254.169.254:80"
    assert with_port("127.0.0.1:8080") == "127.0.0.1:8080"
    for bad in ("localhost", "1.2.3", "1.2.3.4:http", "1.2.3.4:99999", "::1"):
        with pytest.raises(AddressRefused):
            with_port(bad)
