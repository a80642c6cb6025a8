"""docs/troubleshooting.md and its French twin, kept true: each symptom is inflicted on a lab host, and its advice followed.

    python -m tests.troubleshooting [CHECK/OUTCOME …]      # without names: all, in the page's order

The pages mark what nox-debug says of a symptom by `says: CHECK/OUTCOME`, and the commands that help by `do`; without a `do` the
command that nox-debug names helps. For each: the damage of `SYMPTOMS`, nox-debug in both languages, which must find that
outcome under the page's heading and print the page's lines, then the page's commands, after which nox-debug finds nothing.
Exit codes: 0 passed, 1 failed, 2 usage.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tests.guides import fits
from tests.on_hosts import BIN, ROOT, lab

LAB, HOST = "troubleshooting", "nox1"
PAGES = {"C.UTF-8": "troubleshooting.md", "fr_FR.UTF-8": "troubleshooting.fr.md"}
MARK = re.compile(
    r"^## (?P<title>[^\n]+)$|^<!-- (?P<mark>says: (?P<id>[a-z_]+\.[a-z_]+/[a-z]+)|do) -->\n```\w+\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
CONFIG = "/etc/default/nox-api"
CADDY = "/etc/caddy/sites-enabled/nox-api.caddy"
SANDBOX = "/home/nox/nox/sandbox"
UNIT = "/etc/systemd/system/nox-api.service"
RECORD = "/var/lib/nox/state.json"
STATE_CHECK = "/usr/local/share/nox/host_state"
SETTINGS = "/root/settings"  # a copy of the good ones: what an operator's editor leaves
OVERRIDE = f"{UNIT}.d/override.conf"
CURL = "curl --silent --output /dev/null --header 'Content-Type: application/json'"
TOKEN = f'--header "Authorization: Bearer $(sed -n s/^NOX_API_TOKEN=//p {CONFIG})"'
RUN = "http://127.0.0.1:8080/run_py"


class Symptom(NamedTuple):
    """`command` brings it about; `undo` takes away what no advice of ours is meant to."""

    command: str
    undo: str = ""


def setting(name: str, value: str, then: str = "systemctl restart nox-api || true") -> Symptom:
    return Symptom(f"sed -i 's|^{name}=.*|{name}={value}|' {CONFIG}; {then}", f"cp -p {SETTINGS} {CONFIG}")


def override(lines: str, start: str = "restart") -> Symptom:
    """As `systemctl edit nox-api` would write it."""
    return Symptom(
        f"mkdir {UNIT}.d; printf '[Service]\\n{lines}\\n' > {OVERRIDE}; systemctl daemon-reload; systemctl {start} nox-api || true",
        f"rm -rf {UNIT}.d; systemctl daemon-reload",
    )


def without_account(name: str) -> Symptom:
    """As a botched edit of the account files leaves it."""
    return Symptom(f"sed -i '/^{name}:/d' /etc/passwd /etc/shadow /etc/group /etc/gshadow")


def filled(options: str, command: str) -> Symptom:
    """A disk of its own for the sandbox, filled with what is older than a week."""
    return Symptom(
        f"mount -t tmpfs -o {options},uid=nox,gid=nox,mode=0755 disk {SANDBOX}; cd {SANDBOX}; {command}; "
        f"touch -d '8 days ago' {SANDBOX}/old*",
        f"umount {SANDBOX}",
    )


def quota(kib: int) -> Symptom:
    """A quota of 1 MiB, and that much of it in use."""
    return Symptom(
        f"sed -i 's/^NOX_QUOTA_BYTES=.*/NOX_QUOTA_BYTES=1M/' {CONFIG}; setpriv --reuid=nox --regid=nox --init-groups "
        f"dd if=/dev/zero of={SANDBOX}/old bs=1K count={kib} status=none; touch -d '8 days ago' {SANDBOX}/old; "
        "systemctl restart nox-runner nox-api",
        f"cp -p {SETTINGS} {CONFIG}; systemctl restart nox-runner nox-api",
    )


def certificate(start: str, end: str) -> Symptom:
    """A certificate of the operator's own in Caddy's site; as openssl 3.0 gives one that has ended."""
    return Symptom(
        "mkdir -p /root/ca; cd /root/ca; : > index; echo 01 > serial; "
        "openssl req -newkey rsa:2048 -nodes -keyout key -out request -subj /CN=nox -addext subjectAltName=DNS:localhost,"
        "DNS:$(hostname),IP:127.0.0.1,IP:$(hostname -I | cut -d' ' -f1) 2> /dev/null; "
        "printf '[ca]\\ndefault_ca=b\\n[b]\\ndatabase=index\\nserial=serial\\nnew_certs_dir=.\\ndefault_md=sha256\\npolicy=p\\n"
        "copy_extensions=copy\\n[p]\\ncommonName=supplied\\n' > config; "
        f"openssl ca -batch -config config -selfsign -keyfile key -in request -out made -notext "
        f"-startdate {start} -enddate {end} 2> /dev/null; "
        "install -m 0640 -g caddy key /etc/caddy/key; install -m 0644 made /etc/caddy/made; "
        f"sed -i 's|tls internal|tls /etc/caddy/made /etc/caddy/key|' {CADDY}; systemctl reload caddy",
        "rm -rf /root/ca /etc/caddy/key /etc/caddy/made",
    )


def moment(days: float) -> str:
    """So many days from now, as `openssl ca` takes it."""
    return time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + days * 86400))


OTHER_PROGRAM = Symptom(
    "systemctl stop nox-api; systemd-run --quiet --unit=other-program python3 -m http.server 8080 --bind 127.0.0.1; "
    "until curl --silent --output /dev/null http://127.0.0.1:8080; do :; done; systemctl start --no-block nox-api",
    "systemctl stop other-program || true",
)
STOPPED_RUNNER = "kill -STOP $(systemctl show -p MainPID --value nox-runner)"
STOPPED_FRONT = "kill -STOP $(systemctl show -p MainPID --value nox-api)"
MANIFEST = (
    "import json; path = '/opt/nox/manifest.json'; known = json.load(open(path)); "
    "known[-1].update(since='2020-01-01T00:00:00Z', healthy=''); json.dump(known, open(path, 'w'))"
)
# Two runs of 30 s, where one may run and one may wait.
BUSY = (
    f"sed -i 's/^NOX_SLOTS=.*/NOX_SLOTS=1/; s/^NOX_QUEUE=.*/NOX_QUEUE=1/; s/^NOX_TIMEOUT=.*/NOX_TIMEOUT=60/' {CONFIG}; "
    "systemctl restart nox-runner nox-api; for n in 1 2; do systemd-run --quiet --collect --unit=busy$n "
    f'{CURL} {TOKEN} --data \'{{"code":"import time; time.sleep(30)"}}\' {RUN}; done; '
    f'until curl --silent {TOKEN} http://127.0.0.1:8080/health | grep -q \'"queue":{{"used":1\'; do :; done'
)
IDLE = f"cp -p {SETTINGS} {CONFIG}; systemctl stop busy1 busy2; systemctl restart nox-runner nox-api"

NOT_INSTALLED = "install.present/missing"
SYMPTOMS = {
    NOT_INSTALLED: Symptom("true"),  # what the test begins with
    # ── the service doesn't start
    "install.present/partly": Symptom(f"rm {UNIT}; systemctl daemon-reload"),
    "config.file/missing": Symptom(f"rm {CONFIG}"),
    "config.file/broken": Symptom(f"rm {CONFIG}; mkdir {CONFIG}"),
    "config.token/missing": Symptom(f"sed -i '/^NOX_API_TOKEN=/d' {CONFIG}; systemctl restart nox-api || true"),
    "config.token/placeholder": setting("NOX_API_TOKEN", "replace_with_secure_token")._replace(
        undo=""
    ),  # repair has made another token, which stays
    "config.token/short": setting("NOX_API_TOKEN", "s3cret")._replace(undo=""),
    "config.values/bad": setting("NOX_MEMORY", "lots"),
    "config.values/unknown": Symptom(f"echo NOX_SLOT=4 >> {CONFIG}"),
    "users.front/missing": without_account("nox-api"),
    "users.runner/missing": without_account("nox"),
    "release.current/missing": Symptom("rm /opt/nox/current"),
    "release.current/dangling": Symptom("ln -sfn releases/gone /opt/nox/current"),
    "release.python/missing": Symptom("rm -r /opt/nox/current/venv"),
    "release.python/packages": Symptom("rm -r /opt/nox/current/venv/lib/python3*/site-packages/uvicorn*"),
    "release.python/broken": Symptom(
        "cd /opt/nox/current/venv/lib/python3*/site-packages/uvicorn; rm -r __pycache__; echo nonsense > __init__.py"
    ),
    "release.manifest/unhealthy": Symptom(f'python3 -c "{MANIFEST}"'),
    "release.manifest/broken": Symptom("echo '{{' > /opt/nox/manifest.json"),
    "units.front/missing": Symptom(f"rm {UNIT}; systemctl daemon-reload"),
    "units.front/masked": Symptom(f"ln -sf /dev/null {UNIT}; systemctl daemon-reload"),
    "units.front/inactive": Symptom("systemctl stop nox-api"),
    "units.front/settings": setting("NOX_TIMEOUT", "0"),
    "units.front/program": override("ExecStart=\\nExecStart=/opt/nox/nothing"),
    "units.front/starting": override("ExecStart=\\nExecStart=/bin/sleep 300", "restart --no-block"),
    "units.front/looping": override("ExecStart=\\nExecStart=/bin/false\\nRestartSec=300"),
    "units.front/limit": Symptom(
        f"mkdir {UNIT}.d; printf '[Unit]\\nStartLimitIntervalSec=3600\\nStartLimitBurst=3\\n[Service]\\nExecStart=\\nExecStart=/bin/false\\n' "
        f"> {OVERRIDE}; systemctl daemon-reload; systemctl restart nox-api; "
        f"until systemctl --quiet is-failed nox-api; do :; done; rm -r {UNIT}.d; systemctl daemon-reload"
    ),
    "units.front/failed": override("ExecStart=\\nExecStart=/bin/false\\nRestart=no"),
    "units.front/flapping": Symptom(
        "systemctl kill --signal=KILL nox-api; until systemctl show -p NRestarts nox-api | grep -q =1; do :; done; "
        "until systemctl --quiet is-active nox-api; do :; done"
    ),
    "units.changed/yes": Symptom(f"touch {UNIT}"),
    # ── connection refused
    "config.port/port": setting("NOX_PORT", "eighty"),
    "config.port/address": setting("NOX_BIND_ADDR", "nowhere"),
    "config.port/foreign": setting("NOX_BIND_ADDR", "192.0.2.1", "systemctl restart --no-block nox-api"),
    "config.port/exposed": setting("NOX_BIND_ADDR", "0.0.0.0"),
    "port.listen/none": Symptom("systemctl stop nox-api"),
    "port.listen/elsewhere": Symptom(
        f"sed -i 's/^NOX_BIND_ADDR=.*/NOX_BIND_ADDR=127.0.0.2/' {CONFIG}; systemctl restart nox-api; cp -p {SETTINGS} {CONFIG}"
    ),
    "port.listen/conflict": OTHER_PROGRAM,
    "health.answer/refused": Symptom("systemctl stop nox-api"),
    "health.answer/timeout": Symptom(STOPPED_FRONT),
    "health.answer/unready": Symptom(STOPPED_RUNNER),
    "health.answer/other": OTHER_PROGRAM,
    # ── 401
    "health.token/refused": Symptom(f"sed -i 's/^NOX_API_TOKEN=.*/NOX_API_TOKEN={'0123456789abcdef' * 4}/' {CONFIG}"),
    "logs.unauthorized/many": Symptom(
        f"for n in $(seq 20); do {CURL} --header 'Authorization: Bearer old' http://127.0.0.1:8080/files; done"
    ),
    # ── 400, 500
    "sandbox.dir/missing": Symptom(f"mv {SANDBOX} /root/sandbox", "rm -r /root/sandbox"),
    "sandbox.dir/notdir": Symptom(f"mv {SANDBOX} /root/sandbox; touch {SANDBOX}", "rm -r /root/sandbox"),
    "sandbox.dir/owner": Symptom(f"chown root:root {SANDBOX}"),
    "sandbox.dir/mode": Symptom(f"chmod 0777 {SANDBOX}"),
    "sandbox.write/no": Symptom(f"chmod 0555 {SANDBOX}"),
    "sandbox.space/low": filled("size=4M", "dd if=/dev/zero of=old bs=1K count=3800 status=none"),
    "sandbox.space/full": filled("size=4M", "dd if=/dev/zero of=old bs=1K count=4096 status=none"),
    "sandbox.inodes/low": filled("nr_inodes=100", "touch old$(seq -s ' old' 93)"),
    "sandbox.inodes/full": filled("nr_inodes=100", "touch old$(seq -s ' old' 99)"),
    "health.quota/low": quota(950),
    "health.quota/full": quota(1024),
    "runner.socket/missing": Symptom("rm /run/nox-runner.sock"),
    "runner.socket/notsocket": Symptom("rm /run/nox-runner.sock; touch /run/nox-runner.sock"),
    "runner.socket/owner": Symptom("chown root:root /run/nox-runner.sock"),
    "logs.runs/client": Symptom(f"for n in $(seq 6); do {CURL} {TOKEN} --data '{{}}' {RUN}; done"),
    "logs.runs/server": Symptom(
        f'rm /run/nox-runner.sock; {CURL} {TOKEN} --data \'{{"code":"1"}}\' {RUN}; systemctl restart nox-runner.socket'
    ),
    # ── proxy
    "proxy.site/both": Symptom("mkdir -p /etc/nginx/sites-enabled; touch /etc/nginx/sites-enabled/nox-api"),
    "proxy.service/down": Symptom("systemctl stop caddy"),
    "proxy.config/bad": Symptom(f"echo 'nonsense {{{{' >> {CADDY}"),
    "proxy.https/unverified": certificate(moment(-90), moment(-3)),
    "proxy.https/status": Symptom(STOPPED_RUNNER),
    "proxy.https/timeout": Symptom("systemctl stop nox-api"),
    "proxy.https/refused": Symptom("systemctl stop caddy"),
    "proxy.certificate/soon": certificate(moment(-80), moment(10)),
    "proxy.certificate/expired": certificate(moment(-90), moment(-3)),
    "proxy.redirect/plain": Symptom(f"sed -i 's|redir https.*|respond 200|' {CADDY}; systemctl reload caddy"),
    "firewall.web/shut": Symptom("ufw delete allow 443/tcp"),
    # ── slow
    "health.queue/full": Symptom(BUSY, IDLE),
    "logs.slow/slow": Symptom(
        f"head --bytes=200K /dev/zero > /tmp/upload; for n in $(seq 8); do {CURL} {TOKEN} --limit-rate 100K "
        "--form file=@/tmp/upload --form path=upload$n http://127.0.0.1:8080/put & done; wait",
        f"rm /tmp/upload {SANDBOX}/upload*",
    ),
    "logs.slow/full": Symptom(f'{BUSY}; {CURL} {TOKEN} --data \'{{"code":"1"}}\' {RUN}', IDLE),
    "logs.size/large": Symptom(
        "truncate --size=1100M /var/log/nox-api/nox-api.log.1; chown nox-api:adm /var/log/nox-api/*"
    ),
    # ── none of these
    "config.mode/wide": Symptom(f"chmod 0644 {CONFIG}"),
    "config.mode/group": Symptom(f"chmod 0640 {CONFIG}"),
    "config.mode/owner": Symptom(f"chown nox-api:nox-api {CONFIG}"),
    "release.trust/loose": Symptom("chown nox /opt/nox/current/venv/bin"),
    "units.enabled/no": Symptom("systemctl disable nox-api"),
    "units.release/old": Symptom(
        "cp -a $(readlink -f /opt/nox/current) /opt/nox/releases/0.0.1-0123456789ab; ln -sfn releases/0.0.1-0123456789ab /opt/nox/current",
        "ln -sfn releases/{release} /opt/nox/current; rm -r /opt/nox/releases/0.0.1-0123456789ab; systemctl restart nox-runner nox-api",
    ),
    "firewall.active/inactive": Symptom("ufw disable"),
    "firewall.api/open": Symptom("ufw allow 8080/tcp"),
    "logs.dir/missing": Symptom("rm -r /var/log/nox-api"),
    "logs.dir/wide": Symptom("chmod 0777 /var/log/nox-api"),
    "logs.files/missing": Symptom("rm /var/log/nox-api/error.log"),
    "logs.rotate/missing": Symptom("rm /etc/logrotate.d/nox-api"),
    "logs.rotate/ignored": Symptom("chmod 0666 /etc/logrotate.d/nox-api"),
    "logs.errors/some": Symptom(
        f"sed -i 's/^NOX_TIMEOUT=.*/NOX_TIMEOUT=0/' {CONFIG}; systemctl restart nox-api; cp -p {SETTINGS} {CONFIG}; systemctl restart nox-api"
    ),
    "record.drift/differs": Symptom("rm /usr/local/bin/nox-monitor"),
    "record.drift/norecord": Symptom(f"rm {RECORD}"),
    "record.drift/failed": Symptom(  # whole, but of a kind that no version writes
        'python3 -c \'import hashlib, json; one = {"version": 1}; text = json.dumps(one).encode(); '
        f'print(json.dumps({{**one, "digest": hashlib.sha256(text).hexdigest()}}))\' > {RECORD}'
    ),
    "record.drift/missing": Symptom(f"rm -r {STATE_CHECK}"),
    "record.drift/untrusted": Symptom(f"chmod 0777 {STATE_CHECK}"),
    "record.drift/broken": Symptom(f"echo '(' >> {STATE_CHECK}/host_state.py"),
}
# Findings that stand on no page, and why: none of them can be brought about on a lab host without harm to what else it stands on.
NOT_SHOWN = {
    "units.runner/*": "the texts of units.front",
    "units.socket/*": "the texts of units.front",
    "units.release/older": "only where a process hides its files from root",
    "health.latency/slow": "a slow network inside the host, which a lab's kernel can't have",
    "health.limits/missing": "a runner that holds less than its host could: the sandbox itself would have to be broken",
    "health.limits/silent": "an older release",
    "firewall.ssh/shut": "the test would shut itself out",
    "host.load/high": "the machine is shared",
    "host.memory/low": "the machine is shared",
    "tool.error/error": "a fault in nox-debug",
}


# ── The pages


@dataclass(frozen=True)
class Entry:
    """What a page says of one outcome of one check."""

    id: str
    heading: str
    says: tuple[str, ...]
    do: tuple[str, ...]

    @property
    def mended_by_repair(self) -> bool:
        return self.do[-1] == "make repair"


def read_page(name: str) -> list[Entry]:
    """The entries of a page, in its order."""
    entries: list[Entry] = []
    heading = ""
    for found in MARK.finditer((ROOT / "docs" / name).read_text(encoding="utf-8")):
        lines = tuple((found["text"] or "").splitlines())
        if found["title"]:
            heading = found["title"]
        elif found["id"]:
            named = (
                lines[-1].partition(":")[2].strip()
            )  # cause and command are the last lines, the command after a colon
            entries.append(Entry(found["id"], heading, lines, (named,)))
        elif entries:
            entries[-1] = replace(entries[-1], do=lines)
    return entries


def rounds(entries: list[Entry]) -> list[list[Entry]]:
    """One symptom after the other; but what one repair can mend at once, one of a kind each, is mended by one repair."""
    found: list[list[Entry]] = []
    for entry in entries:
        if entry.mended_by_repair:
            taken = (set[str]().union(*map(kinds, one)) for one in found)
            open_ones = (
                one for one, has in zip(found, taken, strict=True) if one[0].mended_by_repair and not kinds(entry) & has
            )
            if (one := next(open_ones, None)) is not None:
                one.append(entry)
                continue
        found.append([entry])
    return found


# What nox-debug tells an installation by: where all of them are gone, nothing is installed.
INSTALLED_BY = ("install.present/partly", "config.file/missing", "release.current/missing")


def kinds(entry: Entry) -> set[str]:
    name = entry.id.partition(".")[0]
    found = {"units" if name == "install" else name}
    if entry.id in INSTALLED_BY:
        found.add("install")
    if name == "config":
        found.add("sandbox")  # which the settings name
    return found


# ── The host


def ssh(command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    words = (sys.executable, "-m", "lab", "ssh", f"--lab={LAB}", HOST, command)
    return subprocess.run(words, cwd=ROOT, text=True, capture_output=True, input=stdin)


def install_file(source: str, destination: str, mode: str) -> None:
    done = ssh(f"install -D -m {mode} /dev/stdin {destination}", (ROOT / source).read_text(encoding="utf-8"))
    if done.returncode:
        sys.exit(f"{destination}: {done.stderr}")


def ask() -> tuple[set[str], dict[str, str]]:
    """What nox-debug finds wrong, "check/outcome" each, and what it prints in each language."""
    asked = "".join(f"(LC_ALL={locale} nox-debug > /run/said.{locale}) & " for locale in PAGES)
    done = ssh(
        f"{asked} nox-debug --json > /run/said; wait; cd /run; head -c -0 -v said {' '.join(f'said.{one}' for one in PAGES)}"
    )
    texts = re.split(r"(?m)^\n?==> said\S* <==\n", done.stdout)[1:]
    return findings(texts[0]), dict(zip(PAGES, texts[1:], strict=True))


def findings(document: str) -> set[str]:
    """The findings in a JSON report, but for the machine's own load: others work on it, too."""
    wrong = [check for check in json.loads(document)["checks"] if check["state"] in ("warn", "fail")]
    return {f"{check['id']}/{check['outcome']}" for check in wrong if not check["id"].startswith(("problem.", "host."))}


