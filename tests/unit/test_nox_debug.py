"""nox-debug: its checks against made-up hosts, a real HTTP server and real certificates."""

from __future__ import annotations

import ast
import http.server
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import socket
import ssl
import stat
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.nox.platform.plugins.module_utils import host_state

SCRIPT = Path(__file__).parents[2] / "roles/nox_tools/files/nox-debug"


def load() -> Any:
    """Import the script, whose name no import statement can say."""
    loader = importlib.machinery.SourceFileLoader("nox_debug", str(SCRIPT))
    spec = importlib.util.spec_from_loader("nox_debug", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules["nox_debug"] = module  # dataclasses look themselves up
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


debug = load()
TOKEN = "0123456789abcdef" * 4
NOW = 1_700_000_000.0
PASSWD = "root:x:0:0::/root:/bin/sh\nnox-api:x:990:990::/:/x\nnox:x:991:991::/home/nox:/x\n"


class FakeHost:
    """Builds a root directory and the answers of commands, and gives the Host made of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.answers: dict[str, Any] = {}
        self.ran: list[tuple[str, ...]] = []
        self.write("/etc/passwd", PASSWD)
        self.write("/etc/group", "root:x:0:\nnox-api:x:990:\nnox:x:991:\n")

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def path_of_package(self) -> Path:
        return self.root / debug.STATE_CHECK.lstrip("/")

    def config(self, *, mode: int = 0o600, **settings: Any) -> None:
        values = {"NOX_API_TOKEN": TOKEN, **settings}
        text = "".join(f"{key}={value}\n" for key, value in values.items())
        self.write(debug.CONFIG, text, mode)

    def run(self, *argv: str, **_: object) -> Any:
        self.ran.append(argv)
        for start, answer in self.answers.items():
            if " ".join(argv).startswith(start):
                return answer
        return debug.Ran(127, err=f"{argv[0]}: not found")

    def answer(self, start: str, out: str = "", code: int = 0, err: str = "") -> None:
        self.answers[start] = debug.Ran(code, out, err)

    def facts(self, euid: int = 0) -> Any:
        return debug.Facts(debug.Host(self.root, euid, self.run, lambda: NOW))

    def find(self, check: str, function: Any, euid: int = 0) -> Any:
        found = {one.id: one for one in function(self.facts(euid))}
        return found.get(check)


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


class Server:
    """A real HTTP server on loopback that notes which tokens it was sent."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        outer = self
        self.status = 200
        self.document: dict[str, object] = {"status": "ok", "version": "1.2.3"}
        self.detail: dict[str, object] = {}
        self.tokens: list[str | None] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                given = self.headers.get("Authorization")
                outer.tokens.append(given)
                status, document = outer.status, dict(outer.document)
                if given == f"Bearer {TOKEN}":
                    document.update(outer.detail)
                elif given:
                    status = 401
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


# --- texts ---


def calls_of_say() -> list[tuple[str, str, set[str] | None]]:
    """Every say("check", "outcome", …) of the script with its keywords; None if it passes **."""
    calls = []
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "say":
            keywords = {keyword.arg for keyword in node.keywords}
            names = None if None in keywords else {name for name in keywords if name}
            check, outcome = node.args[:2]
            if isinstance(check, ast.Constant) and isinstance(outcome, ast.Constant):
                calls.append((str(check.value), str(outcome.value), names))
    return calls


def test_every_outcome_that_is_said_has_a_text() -> None:
    calls = calls_of_say()
    assert len(calls) > 60
    for check, outcome, keywords in calls:
        topic = debug.ENGLISH[check]
        text = topic.outcomes.get(outcome) or debug.ENGLISH["any"].outcomes[outcome]
        fields = {name for part in text[1:] for _, name, _, _ in string.Formatter().parse(part)}
        if keywords is not None:
            assert fields - {None} <= keywords, (check, outcome)


def test_every_text_is_said_somewhere() -> None:
    words = set(re.findall(r'"([a-z]+)"', SCRIPT.read_text()))
    for check, topic in debug.ENGLISH.items():
        assert set(topic.outcomes) <= words, check


def test_every_finding_has_a_state_and_wrong_ones_a_cause() -> None:
    for check, topic in debug.ENGLISH.items():
        for name, text in topic.outcomes.items():
            assert text.state in ("ok", "note", "warn", "fail", "skip"), (check, name)
            assert bool(text.cause) == (text.state in ("warn", "fail")), (check, name)


# --- other languages ---

FRENCH = SCRIPT.with_name("nox-debug.fr")


@pytest.fixture
def french(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Speak French as on a host with a French locale."""
    host.write(debug.TRANSLATION.format(language="fr"), FRENCH.read_text())
    debug.speak(host.facts().host, {"LANG": "fr_FR.UTF-8"})
    yield debug.TEXTS
    debug.speak(host.facts().host, {})


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_french_has_every_topic_outcome_and_placeholder_and_no_others() -> None:
    french = debug.read_texts(FRENCH.read_text())
    assert list(french) == list(debug.ENGLISH)
    for check, (title, outcomes) in debug.ENGLISH.items():
        assert fields(french[check].title) == fields(title), check
        assert list(french[check].outcomes) == list(outcomes), check
        for name, text in outcomes.items():
            found = french[check].outcomes[name]
            assert found.state == text.state, (check, name)
            assert fields(found.detail) == fields(text.detail), (check, name)
            assert fields(found.cause) == fields(text.cause), (check, name)
            assert bool(found.cause) == bool(text.cause), (check, name)
            assert not found.help, "commands are the same in every language: they stand in the English table alone"


def test_all_of_french_is_spoken(french: dict[str, Any]) -> None:
    written = debug.read_texts(FRENCH.read_text())
    for check, (title, outcomes) in written.items():
        assert french[check].title == title
        for name, text in outcomes.items():
            spoken = french[check].outcomes[name]
            assert spoken == text._replace(help=debug.ENGLISH[check].outcomes[name].help), (check, name)


def test_french_has_a_no_break_space_before_double_punctuation() -> None:
    for line in FRENCH.read_text().splitlines():
        text = line.partition(" | ")[2]
        assert not re.search(r" [:;?!%]|\w[;?!]", text), line


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({}, "try"),
        ({"LANG": "fr_FR.UTF-8"}, "essayez"),
        ({"LANG": "fr"}, "essayez"),
        ({"LANG": "fr_CA@euro"}, "essayez"),
        ({"LC_MESSAGES": "fr_BE.utf8", "LANG": "en_US.UTF-8"}, "essayez"),
        ({"LC_ALL": "C.UTF-8", "LC_MESSAGES": "fr_FR", "LANG": "fr_FR"}, "try"),
        ({"LC_ALL": "", "LANG": "fr_FR"}, "essayez"),
        ({"LANG": "de_DE.UTF-8"}, "try"),
        ({"LANG": "frp_IT"}, "try"),
        ({"LANG": "../../etc/fr"}, "try"),
        ({"LANG": "POSIX"}, "try"),
    ],
)
def test_the_locale_decides(host: FakeHost, french: object, environment: dict[str, str], word: str) -> None:
    debug.speak(host.facts().host, environment)
    assert debug.phrase("report.help", text="x").startswith(word)


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "nonsense\n  without | a | topic\n",
        "config.token | Token\n  fail short | {length.__class__} {least}\n",
        "config.token | Token\n  fail short | {length {least}\n",
        "config.token | Token\n  = nothing.there\n",
        "config.token | Token\n",
    ],
)
def test_a_damaged_translation_leaves_english(host: FakeHost, damaged: str) -> None:
    host.write(debug.TRANSLATION.format(language="fr"), damaged)
    debug.speak(host.facts().host, {"LANG": "fr_FR.UTF-8"})
    assert debug.say("config.token", "short", length=5, least=32, path=debug.CONFIG).detail.startswith(
        "5 characters, 32"
    )
    debug.speak(host.facts().host, {})


def test_json_has_english_keys_and_french_messages(
    host: FakeHost, french: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LC_ALL", "fr_FR.UTF-8")
    assert debug.main(["--json"], host.facts().host) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "not installed"
    (check,) = document["checks"]
    assert (check["id"], check["outcome"], check["state"]) == ("install.present", "missing", "fail")
    assert check["cause"] == "Nox n'a jamais été installé ici"
    assert check["help"] == "make install"
    debug.main([], host.facts().host)
    assert capsys.readouterr().out.splitlines()[-1].startswith("non installé\u00a0: échecs 1")


def test_usage_is_french_too(
    host: FakeHost, french: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LANG", "fr_FR.UTF-8")
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.delenv("LC_MESSAGES", raising=False)
    for arguments, said in (
        (["-h"], "affiche cette aide"),
        (["--lines"], "--lines attend une valeur"),
        (["x"], "x ne fait pas"),
    ):
        with pytest.raises(SystemExit):
            debug.main(arguments, host.facts().host)
        captured = capsys.readouterr()
        assert said in captured.out + captured.err
        assert (captured.out + captured.err).startswith("usage\u00a0: nox-debug")


def test_a_terminal_that_cannot_show_a_letter_is_shown_the_rest() -> None:
    words = [sys.executable, "-I", str(SCRIPT), "logs", "--lines", "1"]
    ended = subprocess.run(words, capture_output=True, env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, check=False)
    assert ended.returncode in (0, 3) and ended.stderr == b""


def test_a_long_finding_hangs_on_a_terminal_and_stays_one_line_in_a_pipe() -> None:
    checks = [debug.say("config.values", "bad", names=", ".join(["NOX_SLOTS=many"] * 12), path=debug.CONFIG)]
    piped = debug.render(checks, "heading", colour=False)
    shown = debug.render(checks, "heading", colour=False, columns=80)
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.split() == piped.split()
    assert next(line for line in piped.splitlines() if "not understood" in line).count("NOX_SLOTS") == 12


# --- the documented problems ---


def test_the_six_documented_problems_name_known_checks() -> None:
    assert [name for name in debug.ENGLISH if name.startswith("problem.")] == list(debug.PROBLEMS)
    assert len(debug.PROBLEMS) == 6
    members = [member for members in debug.PROBLEMS.values() for member in members]
    assert set(members) <= set(debug.ENGLISH)
    assert len(members) == len(set(members))


@pytest.mark.parametrize("problem", debug.PROBLEMS)
def test_each_problem_is_recognised_by_each_of_its_signs(problem: str) -> None:
    for member in debug.PROBLEMS[problem]:
        sign = debug.Check(member, "a title", "fail", "a detail", "a cause", "a command")
        found = {check.id: check for check in debug.find_problems([sign])}
        assert found[problem].state == "fail"
        assert found[problem].detail == member
        assert found[problem].help == "a command"
        assert set(found) == {problem}


def test_a_failure_leads_before_a_warning() -> None:
    checks = [
        debug.say("sandbox.dir", "mode", path="/s", mode="0777"),
        debug.say("runner.socket", "missing", path="/run/x"),
    ]
    (found,) = [one for one in debug.find_problems(checks) if one.id == "problem.run_errors"]
    assert (found.state, found.detail) == ("fail", "runner.socket, sandbox.dir")


def test_control_characters_of_clients_reach_no_terminal() -> None:
    record = {"event": "request", "path": "/\x1b[2J\nfake", "status": 200}
    assert "\x1b" not in debug.render_record(record)
    assert "\n" not in debug.render_record(record)
    assert "\x1b" not in debug.say("port.listen", "ok", where="x", who="\x1b[31m").detail


# --- installation, exit codes, output ---


def test_nothing_installed_is_3_and_one_finding(host: FakeHost, capsys: pytest.CaptureFixture[str]) -> None:
    assert debug.main(["--json"], host.facts().host) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "not installed"
    assert document["exit_code"] == 3
    assert [check["id"] for check in document["checks"]] == ["install.present"]
    assert set(document) == {"version", "host", "time", "verdict", "exit_code", "checks"}


def test_a_half_installed_host_is_broken_and_says_what_is_missing(host: FakeHost) -> None:
    host.config()
    found = host.find("install.present", debug.check_install)
    assert found.state == "fail"
    assert "/opt/nox/current" in found.detail
    assert debug.CONFIG not in found.detail


def test_exit_codes_follow_the_worst_state() -> None:
    good = debug.Check("x", "x", "ok", "x")
    skipped = debug.Check("x", "x", "skip", "x")
    warning = debug.Check("x", "x", "warn", "x")
    failure = debug.Check("x", "x", "fail", "x")
    assert debug.exit_code([good, skipped]) == 0
    assert debug.exit_code([good, warning]) == 1
    assert debug.exit_code([warning, failure]) == 2


def test_a_check_that_fails_itself_stops_no_other(host: FakeHost) -> None:
    def bad(facts: object) -> Iterator[Any]:
        raise RuntimeError("a fault")
        yield

    host.config()
    checks = debug.examine(host.facts(), (bad, debug.check_token))
    assert [check.id for check in checks[:2]] == ["tool.error", "config.token"]
    assert "a fault" in checks[0].detail


@pytest.mark.parametrize("arguments", [["wrong"], ["--lines", "0"], ["--lines", "x"], ["--nope"]])
def test_bad_usage_is_64_and_not_a_verdict(arguments: list[str], host: FakeHost) -> None:
    with pytest.raises(SystemExit) as ended:
        debug.main(arguments, host.facts().host)
    assert ended.value.code == 64


@pytest.mark.parametrize("mode", ["full", "health", "status", "logs"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_mode_ever_prints_the_token(
    mode: str, options: list[str], host: FakeHost, capsys: pytest.CaptureFixture[str]
) -> None:
    host.config(NOX_PORT=1)
    record = {"time": "2023-11-14T22:13:00Z", "level": "error", "event": f"leaked {TOKEN}"}
    host.write(debug.ERROR_LOG, json.dumps(record) + "\n")
    host.write(debug.LOG, "")
    host.answer("journalctl", out=f"another leak: {TOKEN}\n")
    assert debug.main([mode, *options], host.facts().host) in (0, 2)
    output = capsys.readouterr().out
    assert TOKEN not in output
    if options:
        json.loads(output)


def test_a_report_groups_findings_under_their_problem_with_cause_and_command() -> None:
    checks = [
        debug.say("config.token", "missing"),
        debug.say("config.mode", "wide", mode="0644", owner="root:root", path=debug.CONFIG),
        debug.say("users.front", "ok", uid=990),
    ]
    text = debug.render([*checks, *debug.find_problems(checks)], "heading", colour=False)
    assert "\033" not in text
    after = text[text.index("Problems") :]
    assert after.index("problem.service_start") < after.index("NOX_API_TOKEN")
    assert after.index("Other findings") < after.index("0644 root:root")
    assert "cause: " in after and "try: sudo chmod 0600 /etc/default/nox-api" in after
    assert text.splitlines()[-1].startswith("broken: failed 2, warnings 0, notes 0, ok 1")
    assert "\033[31m" in debug.render(checks, "heading", colour=True)


# --- configuration ---


def test_settings_are_read_as_the_service_reads_them() -> None:
    text = """
    # NOX_PORT=1
    export NOX_BIND_ADDR="127.0.0.1"   # why
    NOX_API_TOKEN='a b'
    NOX_PORT=1
    NOX_PORT=2
    NOX_QUEUE=
    not a setting
    NOX_SLOTS="open
    """
    settings, bad = debug.read_settings(text)
    assert settings == {
        "NOX_BIND_ADDR": "127.0.0.1",
        "NOX_API_TOKEN": "a b",
        "NOX_PORT": "2",
        "NOX_QUEUE": "",
    }
    assert bad == ["line 8", "line 9"]


@pytest.mark.parametrize(
    ("token", "state", "said"),
    [
        (TOKEN, "ok", "64 characters"),
        ("", "fail", "not set"),
        ("replace_with_secure_token", "fail", "placeholder"),
        ("changeme-changeme-changeme-changeme-", "fail", "placeholder"),
        ("short", "fail", "5 characters"),
    ],
)
def test_tokens(host: FakeHost, token: str, state: str, said: str) -> None:
    host.config(NOX_API_TOKEN=token)
    found = host.find("config.token", debug.check_token)
    assert found.state == state
    assert said in found.detail
    if token:
        assert token not in str({**found.as_json(), "outcome": ""})


@pytest.mark.parametrize(("mode", "state"), [(0o600, "ok"), (0o640, "warn"), (0o644, "fail"), (0o604, "fail")])
def test_modes_of_the_configuration(host: FakeHost, mode: int, state: str) -> None:
    host.config(mode=mode)
    if os.geteuid() == 0:
        assert host.find("config.mode", debug.check_config_file).state == state


@pytest.mark.parametrize(
    ("address", "port", "state", "named"),
    [
        ("127.0.0.1", "8080", "ok", "127.0.0.1:8080"),
        ("localhost", "8080", "ok", "8080"),
        ("::1", "8080", "ok", "8080"),
        ("0.0.0.0", "8080", "warn", "without TLS"),
        ("192.0.2.1", "8080", "fail", "no address of this host"),
        ("127.0.0.1", "http", "fail", "NOX_PORT=http"),
        ("127.0.0.1", "99999", "fail", "NOX_PORT=99999"),
        ("nowhere", "8080", "fail", "NOX_BIND_ADDR=nowhere"),
    ],
)
def test_addresses(host: FakeHost, address: str, port: str, state: str, named: str) -> None:
    host.config(NOX_BIND_ADDR=address, NOX_PORT=port)
    found = host.find("config.port", debug.check_address)
    assert found.state == state
    assert named in found.detail


@pytest.mark.parametrize(
    ("settings", "state", "named"),
    [
        ({"NOX_MEMORY": "512M", "NOX_TIMEOUT": "0.5"}, "ok", "well-formed"),
        ({"NOX_MEMORY": "lots"}, "fail", "NOX_MEMORY=lots"),
        ({"NOX_SLOT": "4"}, "warn", "NOX_SLOT"),
    ],
)
def test_other_settings(host: FakeHost, settings: dict[str, Any], state: str, named: str) -> None:
    host.config(**settings)
    found = host.find("config.values", debug.check_values)
    assert found.state == state
    assert named in found.detail


def test_what_only_root_sees_is_skipped_with_the_command_to_see_it(host: FakeHost) -> None:
    host.config()
    facts = host.facts(euid=1000)
    facts.__dict__["parsed"] = None  # as for a user: the tests themselves may run as root
    (file, _) = debug.check_config_file(facts)
    (token,) = debug.check_token(facts)
    (address,) = debug.check_address(facts)
    (sandbox,) = debug.check_sandbox(facts)
    assert {file.state, token.state, address.state, sandbox.state} == {"skip"}
    assert token.help == "sudo nox-debug"


# --- sandbox and release ---


def test_a_missing_sandbox_is_a_sign_of_run_errors(host: FakeHost) -> None:
    host.config()
    checks = list(debug.check_sandbox(host.facts()))
    assert [check.id for check in checks] == ["sandbox.dir"]
    assert checks[0].state == "fail"
    problems = {one.id: one for one in debug.find_problems(checks)}
    assert problems["problem.run_errors"].state == "fail"


def test_the_owner_and_the_writability_of_the_sandbox(host: FakeHost) -> None:
    host.config()
    sandbox = host.root / "home/nox/nox/sandbox"
    sandbox.mkdir(parents=True)
    host.write("/etc/passwd", f"nox:x:{os.getuid()}:0::/:/x\n")
    host.answer("setpriv --reuid=nox --regid=nox --init-groups -- test -w")
    states = {one.id: one.state for one in debug.check_sandbox(host.facts())}
    assert states["sandbox.dir"] == states["sandbox.write"] == "ok"
    host.write("/etc/passwd", "nox:x:77777:0::/:/x\n")
    host.answer("setpriv --reuid=nox --regid=nox --init-groups -- test -w", code=1)
    found = {one.id: one for one in debug.check_sandbox(host.facts())}
    assert found["sandbox.dir"].help == "sudo chown -R nox:nox /home/nox/nox/sandbox"
    assert found["sandbox.write"].state == "fail"
    host.answer("setpriv --reuid=nox --regid=nox --init-groups -- test -w", code=1, err="setpriv: no group")
    assert host.find("sandbox.write", debug.check_sandbox).state == "skip"
    host.write("/etc/passwd", f"nox:x:{os.getuid()}:0::/:/x\n")
    sandbox.chmod(0o777)
    assert host.find("sandbox.dir", debug.check_sandbox).state == "warn"


@pytest.mark.parametrize(("used", "outcome"), [(0, "ok"), (89, "ok"), (90, "low"), (98, "full")])
def test_fullness(used: int, outcome: str) -> None:
    assert debug.fullness(used) == outcome


def make_release(host: FakeHost, name: str = "1.2.3-abc", packages: str = "fastapi uvicorn") -> None:
    venv = host.root / "opt/nox/releases" / name / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python3").write_text("")
    for package in packages.split():
        (venv / f"lib/python3.10/site-packages/{package}-0.1.dist-info").mkdir(parents=True)
    (host.root / "opt/nox/current").symlink_to(f"releases/{name}")
    (host.root / "opt/nox/.venv").symlink_to("current/venv")


def check_release(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(debug, "root_alone", lambda host, name: True)
    return {one.id: one for one in debug.check_release(host.facts())}


def test_a_good_release(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    make_release(host)
    host.answer("setpriv --reuid=nox-api", out="3.10.12\n")
    found = check_release(host, monkeypatch)
    assert found["release.current"].detail == "1.2.3-abc"
    assert found["release.python"].detail == "3.10.12 with fastapi 0.1, uvicorn 0.1"


def test_releases_that_are_broken(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_release(host, monkeypatch)["release.current"].state == "fail"
    make_release(host, packages="fastapi")
    assert "uvicorn" in check_release(host, monkeypatch)["release.python"].detail
    shutil.rmtree(host.root / "opt/nox/releases/1.2.3-abc/venv")
    assert "does not exist" in check_release(host, monkeypatch)["release.python"].detail
    shutil.rmtree(host.root / "opt/nox/releases")
    assert "which does not exist" in check_release(host, monkeypatch)["release.current"].detail


def test_a_release_python_that_does_not_run(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    make_release(host)
    host.answer("setpriv", code=1, err="Traceback\nModuleNotFoundError: No module named 'x'")
    assert "ModuleNotFoundError" in check_release(host, monkeypatch)["release.python"].detail


def test_root_starts_no_python_that_others_may_change(host: FakeHost) -> None:
    make_release(host)
    (host.root / "opt/nox/releases/1.2.3-abc/venv/bin/python3").chmod(0o777)
    found = {one.id: one for one in debug.check_release(host.facts())}
    assert found["release.trust"].state == "fail"
    assert found["release.python"].state == "skip"
    assert host.ran == []


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (
            '[{"release": "1-a", "healthy": ""}, {"release": "2-b", "healthy": "2023-11-14"}]',
            "ok",
        ),
        ('[{"release": "2-b", "since": "2020-01-01T00:00:00Z", "healthy": ""}]', "warn"),
        ('[{"release": "2-b", "since": "2023-11-14T22:10:00Z", "healthy": ""}]', "ok"),
        ("[]", "skip"),
        ("{damaged", "warn"),
        ('{"other": 1}', "warn"),
    ],
)
def test_the_manifest(host: FakeHost, text: str, state: str) -> None:
    host.write(debug.MANIFEST, text)
    assert host.find("release.manifest", debug.check_manifest).state == state


# --- units ---


def show(**changes: str) -> str:
    """What `systemctl show` says of three healthy units, but for `front_…` and `runner_…`."""
    blocks = []
    for key, name in (
        ("front", debug.FRONT),
        ("runner", debug.RUNNER),
        ("socket", "nox-runner.socket"),
    ):
        unit = {
            "Id": name,
            "LoadState": "loaded",
            "ActiveState": "active",
            "SubState": "running",
            "UnitFileState": "enabled",
            "Result": "success",
            "NRestarts": "0",
            "MainPID": "0",
            "NeedDaemonReload": "no",
            "ActiveEnterTimestampMonotonic": "1000000",
        }
        for change, value in changes.items():
            if change.startswith(f"{key}_"):
                unit[change[len(key) + 1 :]] = value
        blocks.append("\n".join(f"{key}={value}" for key, value in unit.items()))
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize(
    ("changes", "check", "state", "said"),
    [
        ({}, "units.front", "ok", "active for 4 min"),
        ({"front_ActiveState": "inactive"}, "units.front", "fail", "inactive"),
        (
            {"front_ActiveState": "failed", "front_Result": "exit-code"},
            "units.front",
            "fail",
            "failed (exit-code",
        ),
        (
            {"front_ActiveState": "failed", "front_Result": "start-limit-hit"},
            "units.front",
            "fail",
            "start limit",
        ),
        (
            {
                "front_ActiveState": "activating",
                "front_SubState": "auto-restart",
                "front_NRestarts": "7",
            },
            "units.front",
            "fail",
            "7 times",
        ),
        ({"front_NRestarts": "2"}, "units.front", "warn", "restarted 2 times"),
        (
            {
                "front_ActiveState": "failed",
                "front_Result": "exit-code",
                "front_NRestarts": "5",
                "front_Restart": "always",
            },
            "units.front",
            "fail",
            "start limit",
        ),
        ({"front_ActiveState": "activating", "front_SubState": "start"}, "units.front", "fail", "not ready yet"),
        (
            {"front_ActiveState": "failed", "front_Result": "exit-code", "front_ExecMainStatus": "78"},
            "units.front",
            "fail",
            "refuses its settings",
        ),
        (
            {"front_ActiveState": "activating", "front_SubState": "auto-restart", "front_ExecMainStatus": "203"},
            "units.front",
            "fail",
            "can't be started",
        ),
        ({"front_LoadState": "masked"}, "units.front", "fail", "masked"),
        ({"front_LoadState": "not-found"}, "units.front", "fail", "no such unit"),
        ({"runner_ActiveState": "inactive"}, "units.runner", "ok", "idle"),
        ({"front_UnitFileState": "disabled"}, "units.enabled", "warn", debug.FRONT),
        ({"runner_UnitFileState": "disabled"}, "units.enabled", "ok", "enabled"),
        ({"front_NeedDaemonReload": "yes"}, "units.changed", "warn", debug.FRONT),
    ],
)
def test_units(host: FakeHost, changes: dict[str, str], check: str, state: str, said: str) -> None:
    host.write("/proc/uptime", "241.00 400.00\n")
    host.answer("systemctl show", out=show(**changes))
    host.answer("journalctl", out='{"level": "error", "event": "refused", "reason": "no token"}')
    found = host.find(check, debug.check_units)
    assert found.state == state
    assert said in found.detail
    if "start limit" in said:
        assert found.help == "sudo systemctl reset-failed nox-api.service && sudo systemctl start nox-api.service"
        assert "no token" in found.cause


def test_units_without_systemd_are_skipped(host: FakeHost) -> None:
    host.answer("systemctl", code=1, err="System has not been booted with systemd")
    checks = list(debug.check_units(host.facts()))
    assert {check.state for check in checks} == {"skip"}
    assert "not been booted" in checks[0].detail


def test_a_service_that_still_runs_an_older_release(host: FakeHost) -> None:
    make_release(host, "2-b")
    host.answer("systemctl show", out=show(front_MainPID="42"))
    line = "7f00-7f01 r-xp 0 08:01 5 /opt/nox/releases/{}/venv/lib/x.so\n"
    host.write("/proc/42/maps", line.format("1-a"))
    found = host.find("units.release", debug.check_running_release)
    assert found.state == "warn"
    assert "1-a" in found.detail and "2-b" in found.detail
    host.write("/proc/42/maps", line.format("2-b"))
    assert host.find("units.release", debug.check_running_release).state == "ok"


def test_a_service_older_than_the_switch_where_its_memory_is_hidden(host: FakeHost) -> None:
    make_release(host)
    host.answer("systemctl show", out=show(front_MainPID="42"))
    host.write("/proc/42/stat", "42 (a) b) S " + " ".join(["0"] * 18) + " 100 0\n")
    host.write("/proc/stat", "btime 1000\n")
    assert host.find("units.release", debug.check_running_release).state == "warn"
    host.write("/proc/stat", f"btime {int(time.time())}\n")
    assert host.find("units.release", debug.check_running_release).state == "ok"


def test_the_runner_socket(host: FakeHost) -> None:
    assert host.find("runner.socket", debug.check_runner_socket).state == "fail"
    path = host.write(debug.SOCKET, "")
    assert "not a socket" in host.find("runner.socket", debug.check_runner_socket).detail
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        # Through a short name: a socket's path has at most 107 characters.
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        listening.bind(f"/proc/self/fd/{fd}/{path.name}")
        os.close(fd)
        path.chmod(0o600)
        ids = f"{os.getuid()}:x:{os.getgid()}:"
        assert "expected 0600 nox-api" in host.find("runner.socket", debug.check_runner_socket).detail
        host.write("/etc/passwd", f"nox-api:x:{os.getuid()}:{ids}")
        host.write("/etc/group", f"nox-api:x:{os.getgid()}:\n")
        assert host.find("runner.socket", debug.check_runner_socket).state == "ok"
        path.chmod(0o666)
        assert host.find("runner.socket", debug.check_runner_socket).state == "fail"


# --- network ---

TCP = """  sl  local_address rem_address st tx_queue rx_queue tr tm->when retrnsmt uid timeout inode
   0: {address}:1F90 00000000:0000 {state} 0:0 00:0 0 {uid} 0 777 1
"""


def listen(host: FakeHost, uid: int = 990, address: str = "0100007F", state: str = "0A") -> None:
    host.write("/proc/net/tcp", TCP.format(address=address, state=state, uid=uid))


def hold(host: FakeHost, name: str, unit: str) -> None:
    fd = host.root / "proc/55/fd"
    fd.mkdir(parents=True)
    (fd / "3").symlink_to("socket:[777]")
    host.write("/proc/55/comm", f"{name}\n")
    host.write("/proc/55/cgroup", f"0::/system.slice/{unit}\n")


@pytest.mark.skipif(sys.byteorder != "little", reason="the sample is a little-endian kernel's")
@pytest.mark.parametrize(
    ("raw", "address"),
    [
        ("0100007F", "127.0.0.1"),
        ("00000000", "0.0.0.0"),
        ("00000000000000000000000001000000", "::1"),
    ],
)
def test_listeners_are_read_from_proc(raw: str, address: str) -> None:
    (found,) = debug.read_listeners(TCP.format(address=raw, state="0A", uid=5))
    assert found == debug.Listener(address, 8080, 5, "777")
    assert list(debug.read_listeners(TCP.format(address=raw, state="01", uid=5))) == []


def test_the_port_of_nox_in_the_right_hands(host: FakeHost) -> None:
    host.config()
    listen(host)
    hold(host, "python3", "nox-api.service")
    found = host.find("port.listen", debug.check_port)
    assert found.state == "ok"
    assert "python3 (pid 55, nox-api.service)" in found.detail


def test_without_root_the_port_is_the_one_nox_listens_on(host: FakeHost) -> None:
    host.config(NOX_PORT=9999)
    listen(host)
    facts = host.facts(euid=1000)
    facts.__dict__["parsed"] = None
    assert (facts.address, facts.port) == ("127.0.0.1", 8080)
    assert next(debug.check_port(facts)).state == "ok"


def test_nobody_listens(host: FakeHost) -> None:
    host.config()
    listen(host, state="01")
    checks = list(debug.check_port(host.facts()))
    assert checks[0].state == "fail"
    problems = {one.id for one in debug.find_problems(checks)}
    assert problems == {"problem.connection_refused"}


def test_another_program_on_the_port_is_named_and_gets_no_token(host: FakeHost, server: Server) -> None:
    host.config(NOX_PORT=server.port)
    row = TCP.replace("1F90", f"{server.port:04X}").format(address="0100007F", state="0A", uid=33)
    host.write("/proc/net/tcp", row)
    hold(host, "apache2", "apache2.service")
    facts = host.facts()
    (found,) = debug.check_port(facts)
    assert found.state == "fail"
    assert "apache2 (pid 55, apache2.service)" in found.detail
    (token,) = debug.check_health_detail(facts)
    assert token.state == "skip"
    assert server.tokens == []


def test_nox_on_another_address_than_configured(host: FakeHost) -> None:
    host.config(NOX_BIND_ADDR="127.0.0.2")
    listen(host)
    assert "127.0.0.1:8080" in host.find("port.listen", debug.check_port).detail


def test_health(host: FakeHost, server: Server) -> None:
    host.config(NOX_PORT=server.port)
    found = {one.id: one for one in debug.check_health(host.facts())}
    assert found["health.answer"].state == found["health.latency"].state == "ok"
    assert "version 1.2.3" in found["health.answer"].detail
    assert server.tokens == [None]


def test_health_that_is_unready_or_not_of_nox(host: FakeHost, server: Server) -> None:
    host.config(NOX_PORT=server.port)
    server.status, server.document = 503, {"detail": "Runs are not possible"}
    server.detail = {"detail": "no namespaces here"}
    assert "no namespaces here" in host.find("health.answer", debug.check_health).detail
    server.status, server.document = 200, {"hello": "world"}
    assert "not the health of Nox" in host.find("health.answer", debug.check_health).detail


def test_connection_refused_is_recognised(host: FakeHost) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        host.config(NOX_PORT=unused.getsockname()[1])
        checks = list(debug.check_health(host.facts()))
    assert "connection refused" in checks[0].detail
    assert {one.id for one in debug.find_problems(checks)} == {"problem.connection_refused"}


def test_a_service_that_hangs_is_told_from_one_that_is_gone(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host.config(NOX_PORT=silent.getsockname()[1])
        short = {**debug.http_get.__kwdefaults__, "timeout": 0.05}
        monkeypatch.setattr(debug.http_get, "__kwdefaults__", short)
        assert "no answer within" in host.find("health.answer", debug.check_health).detail


def test_a_token_that_the_service_does_not_know(host: FakeHost, server: Server) -> None:
    host.config(NOX_PORT=server.port, NOX_API_TOKEN="f" * 64)
    checks = list(debug.check_health_detail(host.facts()))
    assert checks[0].state == "fail"
    assert checks[0].help == "sudo systemctl reload nox-api"
    assert {one.id for one in debug.find_problems(checks)} == {"problem.unauthorized"}


@pytest.mark.parametrize(
    ("change", "check", "state", "said"),
    [
        ({}, "health.limits", "ok", "memory, pids"),
        ({}, "health.queue", "ok", "slots 2 of 2, queue 1 of 8"),
        (
            {"limits": {"enforced": {}, "not_enforced": {"memory": "no cgroup"}}},
            "health.limits",
            "warn",
            "memory (no cgroup)",
        ),
        ({"queue": {"used": 8, "total": 8}}, "health.queue", "warn", "429"),
        ({"limits": None}, "health.limits", "warn", "nothing about limits"),
    ],
)
def test_the_detail_of_health(
    host: FakeHost, server: Server, change: dict[str, object], check: str, state: str, said: str
) -> None:
    host.config(NOX_PORT=server.port)
    limits = {"enforced": {"memory": "cgroup", "pids": "cgroup"}, "not_enforced": {}}
    slots, queue = {"used": 2, "total": 2}, {"used": 1, "total": 8}
    server.detail = {"limits": limits, "slots": slots, "queue": queue, **change}
    found = host.find(check, debug.check_health_detail)
    assert found.state == state
    assert said in found.detail


@pytest.mark.parametrize(
    ("controllers", "missing", "state"),
    [
        # what this host hasn't: nothing to mend
        ("memory pids", {"cpu_share": "no controller"}, "note"),
        ("", {"cpu_share": "no controllers", "memory_per_run": "no controllers"}, "note"),
        # what this host could
        ("cpuset cpu io memory pids", {"cpu_share": "not delegated"}, "warn"),
        ("cpuset cpu io memory pids", {"memory_per_run": "not delegated"}, "warn"),
        ("", {"cpu_share": "no controllers", "fast_start": "fell back"}, "warn"),
    ],
)
def test_limits_that_the_host_cannot_hold_are_noted(
    host: FakeHost, server: Server, controllers: str, missing: dict[str, str], state: str
) -> None:
    host.config(NOX_PORT=server.port)
    host.write("/sys/fs/cgroup/cgroup.controllers", controllers)
    server.detail = {"limits": {"enforced": {"cpu": "rlimit"}, "not_enforced": missing}}
    checks = list(debug.check_health_detail(host.facts()))
    found = next(check for check in checks if check.id == "health.limits")
    assert found.state == state
    assert all(f"{name} ({why})" in found.detail for name, why in missing.items())
    assert debug.exit_code(checks) == (debug.HEALTHY if state == "note" else debug.DEGRADED)
    assert ("healthy, with notes" in debug.render(checks, "here", colour=False)) == (state == "note")


@pytest.mark.parametrize(
    ("backend", "version", "state"),
    [
        *(("auto", version, "note" if version < 2 else "warn") for version in (0, 1, 2, 7)),
        ("bubblewrap", 7, "note"),  # has no way to it, and was chosen
    ],
)
def test_landlock_is_asked_of_the_kernel(
    host: FakeHost, server: Server, monkeypatch: pytest.MonkeyPatch, backend: str, version: int, state: str
) -> None:
    monkeypatch.setattr(debug, "landlock_version", lambda: version)
    host.config(NOX_PORT=server.port, NOX_BACKEND=backend)
    server.detail = {"limits": {"enforced": {"cpu": "rlimit"}, "not_enforced": {"landlock": "none"}}}
    assert host.find("health.limits", debug.check_health_detail).state == state


def test_the_version_of_landlock_is_a_number_wherever_it_is_asked() -> None:
    assert 0 <= debug.landlock_version() < 100


@pytest.mark.parametrize(
    ("used", "files", "outcome"), [(0, 0, "ok"), (950, 0, "low"), (1000, 0, "full"), (0, 92, "low"), (1200, 5, "full")]
)
def test_the_sandbox_quota(host: FakeHost, server: Server, used: int, files: int, outcome: str) -> None:
    host.config(NOX_PORT=server.port)
    server.detail = {"sandbox": {"bytes": used, "quota_bytes": 1000, "files": files, "quota_files": 100}}
    found = host.find("health.quota", debug.check_health_detail)
    assert found.outcome == outcome
    assert f"{files} of 100 entries" in found.detail


# --- proxy ---


@pytest.mark.parametrize(
    ("text", "name", "port"),
    [
        ("nox.example.org {\n}", "nox.example.org", 443),
        (
            "# managed\n\n{\n\tadmin off\n}\n(snip) {\n\theader x\n}\nhttps://a.b:8443, c {\n}",
            "a.b",
            8443,
        ),
        (":443 {\n}", "localhost", 443),
        ("{$NOX_HOST} {\n}", "localhost", 443),
        ("[::1]:444 {\n}", "::1", 444),
        ("*.example.org {\n}", "localhost", 443),
        ("", "localhost", 443),
    ],
)
def test_caddy_sites(text: str, name: str, port: int) -> None:
    site = debug.read_caddy_site(text)
    assert (site.proxy, site.name, site.port) == ("caddy", name, port)


def test_nginx_sites() -> None:
    text = """# server_name old.example;
    server { listen 80; server_name _; return 301 https://$host$request_uri; }
    server {
        listen [::]:8443 ssl http2;
        server_name nox.example www.nox.example;
        ssl_certificate /etc/ssl/nox.pem;
    }"""
    assert debug.read_nginx_site(text) == debug.Site("nginx", "nox.example", 8443, "/etc/ssl/nox.pem")
    assert debug.read_nginx_site("server { listen 443 ssl; }").name == "localhost"


DAY = 86400


@pytest.mark.parametrize(
    ("lifetime", "left", "state"),
    [
        (90 * DAY, 60 * DAY, "ok"),
        (90 * DAY, 13 * DAY, "warn"),
        (DAY / 2, DAY / 4, "ok"),  # Caddy's local certificates
        (DAY / 2, DAY / 20, "warn"),
        (3650 * DAY, 15 * DAY, "ok"),
        (90 * DAY, -DAY, "fail"),
    ],
)
def test_certificates_are_judged_by_their_lifetime(lifetime: float, left: float, state: str) -> None:
    check = debug.check_certificate(NOW, NOW + left - lifetime, NOW + left, "a command")
    assert check.state == state


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost with its key, in one file."""
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
            "-days",
            "30",
            "-subj",
            "/O=Test CA",
            "-addext",
            "subjectAltName=DNS:localhost",
            "-addext",
            "keyUsage=critical,keyCertSign,digitalSignature",
        ],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    whole = directory / "whole.pem"
    whole.write_text((directory / "cert.pem").read_text() + (directory / "key.pem").read_text())
    return whole


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    running = Server(context)
    yield running
    running.stop()


def real_time(host: FakeHost) -> Any:
    return debug.Facts(debug.Host(host.root, 0, debug.run))


def test_https_is_verified_against_the_local_authority(host: FakeHost, tls_server: Server, certificate: Path) -> None:
    host.write(debug.CADDY_ROOT, certificate.read_text())
    site = debug.read_caddy_site(f"localhost:{tls_server.port} {{")
    found = {one.id: one for one in debug.check_https(real_time(host), site)}
    assert found["proxy.https"].state == "ok"
    assert "this host's own Test CA" in found["proxy.https"].detail
    assert found["proxy.certificate"].detail in ("valid for 30 days", "valid for 29 days")


def test_https_is_verified_against_the_certificate_that_the_site_names(
    host: FakeHost, tls_server: Server, certificate: Path
) -> None:
    host.write("/etc/nox/tls/server.crt", certificate.read_text())
    site = f"https://localhost:{tls_server.port} {{\n\ttls /etc/nox/tls/server.crt /key\n}}"
    text = f"(snippet) {{\n\theader x\n}}\n{site}"
    found = {one.id: one for one in debug.check_https(real_time(host), debug.read_caddy_site(text))}
    assert found["proxy.https"].state == "ok"


def test_an_unverified_certificate_is_called_that_and_gets_no_token(host: FakeHost, tls_server: Server) -> None:
    host.config()
    site = debug.Site("caddy", "localhost", tls_server.port)
    found = {one.id: one for one in debug.check_https(real_time(host), site)}
    assert found["proxy.https"].state == "warn"
    assert "can't be verified" in found["proxy.https"].detail
    assert found["proxy.certificate"].state == "ok"
    assert set(tls_server.tokens) == {None}


def test_a_certificate_for_another_name_is_not_ok(host: FakeHost, tls_server: Server, certificate: Path) -> None:
    host.write(debug.CADDY_ROOT, certificate.read_text())
    site = debug.Site("caddy", "other.example", tls_server.port)
    found = {one.id: one for one in debug.check_https(real_time(host), site)}
    assert found["proxy.https"].state == "warn"
    assert "other.example" in found["proxy.https"].detail


def test_proxy_configurations_are_checked_by_the_proxy_itself(host: FakeHost) -> None:
    host.answer("nginx -t", code=1, err="nginx: [emerg] unknown directive\nnginx: test failed")
    found = host.find("proxy.config", lambda facts: debug.check_proxy_config(facts, debug.Site("nginx")))
    assert (found.state, found.detail) == ("fail", "nginx: [emerg] unknown directive")
    host.answer("setpriv --reuid=caddy --regid=caddy --init-groups -- caddy validate")
    found = host.find("proxy.config", lambda facts: debug.check_proxy_config(facts, debug.Site("caddy")))
    assert found.state == "ok"


# --- firewall ---

RULES = """*filter
### RULES ###

### tuple ### limit tcp 2222 0.0.0.0/0 any 0.0.0.0/0 in comment=737368
-A ufw-user-input -p tcp --dport 2222
### tuple ### allow tcp 80,443 0.0.0.0/0 any 0.0.0.0/0 Nginx%20Full - in
### tuple ### deny tcp 9000 0.0.0.0/0 any 0.0.0.0/0 in
### tuple ### allow tcp 9000:9010 0.0.0.0/0 any 0.0.0.0/0 in_eth0
### tuple ### allow any any 0.0.0.0/0 any 10.0.0.0/8 in
### tuple ### allow udp 53 0.0.0.0/0 any 0.0.0.0/0 in
### tuple ### allow tcp 25 0.0.0.0/0 any 0.0.0.0/0 out
### tuple ### route:allow tcp 8080 0.0.0.0/0 any 0.0.0.0/0 in
"""


@pytest.mark.parametrize(
    ("port", "allowed"),
    [
        (2222, True),
        (80, True),
        (443, True),
        (9000, False),
        (9010, True),
        (9011, False),
        (53, False),
        (25, False),
        (22, False),
        (8080, False),
    ],
)
def test_ufw_rules(port: int, allowed: bool) -> None:
    assert debug.port_allowed(RULES, port) is allowed


def test_a_firewall_that_shuts_ssh_out_and_lets_the_api_in(host: FakeHost) -> None:
    host.config()
    host.write("/etc/ufw/ufw.conf", "ENABLED=yes\n")
    host.write("/etc/ufw/user.rules", RULES.replace("tcp 80,443", "tcp 80,8080"))
    host.write(debug.CADDY_SITE, "localhost {\n}\n")
    host.answer("ufw status", out="Status: active\n")
    host.answer("sshd -T", out="port 22\naddressfamily any\n")
    found = {one.id: one for one in debug.check_firewall(host.facts())}
    assert found["firewall.ssh"].help == "sudo ufw allow 22/tcp"
    assert found["firewall.web"].detail == "not allowed: 443"
    assert found["firewall.api"].state == "warn"
    host.answer("ufw status", out="Status: inactive\n")
    assert host.find("firewall.active", debug.check_firewall).state == "warn"


# --- logs ---


def request(status: int, path: str = "/files", **more: object) -> dict[str, object]:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(NOW - 60))
    return {
        "time": moment,
        "level": "info",
        "event": "request",
        "method": "GET",
        "path": path,
        "status": status,
        "duration_ms": 5.0,
        **more,
    }


def write_log(host: FakeHost, records: list[dict[str, object]]) -> None:
    lines = [json.dumps(record) for record in records]
    host.write(debug.LOG, "\n".join(["not json", *lines, ""]))


@pytest.mark.parametrize(
    ("records", "check", "state", "problem"),
    [
        ([request(401)] * 6 + [request(200)], "logs.unauthorized", "warn", "problem.unauthorized"),
        ([request(401)] * 6 + [request(200)] * 20, "logs.unauthorized", "ok", None),
        ([request(500, "/run_py")], "logs.runs", "warn", "problem.run_errors"),
        (
            [request(200, "/run_sh", run_status="sandbox_error")],
            "logs.runs",
            "warn",
            "problem.run_errors",
        ),
        ([request(400, "/run_py")] * 5, "logs.runs", "warn", "problem.run_errors"),
        ([request(200, "/run_py", run_status="timeout")] * 9, "logs.runs", "ok", None),
        ([request(200, duration_ms=6000.0)], "logs.slow", "warn", "problem.slow"),
        ([request(200, "/run_py", duration_ms=19000.0)], "logs.slow", "ok", None),
        ([request(429, "/run_py")], "logs.slow", "warn", "problem.slow"),
        ([dict(request(500, "/run_py"), time="2020-01-01T00:00:00Z")], "logs.runs", "ok", None),
    ],
)
def test_what_the_log_points_to(
    host: FakeHost, records: list[dict[str, object]], check: str, state: str, problem: str | None
) -> None:
    write_log(host, records)
    checks = list(debug.check_requests(host.facts()))
    assert {one.id: one.state for one in checks}[check] == state
    found = {one.id for one in debug.find_problems(checks) if one.state != "ok"}
    assert found == ({problem} if problem else set())


def test_recent_errors_come_from_error_log_and_journal(host: FakeHost) -> None:
    assert host.find("logs.errors", debug.check_errors).state == "ok"
    record = dict(request(500), level="error", event="broken")
    host.write(debug.ERROR_LOG, json.dumps(dict(record, level="warning")) + "\n")
    assert host.find("logs.errors", debug.check_errors).state == "ok"
    host.write(debug.ERROR_LOG, json.dumps(record) + "\n")
    found = host.find("logs.errors", debug.check_errors)
    assert found.state == "warn"
    assert "broken" in found.detail


def test_log_directory_and_rotation(host: FakeHost) -> None:
    assert host.find("logs.dir", debug.check_logs).state == "fail"
    host.write(debug.LOG, "", 0o640)
    directory = host.root / "var/log/nox-api"
    directory.chmod(0o750)
    found = {one.id: one for one in debug.check_logs(host.facts())}
    assert found["logs.dir"].state == "ok"
    assert found["logs.files"].detail == "missing: /var/log/nox-api/error.log"
    assert found["logs.rotate"].state == "warn"
    (directory / "nox-api.log").chmod(0o644)
    assert "nox-api.log" in host.find("logs.dir", debug.check_logs).detail
    (directory / "nox-api.log").chmod(0o640)
    directory.chmod(0o777)
    assert host.find("logs.dir", debug.check_logs).state == "warn"
    rotate = host.write(debug.LOGROTATE, "", 0o666)
    assert "ignores" in host.find("logs.rotate", debug.check_logs).detail
    rotate.chmod(0o644)
    if os.geteuid() == 0:
        assert host.find("logs.rotate", debug.check_logs).state == "ok"


def test_logs_shows_the_last_lines_of_each_log(host: FakeHost, capsys: pytest.CaptureFixture[str]) -> None:
    host.config()
    write_log(host, [request(200, f"/files/{number}") for number in range(5)])
    host.answer("journalctl", out="a line\n")
    assert debug.main(["logs", "--lines", "2"], host.facts().host) == 0
    output = capsys.readouterr().out
    assert "GET /files/4 200 5.0 ms" in output
    assert "/files/2" not in output
    assert "== journal nox-runner.service\na line" in output
    journal = [argv for argv in host.ran if argv[0] == "journalctl"]
    assert all(argv[argv.index("-n") + 1] == "2" for argv in journal)


def test_the_tail_of_a_large_file_starts_at_a_whole_line(host: FakeHost) -> None:
    host.write("/big", "".join(f"line {number}\n" for number in range(1000)))
    assert host.facts().host.tail("/big", 25) == ["line 998", "line 999"]


# --- the record ---

UTILS = SCRIPT.parents[3] / "plugins/module_utils"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="what root alone may change belongs to root")


