"""What NOX_HISTORY costs a run: two services on loopback, one with it and one without, asked in turn.

    cd app && PYTHONPATH=tests:. PYTHON ../tests/bench/history_cost.py [PAIRS]

PYTHON is one with the service's test dependencies (requirements/app-test.lock). Prints medians, and the median of the
differences within pairs: both halves of a pair meet the same load of the machine.
"""

from __future__ import annotations

import statistics
import sys
import time

import httpx
from service import Service


def timed(client: httpx.Client) -> float:
    started = time.perf_counter()
    answer = client.post("/run_py", json={"code": "print('hello')"})
    took = (time.perf_counter() - started) * 1000
    assert answer.json()["stdout"] == "hello\n", answer.text
    return took


def main(pairs: int) -> None:
    services = {setting: Service(NOX_HISTORY=setting).start() for setting in ("off", "on")}
    try:
        clients = {setting: service.client() for setting, service in services.items()}
        for pause, name in ((0.0, "back to back"), (0.03, "30 ms apart")):
            times: dict[str, list[float]] = {"off": [], "on": []}
            for number in range(pairs):
                for setting in ("off", "on") if number % 2 else ("on", "off"):
                    times[setting].append(timed(clients[setting]))
                    time.sleep(pause)
            differences = [on - off for on, off in zip(times["on"], times["off"], strict=True)]
            off, on = (statistics.median(times[setting]) for setting in ("off", "on"))
            print(f"{name}: off {off:.2f} ms, on {on:.2f} ms; difference {statistics.median(differences):+.2f} ms")
        kept = services["on"].detail()["history"]
        print(
            f"recorded {kept['recorded']}, dropped {kept['dropped']}, {kept['bytes'] / kept['recorded']:.0f} bytes a run"
        )
    finally:
        for service in services.values():
            service.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