def follow(commands: tuple[str, ...], inventory: Path) -> str:
    """Do what the page says; what went wrong, "" if nothing."""
    for command in (part for line in commands for part in line.split(" && ")):
        verb = re.fullmatch(r"(?:sudo )?make (\w+)|ansible-playbook playbooks/(\w+)\.yml", command)
        if verb:
            playbook = f"playbooks/{verb[1] or verb[2]}.yml"
            words = (BIN / "ansible-playbook", "-i", inventory, playbook)
            done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, stdin=subprocess.DEVNULL)
        else:
            # An operator's editor puts back what was right, and an operator agrees to what is asked.
            done = ssh(f"export SUDO_EDITOR=/root/editor; {command}", "y\n")
        if done.returncode:
            return f"{command}: status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
    return ""


# What is being started is neither healthy nor ill.
SETTLE = (
    "for unit in nox-runner.socket nox-runner nox-api; do "
    "timeout 60 sh -c 'while systemctl show -p ActiveState $0 | grep -q activating; do sleep 0.1; done' $unit; done"
)
# As if an hour had passed: nothing of a symptom is left in the logs, and no restart is counted.
FORGET = (
    "journalctl --quiet --rotate --vacuum-size=1K; rm -f /var/log/nox-api/*.log.*; systemctl reset-failed; "
    "for log in /var/log/nox-api/*.log; do : > $log; done"
)
EDITOR = (
    f"cp -p {CONFIG} {SETTINGS}; printf '#!/bin/sh\\ncat {SETTINGS} > $1\\n' > /root/editor; chmod 0755 /root/editor"
)