@pytest.fixture
def installed(host: FakeHost) -> Iterator[FakeHost]:
    """A host with the state check's own files, as role nox_tools installs them."""
    bytecode = sys.dont_write_bytecode, sys.pycache_prefix
    for name in host_state.PACKAGE:
        text = "" if name == "__init__" else (UTILS / f"{name}.py").read_text()
        host.write(f"{debug.STATE_CHECK}/{name}.py", text)
    yield host
    sys.dont_write_bytecode, sys.pycache_prefix = bytecode
    for name in [name for name in sys.modules if name.startswith("nox_host_state")]:
        del sys.modules[name]


@pytest.fixture
def tool(installed: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tool in a record, on a host that has nothing else which could differ."""
    state = debug.load_state_check(installed.facts().host)
    for name in ("compare_release", "compare_disk", "compare_settings", "compare_sockets"):
        monkeypatch.setattr(state, name, lambda *_: [])
    path = installed.write("/tool", "as installed", 0o755)
    entry = {"role": "nox_tools", **state.describe(str(path), True)}
    record: dict[str, Any] = {"version": 1, "about": {}, "sandbox": "/s", "release": "x", "paths": {str(path): entry}}
    record |= {"accounts": {}, "packages": {}, "units": {}}
    state.write_record(installed.root / debug.STATE_RECORD[1:], record)
    return path


def compared(host: FakeHost, *before: Any, euid: int = 0) -> Any:
    facts = host.facts(euid)
    facts.checks += before
    (check,) = debug.check_record(facts)
    return check


@as_root
def test_a_host_as_the_roles_left_it(installed: FakeHost, tool: Path) -> None:
    check = compared(installed)
    assert check.state == "ok"
    assert "1 paths, 0 units" in check.detail
    assert "findings" not in check.as_json()
    assert not list(installed.path_of_package().rglob("__pycache__"))


@as_root
def test_what_differs_is_named_with_what_mends_it(installed: FakeHost, tool: Path) -> None:
    tool.unlink()
    check = compared(installed)
    assert (check.state, check.outcome, check.help) == ("warn", "differs", "make repair")
    assert check.detail.endswith(f"path.missing {tool}")
    (finding,) = check.as_json()["findings"]
    assert (finding["id"], finding["owner"], finding["expected"]) == ("path.missing", "nox_tools", "file")


@as_root
def test_what_another_finding_names_is_not_a_second_problem(installed: FakeHost, tool: Path) -> None:
    tool.chmod(0o777)
    warned = debug.say("logs.rotate", "ignored", path=tool, mode="0777", owner="root:root")
    check = compared(installed, warned)
    assert (check.state, check.outcome) == ("skip", "named")
    assert debug.exit_code([warned, check]) == 1, "as grave as the other finds it"
    assert [finding["id"] for finding in check.findings] == ["path.mode"]
    assert compared(installed, debug.say("logs.rotate", "ok", path=tool)).outcome == "differs"


@as_root
def test_an_edit_is_said_although_its_effect_is(installed: FakeHost, tool: Path) -> None:
    tool.write_text("edited")
    warned = debug.say("logs.rotate", "ignored", path=tool, mode="0777", owner="root:root")
    assert "path.changed" in compared(installed, warned).detail


@as_root
@pytest.mark.parametrize(
    ("owner", "severity", "count", "command"),
    [
        ("nox_release", "warn", 1, "make repair"),
        ("nox_release", "fail", 5, "make repair"),
        ("operator", "warn", 1, "make drift"),
        ("operator", "fail", 1, "make drift"),
    ],
)
def test_drift_alone_breaks_no_host(
    installed: FakeHost,
    tool: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: str,
    severity: str,
    count: int,
    command: str,
) -> None:
    state = debug.load_state_check(installed.facts().host)
    one = state.Finding("clock.behind", owner, "clock", "a", "b", severity)
    record = dict.fromkeys(("paths", "units", "packages", "accounts"), ())
    monkeypatch.setattr(state, "look", lambda path: ("drifted", [one] * count, record))
    check = compared(installed)
    assert (check.state, check.outcome, check.help) == ("warn", "differs", command)
    assert check.detail.count("clock.behind") == min(count, 3)
    assert ("and 2 more" in check.detail) == (count == 5)


@as_root
@pytest.mark.parametrize("record", [None, "{", '{"version": 0}', '{"version": 1}'])
def test_no_record_or_a_damaged_one(installed: FakeHost, record: str | None) -> None:
    if record is not None:
        installed.write(debug.STATE_RECORD, record, 0o600)
    check = compared(installed)
    assert (check.state, check.outcome) == ("warn", "norecord")
    assert debug.STATE_RECORD in check.detail


@as_root
def test_a_record_of_a_kind_that_no_version_writes(installed: FakeHost) -> None:
    state = debug.load_state_check(installed.facts().host)
    state.write_record(installed.root / debug.STATE_RECORD[1:], {"version": 1})
    check = compared(installed)
    assert (check.state, check.outcome) == ("warn", "failed")
    assert debug.STATE_RECORD in check.detail


@as_root
def test_no_state_check_or_a_broken_one(host: FakeHost, installed: FakeHost) -> None:
    installed.write(f"{debug.STATE_CHECK}/brought.py", "(")
    check = compared(installed)
    assert (check.outcome, check.help) == ("broken", "make repair")
    assert "SyntaxError" in check.detail
    shutil.rmtree(installed.path_of_package())
    assert (compared(installed).state, compared(installed).outcome) == ("warn", "missing")


@as_root
@pytest.mark.parametrize("damage", ["mode", "owner", "link", "directory", "parent", "beside"])
def test_nothing_is_run_that_others_may_change(installed: FakeHost, damage: str) -> None:
    directory = installed.path_of_package()
    file = directory / "brought.py"
    file.write_text("raise SystemExit('was run')")
    if damage == "mode":
        file.chmod(0o666)
    elif damage == "owner":
        os.chown(file, 990, 990)
    elif damage == "link":
        file.rename(installed.root / "elsewhere.py")
        file.symlink_to(installed.root / "elsewhere.py")
    elif damage == "beside":
        (directory / "brought").mkdir()
        os.chown(directory / "brought", 990, 990)
    else:
        (directory if damage == "directory" else directory.parent).chmod(0o777)
    check = compared(installed)
    assert (check.state, check.outcome) == ("warn", "untrusted")


def test_without_root_the_record_is_unseen(installed: FakeHost) -> None:
    check = compared(installed, euid=1000)
    assert (check.state, check.help) == ("skip", "sudo nox-debug")


def test_only_the_full_report_has_it() -> None:
    assert [mode for mode, checks in debug.MODES.items() if debug.check_record in checks] == ["full"]
    assert debug.FULL_CHECKS[-1] is debug.check_record, "it leaves out what the others have named"


@pytest.mark.parametrize(
    ("finding", "what", "check", "named"),
    [
        ("unit.inactive", "nox-api.service", ("units.front", "inactive", {"state": "inactive", "unit": "x"}), True),
        ("unit.inactive", "caddy.service", ("proxy.service", "down", {"name": "caddy", "state": "x"}), True),
        ("unit.stale", "nox-runner.service", ("runner.socket", "missing", {"path": "/run/nox-runner.sock"}), False),
        ("socket.closed", "nox-runner.socket", ("runner.socket", "missing", {"path": "/run/nox-runner.sock"}), True),
        ("unit.stale", "nox-api.service", ("config.file", "missing", {"path": "/etc/default/nox-api"}), False),
        ("settings.line", "/etc/default/nox-api:7", ("config.file", "missing", {"path": "/etc/default/nox-api"}), True),
        (
            "path.mode",
            "/etc/default/nox-api",
            ("config.mode", "wide", {"path": "/etc/default/nox-api", "mode": "", "owner": ""}),
            True,
        ),
        ("path.mode", "/opt/nox", ("release.current", "missing", {"path": "/opt/nox/current"}), False),
        ("path.owner", "/var/log/nox-api", ("logs.size", "large", {"path": "/var/log/nox-api", "size": "1"}), True),
        ("path.changed", "/var/log/nox-api", ("logs.size", "large", {"path": "/var/log/nox-api", "size": "1"}), False),
        (
            "certificate.bad",
            "10.0.0.1",
            ("proxy.https", "timeout", {"url": "https://10.0.0.1/health", "seconds": 3}),
            True,
        ),
        ("package.missing", "caddy", ("proxy.service", "down", {"name": "caddy", "state": "x"}), False),
    ],
)
def test_what_counts_as_named(finding: str, what: str, check: tuple[str, str, dict[str, Any]], named: bool) -> None:
    name, outcome, values = check
    assert debug.is_named(finding, what, [debug.say(name, outcome, **values)]) == named


# --- the program itself ---


def test_commands_that_are_missing_or_hang_do_not_raise() -> None:
    assert debug.run("no-such-command").code == 127
    assert debug.run("sleep", "5", timeout=0.05).code == 124
    assert debug.run("sh", "-c", "echo $HOME$NOX_API_TOKEN").out == "\n"


def test_it_runs_alone_and_is_executable() -> None:
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    ended = subprocess.run([sys.executable, "-I", str(SCRIPT), "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout == f"nox-debug {debug.VERSION}\n"
