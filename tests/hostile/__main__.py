"""Attack a living Nox with every case, and tell what came of each.

    python -m tests.hostile --url https://HOST --token-file FILE [--ca FILE] [--host 'ssh root@HOST'] [CASE…]

After each case the service must be healthy, an honest run right and prompt, and, where `--host` gives a command that
runs a line of shell there as root, nothing may be left. The token comes from the file, or from NOX_TOKEN. Exit codes:
0 all passed (what the service itself says it can't enforce on this host is listed apart), 1 some failed, 2 usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from tests.hostile.cases import CASES, Case
from tests.hostile.target import PREFIX, Failed, Host, NotEnforced, Target

PROMPT_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    number: int
    case: str
    expected: str
    got: str
    verdict: str
    next_run_ms: int


def main() -> int:
    options = arguments()
    token = Path(options.token_file).read_text().strip() if options.token_file else os.environ.get("NOX_TOKEN", "")
    if not token:
        print("no token: give --token-file or NOX_TOKEN", file=sys.stderr)
        return 2
    target = Target(options.url, token, options.ca)
    clean(target)
    host = Host(options.host) if options.host else None
    verdicts = []
    for case in CASES:
        if options.case and case.number not in options.case:
            continue
        verdicts.append(verdict := tried(case, target, host))
        if not options.json:
            print(f"{verdict.number:2} {verdict.verdict:17} {verdict.case}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=1))
    else:
        print(table(verdicts))
        if host is None:
            print("What is left on the host was not looked at: no --host")
    return 1 if any(verdict.verdict == "FAILED" for verdict in verdicts) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__.partition("\n")[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--token-file", metavar="FILE")
    parser.add_argument("--ca", metavar="FILE")
    parser.add_argument("--host", metavar="COMMAND", help="runs a line of shell on the host as root")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("case", nargs="*", type=int, help="only these numbers")
    return parser.parse_args()


def tried(case: Case, target: Target, host: Host | None) -> Verdict:
    """Attack, then see how the service is."""
    verdict, took = "passed", 0.0
    try:
        got = case.attack(target)
    except NotEnforced as reason:
        verdict, got = "not enforced here", str(reason)
    except (Failed, OSError, KeyError, ValueError) as error:
        verdict, got = "FAILED", f"{type(error).__name__}: {error}"
    try:
        took = honest_run(target)
        clean(target)
        if host and (left := host.left()):
            raise Failed(f"left behind: {left}")
    except (Failed, OSError, KeyError, ValueError) as error:
        verdict, got = "FAILED", f"{got}; afterwards: {error}"
    return Verdict(case.number, case.title, case.expected, got, verdict, round(took * 1000))


def honest_run(target: Target) -> float:
    """Health and a run, both right; how long the run took in seconds."""
    if target.health()["status"] != "ok":
        raise Failed("unhealthy")
    started = time.monotonic()
    result = target.python("print(6 * 7)")
    took = time.monotonic() - started
    if (result["status"], result["stdout"]) != ("ok", "42\n"):
        raise Failed(f"the next run: {result}")
    if took > PROMPT_SECONDS:
        raise Failed(f"the next run took {took:.1f} s")
    return took


def clean(target: Target) -> None:
    """Remove what the suite made in the sandbox."""
    target.shell(f"find . -mindepth 1 -maxdepth 1 -name '{PREFIX}*' -exec chmod -R u+rwx {{}} + -exec rm -rf {{}} +")


def table(verdicts: list[Verdict]) -> str:
    def row(number: object, case: str, expected: str, got: str, next_run: object, verdict: str) -> str:
        return f"{number!s:>2}  {case[:56]:56}  {expected[:40]:40}  {verdict:17}  {next_run!s:>7}  {got[:110]}"

    lines = [row("", "case", "expected", "got", "next ms", "verdict")]
    lines += [row(v.number, v.case, v.expected, " ".join(v.got.split()), v.next_run_ms, v.verdict) for v in verdicts]
    count = {word: sum(v.verdict == word for v in verdicts) for word in ("passed", "FAILED", "not enforced here")}
    return "\n".join([*lines, "", ", ".join(f"{number} {word}" for word, number in count.items())])


if __name__ == "__main__":
    sys.exit(main())