def differs(entry: Entry, text: str) -> str:
    """Where a report differs from what a page quotes; "" where it doesn't."""
    lines = text.splitlines()
    start = next(
        (
            number
            for number, line in enumerate(lines)
            if re.fullmatch(rf"  {re.escape(entry.heading)}( \(\S+\))?", line)
        ),
        None,
    )
    if start is None:
        return f"nothing stands under the heading {entry.heading!r}"
    shown = [line[4:] for line in itertools.takewhile(lambda line: line.startswith("    "), lines[start + 1 :])]
    size = len(entry.says)
    for first in range(len(shown) - size + 1):
        if all(map(fits, entry.says, shown[first : first + size])):
            return ""
    return "the page quotes\n" + "\n".join(entry.says) + "\nnox-debug prints\n" + "\n".join(shown)


# ── The test


def try_round(entries: list[tuple[Entry, ...]], inventory: Path, release: str) -> Iterator[str]:
    """Inflict, ask, follow the advice, ask again → what went wrong, if anything."""
    for pair in entries:
        done = ssh(SYMPTOMS[pair[0].id].command)
        found, texts = ask()
        if pair[0].id not in found:
            yield f"{pair[0].id}: not found, but {' '.join(sorted(found))}; inflicted with: {done.stdout}{done.stderr}"
        for entry, locale in zip(pair, PAGES, strict=True):
            if wrong := differs(entry, texts[locale]):
                yield f"{entry.id}, {PAGES[locale]}: {wrong}"
        commands = pair[0].do[:-1] if pair[0].mended_by_repair else pair[0].do
        if wrong := follow(commands, inventory):
            yield f"{pair[0].id}: {wrong}"
    if entries[0][0].mended_by_repair and (wrong := follow(("make repair",), inventory)):
        yield wrong
    ssh(SETTLE)
    undo = [SYMPTOMS[pair[0].id].undo.format(release=release) for pair in entries]
    ssh("; ".join([*filter(None, undo), FORGET, EDITOR]))
    if left := findings(ssh("nox-debug --json").stdout):
        yield f"still found after the advice: {' '.join(sorted(left))}"


