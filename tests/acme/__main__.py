"""Certificates from a real ACME authority: obtained, served and renewed by Caddy and by Nginx with certbot.

    python -m tests.acme

Three lab hosts: an authority (Caddy's acme_server, certificates of 12 hours), one Nox behind Caddy, one behind Nginx. They
get the settings an operator would give them. While certificates change, a client goes on asking, with TLS verified
against the authority's root; not one request may fail. Exit codes: 0 passed, 1 failed.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.on_hosts import BIN, lab, on, run

LAB = "acme"
SITES = ("caddy1", "nginx1")
AUTHORITY = "/var/lib/caddy/.local/share/caddy/pki/authorities/local/root.crt"

# Caddy looks every 10 minutes for certificates of which less than a third of their life is left. Here: every second,
# for those older than some seconds. All else is what the role configured; a reload brings that back.
HURRY = """
admin='curl --silent --show-error --fail --http1.0 --header Host: --unix-socket /var/lib/caddy/admin.sock http://localhost'
$admin/config/ | python3 -c '
import json, sys
config = json.load(sys.stdin)
automation = config["apps"]["tls"]["automation"]
automation["renew_interval"] = 10**9
for policy in automation["policies"]:
    policy["renewal_window_ratio"] = 0.9999
json.dump(config, sys.stdout)' | $admin/load --header 'Content-Type: application/json' --data @-
"""


def settings(proxy: str, names: bool) -> dict[str, Any]:
    """The inventory an operator would write."""
    hosts: dict[str, dict[str, Any]] = {host: {"nox_domain": f"{host}.nox.test"} for host in SITES}
    hosts["nginx1"]["nox_proxy_kind"] = proxy
    if names:
        for host in SITES:
            hosts[host]["nox_proxy_names"] = [f"www.{host}.nox.test"]
    shared = {
        "nox_proxy_acme_email": "ops@nox.test",
        "nox_proxy_acme_directory": "https://ca.nox.test/acme/local/directory",
    }
    return {"nox": {"hosts": hosts, "vars": shared}}


@dataclass
class Site:
    """One Nox, as a client with the authority's root sees it."""

    address: str
    name: str
    context: ssl.SSLContext
    serials: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    answers: int = 0

    def ask(self, name: str = "") -> str:
        """GET /health over a fresh, verified connection → the certificate's serial number."""
        host = name or self.name
        with socket.create_connection((self.address, 443), timeout=10) as plain:
            connection = self.context.wrap_socket(plain, server_hostname=host)
            shown = connection.getpeercert() or {}
            client = http.client.HTTPConnection(host)
            client.sock = connection
            client.request("GET", "/health")
            answer = client.getresponse()
            body = json.loads(answer.read())
            client.close()
        if (answer.status, body.get("status")) != (200, "ok"):
            raise ValueError(f"{answer.status} {body}")
        return str(shown["serialNumber"])

    @contextmanager
    def asked_all_the_time(self) -> Iterator[None]:
        stop = threading.Event()

        def go_on() -> None:
            while not stop.wait(0.02):
                try:
                    serial = self.ask()
                except (OSError, ValueError, http.client.HTTPException) as error:
                    self.failures.append(repr(error))
                    continue
                self.answers += 1
                if serial not in self.serials:
                    self.serials.append(serial)

        client = threading.Thread(target=go_on)
        client.start()
        try:
            yield
        finally:
            stop.set()
            client.join()

    def wait_for_another(self, known: str, bound: float = 60) -> None:
        end = time.monotonic() + bound
        while self.ask() == known:
            if time.monotonic() > end:
                sys.exit(f"{self.name} still shows the certificate {known} after {bound:.0f} s")
            time.sleep(0.2)


def play(inventory: Path, *words: str) -> str:
    return run(BIN / "ansible-playbook", "-i", inventory, *words)


def install(inventory: Path, *hosts: str) -> str:
    return play(inventory, "playbooks/install.yml", f"--limit={','.join(hosts)}")


def expect(good: bool, otherwise: str) -> None:
    if not good:
        sys.exit(otherwise)


def renew(site: Site, *commands: tuple[str, str]) -> None:
    """Run what renews a site's certificate, while a client goes on asking."""
    known = site.ask()
    with site.asked_all_the_time():
        for host, command in commands:
            on(LAB, host, command)
        site.wait_for_another(known)
        answers = site.answers
        while site.answers < answers + 10 and not site.failures:
            time.sleep(0.05)  # the new one is served to others, too
    print(f"{site.name}: {' then '.join(site.serials)}, {site.answers} answers meanwhile", flush=True)
    expect(not site.failures, f"requests failed during the renewal: {site.failures[:3]}")
    expect(len(site.serials) >= 2, f"the client saw no new certificate: {site.serials}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="nox-acme-") as place:
        inventory = Path(place)
        with lab(LAB, inventory, "ca", *SITES):
            prove(inventory)


def prove(inventory: Path) -> None:
    wanted = inventory / "settings.json"
    wanted.write_text(json.dumps(settings("nginx", names=False)))
    play(inventory, "tests/acme/authority.yml")
    install(inventory, *SITES)
    again = install(inventory, *SITES)
    for host in SITES:
        expect(bool(re.search(rf"(?m)^{host} .*\bchanged=0 ", again)), f"the second run changed {host}")

    known = subprocess.run(
        [BIN / "ansible-inventory", "-i", inventory, "--list"], check=True, capture_output=True, text=True
    )
    hosts = json.loads(known.stdout)["_meta"]["hostvars"]
    context = ssl.create_default_context(cadata=on(LAB, "ca", f"cat {AUTHORITY}"))
    caddy, nginx = (Site(hosts[host]["ansible_host"], f"{host}.nox.test", context) for host in SITES)

    # Nginx: what certbot's timer starts, twice a day; 12 hours of life are due at once.
    on(LAB, "nginx1", "systemctl is-enabled certbot.timer && systemctl is-active certbot.timer")
    renew(nginx, ("nginx1", "systemctl start certbot.service"))
    renew(caddy, ("caddy1", HURRY))
    on(LAB, "caddy1", "systemctl reload caddy.service")
    play(inventory, "playbooks/drift.yml", f"--limit={','.join(SITES)}")

    # A further name: both proxies ask for a certificate that has it.
    wanted.write_text(json.dumps(settings("nginx", names=True)))
    install(inventory, *SITES)
    for site in (caddy, nginx):
        site.ask(f"www.{site.name}")
        site.ask()

    # Nginx makes way for Caddy: certbot has nothing left to renew, and so nothing to fail at.
    wanted.write_text(json.dumps(settings("caddy", names=True)))
    install(inventory, "nginx1")
    nginx.ask(f"www.{nginx.name}")
    on(LAB, "nginx1", "systemctl start certbot.service && ! ls /etc/letsencrypt/renewal/*.conf 2> /dev/null")
    for host in SITES:  # the reference's own check, on the host
        on(LAB, host, "curl --silent --show-error --fail http://localhost/health | grep -q ok")
    print("acme: obtained, served, renewed, widened and handed over")


if __name__ == "__main__":
    main()
