"""What the verifier's tests share: the lab's inventory, the scenario's proxy, a client on this side of the network."""

from __future__ import annotations

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testinfra.utils.ansible_runner import AnsibleRunner

INVENTORY = Path(os.environ["NOX_INVENTORY"])
PROXY = {"default": "caddy", "nginx": "nginx", "repair": "caddy"}[os.environ["MOLECULE_SCENARIO_NAME"]]
# The damage matrix asks every test after every damage: there four of them repeat less and try fewer ports.
SHORT = os.environ.get("NOX_CHECK") == "short"

Client = Callable[..., tuple[int, dict[str, str], Any]]


@pytest.fixture(scope="session")
def addresses() -> dict[str, str]:
    """Host → address of this scenario's lab."""
    # testinfra has asked ansible-inventory already
    hosts = AnsibleRunner.get_runner(str(INVENTORY)).inventory["_meta"]["hostvars"]
    return {name: values["ansible_host"] for name, values in hosts.items()}


@pytest.fixture
def name(host: Any) -> str:
    return str(host.backend.get_hostname()) if hasattr(host.backend, "get_hostname") else str(host.backend.host)


@pytest.fixture
def token(host: Any) -> str:
    return str(host.check_output("sed -n 's/^NOX_API_TOKEN=//p' /etc/default/nox-api"))


@pytest.fixture
def client(host: Any, name: str, token: str, addresses: dict[str, str]) -> Client:
    """Requests from this side through the proxy, TLS verified with the certificate the playbook brought home."""
    context = ssl.create_default_context(cafile=str(INVENTORY / f".ca/{name}.crt"))

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), Stay)

    def call(
        method: str, path: str, body: Any = None, bearer: str = token, scheme: str = "https"
    ) -> tuple[int, dict[str, str], Any]:
        request = urllib.request.Request(
            f"{scheme}://{addresses[name]}{path}",
            data=json.dumps(body).encode() if body is not None else None,
            method=method,
            headers={"Content-Type": "application/json"},
        )
        if bearer:
            request.add_header("Authorization", f"Bearer {bearer}")
        try:
            answer = opener.open(request, timeout=30)
        except urllib.error.HTTPError as error:
            answer = error
        text = answer.read()
        kind = answer.headers.get("Content-Type", "")
        return answer.status, dict(answer.headers.items()), json.loads(text) if "json" in kind else text

    return call
