from __future__ import annotations

from collections.abc import Callable

import httpx
from service import Service


def samples(nox: Service) -> dict[str, float]:
    with nox.client() as client:
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    lines = [line for line in response.text.splitlines() if line and line[0] != "#"]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_metrics(own: Callable[..., Service]) -> None:
    nox = own(NOX_QUOTA_FILES=777).start()
    assert httpx.get(f"{nox.url}/metrics").status_code == 401
    nox.put("f", b"12345")
    nox.python("pass")
    nox.python("1/0")
    nox.shell("true")
    with nox.client() as client:
        client.post("/run_sh", json={"cmd": "reboot"})
        client.get("/files/some/path")
        client.request("PURGE", "/coffee/of-the-client")
    found = samples(nox)
    expected = {
        'nox_runs_total{language="python",status="ok"}': 1,
        'nox_runs_total{language="python",status="error"}': 1,
        'nox_runs_total{language="sh",status="ok"}': 1,
        'nox_runs_refused_total{reason="policy"}': 1,
        'nox_runs_refused_total{reason="queue_full"}': 0,
        'nox_run_duration_seconds_count{language="python"}': 2,
        'nox_http_requests_total{method="POST",route="/run_py",status="200"}': 2,
        'nox_http_requests_total{method="GET",route="/files/{path:path}",status="404"}': 1,
        'nox_http_requests_total{method="GET",route="none",status="401"}': 1,
        'nox_http_requests_total{method="other",route="none",status="404"}': 1,
        "nox_slots": 4,
        "nox_slots_used": 0,
        "nox_queue": 32,
        "nox_runner_up": 1,
        "nox_sandbox_files": 1,
        "nox_sandbox_quota_files": 777,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert any(name.startswith('nox_build_info{python="3.') for name in found)
    assert nox.token not in "".join(found)