def main(chosen: list[str]) -> None:
    pages = {locale: read_page(name) for locale, name in PAGES.items()}
    if unknown := set(chosen) - {entry.id for entry in pages["C.UTF-8"]}:
        print(f"on no page: {' '.join(sorted(unknown))}", file=sys.stderr)
        sys.exit(2)
    first, *others = pages.values()
    twins = {
        entry.id: tuple(next(one for one in page if one.id == entry.id) for page in (first, *others)) for entry in first
    }
    wanted = [entry for entry in first if entry.id == NOT_INSTALLED or not chosen or entry.id in chosen]
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="nox-troubleshooting-") as place, lab(LAB, Path(place), HOST):
        install_file("roles/nox_tools/files/nox-debug", "/usr/local/bin/nox-debug", "0755")
        install_file("roles/nox_tools/files/nox-debug.fr", "/usr/local/share/nox/nox-debug.fr", "0644")
        for group in rounds(wanted):
            names = " ".join(entry.id for entry in group)
            begun = time.monotonic()
            release = ssh("readlink /opt/nox/current").stdout.strip().rpartition("/")[2]
            wrong = list(try_round([twins[entry.id] for entry in group], Path(place), release))
            print(f"{'FAILED' if wrong else 'mended'} {time.monotonic() - begun:6.1f} s  {names}", flush=True)
            print("".join(f"{line}\n" for line in wrong), end="", flush=True)
            failures += wrong
            if wrong and group[0].id != NOT_INSTALLED:
                follow(("make repair",), Path(place))  # the next ones begin on a healthy host
                ssh(f"{FORGET}; {EDITOR}")
    print(f"\n{len(wanted)} symptoms in {len(PAGES)} languages, {len(failures)} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
