"""The commands of noxctl."""

from __future__ import annotations

import enum
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from noxctl import places, report, rollout
from noxctl.journal import DONE, Journal, Locked, locked
from noxctl.play import End, Options, PlayError, fleet, play
from noxctl.view import STYLES, View, count, printable, show_json, view


class Exit(enum.IntEnum):
    """What a script may rely on."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    STOPPED = 5  # by a gate
    UNREACHABLE = 6
    LOCKED = 7


EXITS = (
    "Exit codes: 0 done, 1 failed on a host, 2 usage, 5 stopped by a gate, 6 hosts unreachable, "
    "7 locked by another run. drift has its own: 0 clean, 2 drifted, 3 not installed, 4 unreachable."
)

app = typer.Typer(
    name="noxctl",
    help="Install, repair and roll out Nox on a fleet. Every verb is a playbook that plain ansible-playbook runs too; "
    "noxctl adds progress, waves with gates, a journal, resume and reports.",
    epilog=EXITS,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Inventory = Annotated[
    Path,
    typer.Option(
        "--inventory", "-i", envvar="NOX_INVENTORY", help="The Ansible inventory, a file or a directory.", exists=True
    ),
]
Limit = Annotated[str, typer.Option("--limit", "-l", help="Only these hosts: Ansible's patterns, such as web1,web2.")]
Check = Annotated[bool, typer.Option("--check", "-C", help="Change nothing, say what would change.")]
Diff = Annotated[bool, typer.Option("--diff", "-D", help="Keep the differences in the run's ansible.log.")]
Extra = Annotated[
    list[str], typer.Option("--extra-vars", "-e", help="name=value or @file, as for ansible-playbook; not for secrets.")
]
Vault = Annotated[list[Path], typer.Option("--vault-password-file", help="As for ansible-playbook.", exists=True)]
Forks = Annotated[int, typer.Option("--forks", "-f", min=1, help="Hosts at a time.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else there.")]


def fail(message: str, code: Exit) -> typer.Exit:
    """Say why on stderr; the exception to raise."""
    Console(stderr=True).print(Text(f"noxctl: {printable(message)}", style="red"), soft_wrap=True)
    return typer.Exit(code)


def agree(question: str, yes: bool) -> None:
    """Ask before harm on a terminal; without one, insist on --yes instead of waiting for nobody."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise fail(f"{question} Nobody can be asked here: say --yes.", Exit.USAGE)
    if not typer.confirm(question, err=True):
        raise typer.Exit(Exit.USAGE)


# ── A verb for each playbook


def outcome(ends: dict[str, End]) -> Exit:
    """The exit code for how hosts came out of one playbook."""
    words = {end.word for end in ends.values()}
    if words & {"failed", "rescued"}:
        return Exit.FAILED
    return Exit.UNREACHABLE if "unreachable" in words else Exit.DONE


def table_of(ends: dict[str, End]) -> Table:
    """One row per host: how it came out, what changed, why not."""
    table = Table("host", "state", "changed", "", box=None, pad_edge=False)
    for host in sorted(ends):
        end = ends[host]
        # the whole was said when it happened, and is in the report
        reason = f"{end.task}: {end.error.splitlines()[0]}" if end.error and end.word != "ok" else ""
        table.add_row(host, Text(end.word, style=STYLES.get(end.word, "")), str(end.changed), printable(reason))
    return table


def run_verb(verb: str, playbook: str, options: Options, *, json_wanted: bool, variables: dict[str, Any]) -> None:
    """Run one playbook over the fleet with progress, journal and lock; ends by typer.Exit."""
    shown = view(json_wanted)
    try:
        hosts = fleet(options)
        with locked(options.inventory, verb):
            journal = Journal()
            run = journal.begin(verb, options.inventory, options={"check": options.check, "limit": options.limit})
            for host in hosts:
                journal.host(run, host, state="running", started=time.time())
            ends = stage(journal, run, verb, playbook, options, shown, hosts, variables)
            code = outcome(ends)
            for host, end in ends.items():
                state = "done" if end.word == "ok" else end.word
                journal.host(run, host, state=state, task=end.task, error=end.error, ended=time.time())
            journal.end(run, "done" if code is Exit.DONE else "failed")
    except Locked as error:
        raise fail(str(error), Exit.LOCKED) from None
    except PlayError as error:
        raise fail(str(error), Exit.USAGE) from None
    if json_wanted:
        show_json({"run": run, "verb": verb, "exit_code": int(code), "hosts": [as_json(ends[host]) for host in ends]})
    else:
        Console().print(table_of(ends))
        if code is not Exit.DONE:
            Console(stderr=True).print(f"More: noxctl report {run}; Ansible's own words: {log_of(run)}", soft_wrap=True)
    raise typer.Exit(code)


def as_json(end: End) -> dict[str, Any]:
    """A host's end as scripts see it."""
    return {"host": end.host, "state": end.word, "changed": end.changed, "task": end.task, "error": end.error}


def log_of(run: str) -> Path:
    """Where Ansible's own output of a run is kept."""
    return places.state() / "runs" / run / "ansible.log"


def stage(
    journal: Journal, run: str, title: str, playbook: str, options: Options, shown: View, hosts: list[str],
    variables: dict[str, Any],
) -> dict[str, End]:  # fmt: skip
    """One playbook over some hosts, seen and written down."""
    shown.begin(title, hosts, journal.usual_seconds(title))
    try:

        def on_event(event: Any) -> None:
            shown.event(event)
            if event.kind != "task":
                journal.step(run, event)

        return play(
            playbook, options, hosts=hosts, variables=variables, log=log_of(run), on_event=on_event, on_tick=shown.tick
        )
    finally:
        shown.end()


def verb(
    name: str, playbook: str, help_text: str, *, question: str = "", variables: dict[str, Any] | None = None
) -> None:
    """Add a command that runs one playbook; with a question where it takes something away."""

    def command(
        inventory: Inventory, limit: Limit = "", check: Check = False, diff: Diff = False, extra: Extra = [],  # noqa: B006
        vault: Vault = [], forks: Forks = 50, yes: Yes = False, json_wanted: Json = False,  # noqa: B006
    ) -> None:  # fmt: skip
        options = Options(inventory, limit, check, diff, forks, extra, vault)
        if question and not check:
            agree(question, yes)
        run_verb(name, playbook, options, json_wanted=json_wanted, variables=variables or {})

    command.__doc__ = help_text
    app.command(name, help=f"{help_text}\n\nPlaybook: playbooks/{playbook}", epilog=EXITS)(command)


verb("install", "install.yml", "Install Nox, or bring hosts to what the inventory says. A second run changes nothing.")
verb("repair", "repair.yml", "Find what is broken and mend it; a healthy host costs one check.")
verb("harden", "harden.yml", "Harden the hosts around Nox; each control has a variable, see docs/hardening.md.")
verb(
    "upgrade",
    "upgrade.yml",
    "Install this checkout's release on all hosts at once, each with its own gate and way back. See rollout for waves.",
)
verb(
    "rollback",
    "rollback.yml",
    "Go back to the last other release that was recorded as healthy on each host.",
    question="Go back to the release before?",
)


@app.command("rotate-token", epilog=EXITS)
def rotate_token(
    inventory: Inventory, limit: Limit = "",
    overlap: Annotated[int, typer.Option(min=0, help="Seconds for which the old token is accepted, too.")] = 3600,
    end: Annotated[bool, typer.Option("--end", help="No new token: the old one ends now.")] = False,
    extra: Extra = [], vault: Vault = [], forks: Forks = 50, yes: Yes = False, json_wanted: Json = False,  # noqa: B006
) -> None:  # fmt: skip
    """Give each host a new token; the old one is accepted beside it for a while.

    Playbook: playbooks/rotate_token.yml
    """
    agree("End the old token now?" if end else f"Give the hosts a new token, the old one ending in {overlap} s?", yes)
    run_verb(
        "rotate-token", "rotate_token.yml", Options(inventory, limit, forks=forks, extra=extra, vault=vault),
        json_wanted=json_wanted, variables={"nox_token_overlap": overlap, "nox_token_end": end},
    )  # fmt: skip


@app.command(epilog=EXITS)
def backup(
    out: Annotated[Path, typer.Argument(help="The directory for HOST-TIME.tar.gz and its .sha256.", file_okay=False)],
    inventory: Inventory, limit: Limit = "", vault: Vault = [], forks: Forks = 50, json_wanted: Json = False,  # noqa: B006
) -> None:  # fmt: skip
    """Bring home one archive per host with settings, token, release, files and history. It holds secrets.

    Playbook: playbooks/backup.yml
    """
    run_verb(
        "backup", "backup.yml", Options(inventory, limit, forks=forks, vault=vault), json_wanted=json_wanted,
        variables={"nox_backup_dir": str(out.resolve())},
    )  # fmt: skip


@app.command(epilog=EXITS)
def restore(
    file: Annotated[Path, typer.Argument(help="The archive; its .sha256 lies beside it.", exists=True, dir_okay=False)],
    inventory: Inventory, limit: Annotated[str, typer.Option("--limit", "-l", help="The host to restore.")],
    over: Annotated[bool, typer.Option("--over", help="Also where Nox is installed.")] = False,
    vault: Vault = [], yes: Yes = False, json_wanted: Json = False,  # noqa: B006
) -> None:  # fmt: skip
    """Make a host the one that was saved.

    Playbook: playbooks/restore.yml
    """
    agree(f"Make {limit} what {file.name} holds{', over what is there' if over else ''}?", yes)
    run_verb(
        "restore", "restore.yml", Options(inventory, limit, vault=vault), json_wanted=json_wanted,
        variables={"nox_restore_from": str(file.resolve()), "nox_restore_over": over},
    )  # fmt: skip


@app.command(epilog=EXITS)
def uninstall(
    inventory: Inventory, limit: Limit = "", check: Check = False, diff: Diff = False,
    keep: Annotated[list[str], typer.Option(help="What stays: config, sandbox, logs, history, packages; may be repeated.")] = [],  # noqa: B006
    vault: Vault = [], forks: Forks = 50, yes: Yes = False, json_wanted: Json = False,  # noqa: B006
) -> None:  # fmt: skip
    """Take Nox off hosts; what others have there stays.

    Playbook: playbooks/uninstall.yml
    """
    if not check:
        agree(
            f"Take Nox off the hosts of {inventory}{', but keep ' + ', '.join(keep) if keep else ', with all its files'}?",
            yes,
        )
    run_verb(
        "uninstall", "uninstall.yml", Options(inventory, limit, check, diff, forks, vault=vault), json_wanted=json_wanted,
        variables={"nox_uninstall_confirm": not check, "nox_uninstall_keep": keep},
    )  # fmt: skip


@app.command(epilog=EXITS)
def support(
    out: Annotated[Path, typer.Argument(help="The directory for HOST.tar.gz.", file_okay=False)],
    inventory: Inventory, limit: Limit = "", vault: Vault = [], forks: Forks = 50, json_wanted: Json = False,  # noqa: B006
) -> None:  # fmt: skip
    """Bring home logs, states and versions for those who help, secrets struck out. Look into it before you send it.

    Playbook: playbooks/support.yml
    """
    run_verb(
        "support", "support.yml", Options(inventory, limit, forks=forks, vault=vault), json_wanted=json_wanted,
        variables={"nox_support_dir": str(out.resolve())},
    )  # fmt: skip


@app.command(epilog=EXITS)
def drift(
    inventory: Inventory, limit: Limit = "", forks: Forks = 50, vault: Vault = [], json_wanted: Json = False,  # noqa: B006
) -> None:  # fmt: skip
    """Compare hosts with what the last install or repair recorded. Changes nothing.

    Playbook: playbooks/drift.yml
    """
    ends = look("drift.yml", Options(inventory, limit, forks=forks, vault=vault), json_wanted, "drift")
    found = [drift_of(end) for _, end in sorted(ends.items())]
    if json_wanted:
        show_json(found)
    else:
        table = Table("host", "state", "findings", box=None, pad_edge=False)
        for one in found:
            texts = [rollout.finding_text(finding) for finding in one["findings"]] or [one["error"]]
            table.add_row(
                one["host"], Text(one["state"], style=STYLES.get(one["state"], "")), printable("\n".join(texts))
            )
        Console().print(table)
    states = {one["state"] for one in found}
    for state, code in (("unreachable", 4), ("failed", 1), ("not installed", 3), ("drifted", 2)):
        if state in states:
            raise typer.Exit(code)


def drift_of(end: End) -> dict[str, Any]:
    """host, state (clean, drifted, not installed, unreachable, failed), findings, error."""
    result = end.results.get("nox_state", {})
    verdict = str(result.get("verdict", ""))
    # the playbook fails a host on purpose when it isn't clean
    state = {"absent": "not installed", "": end.word}.get(verdict, verdict)
    return {
        "host": end.host,
        "state": state,
        "findings": result.get("findings", []),
        "error": "" if verdict else end.error,
    }


def look(
    playbook: str, options: Options, json_wanted: bool, title: str, good: str = "ok", **variables: Any
) -> dict[str, End]:
    """A playbook that changes nothing: no lock, no journal. `good`: what to call a host from which there is an answer."""
    shown = view(json_wanted, good)
    try:
        hosts = fleet(options)
        shown.begin(title, hosts)
        try:
            return play(playbook, options, hosts=hosts, variables=variables, on_event=shown.event, on_tick=shown.tick)
        finally:
            shown.end()
    except PlayError as error:
        raise fail(str(error), Exit.USAGE) from None


# ── status, run, bundle


@app.command(epilog=EXITS)
def status(
    inventory: Inventory, limit: Limit = "", forks: Forks = 50, vault: Vault = [], json_wanted: Json = False,  # noqa: B006
) -> None:  # fmt: skip
    """Show which release each host runs, and how it is.

    Playbook: playbooks/status.yml
    """
    ends = look("status.yml", Options(inventory, limit, forks=forks, vault=vault), json_wanted, "status", "answered")
    found = [rollout.status_of(end) for _, end in sorted(ends.items())]
    if json_wanted:
        show_json(found)
    else:
        console = Console()
        console.print(status_table(found))
        # below, since a sentence beside eight columns is one word wide on a usual terminal
        for one in found:
            if one["problem"] and one["reachable"]:
                console.print(Text(f"{one['host']}: {printable(one['problem'])}", style="red"))
    if not all(one["reachable"] for one in found):
        raise typer.Exit(Exit.UNREACHABLE)
    if not all(one["healthy"] for one in found):
        raise typer.Exit(Exit.FAILED)


def status_table(found: list[dict[str, Any]]) -> Table:
    """The fleet, a row per host."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("host", "state", "version", "release", "drift", "last change, UTC", "token", "cert"):
        # beside long names on 80 columns, a date stands above its time
        table.add_column(name, no_wrap=not name.startswith("last"), min_width=10 if name.startswith("last") else None)
    for one in found:
        state = "unreachable" if not one["reachable"] else "healthy" if one["healthy"] else one["state"]
        table.add_row(
            one["host"],
            Text(state, style=STYLES.get(state, "red")),
            one["version"],
            one["release"].rpartition("-")[2],
            Text(one["drift"], style=STYLES.get(one["drift"], "")),
            one["last_run"].replace("T", " ")[:16],
            days(one["token_age_days"]),
            days(one["certificate_days"]),
        )
    return table


def days(count: float | None) -> str:
    """Days for a table; hours where they are few."""
    if count is None:
        return ""
    return f"{count:.0f} d" if count >= 2 else f"{count * 24:.0f} h"


@app.command(epilog=EXITS)
def run(
    file: Annotated[Path, typer.Argument(help="The script; NAME.sh is run by the shell, anything else by Python.")],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments, after --.")] = None,
    *,
    inventory: Inventory, limit: Limit = "", stdin: Annotated[Path | None, typer.Option(help="What the script reads.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds; the service's own limit where not given.")] = None,
    forks: Forks = 50, vault: Vault = [], json_wanted: Json = False,  # noqa: B006
) -> None:  # fmt: skip
    """Send a script to the Nox of every host and show the results side by side.

    Playbook: playbooks/run.yml
    """
    if not file.is_file():
        raise fail(f"{file}: no such file", Exit.USAGE)
    variables: dict[str, Any] = {"nox_run_file": str(file.resolve()), "nox_run_args": args or []}
    if stdin:
        variables["nox_run_stdin"] = stdin.read_text(encoding="utf-8")
    if timeout is not None:
        variables["nox_run_timeout"] = timeout
    ends = look(
        "run.yml",
        Options(inventory, limit, forks=forks, vault=vault),
        json_wanted,
        f"run {file.name}",
        "answered",
        **variables,
    )
    found: list[dict[str, Any]] = []
    for host, end in sorted(ends.items()):
        result = end.results.get("nox_run", {}).get("result")
        found.append({"host": host, "state": end.word, "error": end.error, "result": result})
    if json_wanted:
        show_json(found)
    else:
        table = Table("host", "status", "exit", "ms", "output", box=None, pad_edge=False)
        for one in found:
            result = one["result"] or {}
            text = (result.get("stdout", "") + result.get("stderr", "")).rstrip() if result else one["error"]
            state = result.get("status", one["state"])
            code = result.get("exit_code")
            table.add_row(
                one["host"], Text(state, style=STYLES.get(state, "yellow")), "" if code is None else str(code),
                f"{result['duration_ms']:.0f}" if result else "", printable(text),
            )  # fmt: skip
        Console().print(table)
    code = outcome(ends)
    bad_runs = any((one["result"] or {}).get("status", "ok") != "ok" for one in found)
    raise typer.Exit(Exit.FAILED if code is Exit.DONE and bad_runs else code)


@app.command(epilog=EXITS)
def bundle(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    source: Annotated[
        Path | None,
        typer.Option("--app", help="Another source tree of the service: a checkout, or its app/ folder.", exists=True),
    ] = None,
    target: Annotated[
        list[str], typer.Option(help='Only for this Python and machine, such as "3.10 x86_64"; may be repeated.')
    ] = [],  # noqa: B006
    json_wanted: Json = False,
) -> None:
    """Pack the service for every target Python, the collection and an SBOM into one file.

    The same sources give the same bytes. Installing from it needs no package index.

    Playbook: playbooks/bundle.yml
    """
    variables: dict[str, Any] = {"nox_bundle_out": str(out.resolve())}
    if source:
        variables["nox_bundle_source"] = str(source_tree(source))
    if target:
        variables["nox_bundle_targets"] = target
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise fail(f"{out}: not a file that can be written", Exit.USAGE)
    shown = view(json_wanted)
    shown.begin("bundle", ["localhost"])
    try:
        ends = play("bundle.yml", Options(localhost()), variables=variables, on_event=shown.event, on_tick=shown.tick)
    except PlayError as error:
        raise fail(str(error), Exit.USAGE) from None
    finally:
        shown.end()
    end = ends.get("localhost", End("localhost"))
    written = end.results.get("nox_bundle", {}).get("bundle")
    if end.word != "ok" or not written:
        raise fail(f"{end.task}: {end.error}", Exit.FAILED)
    if json_wanted:
        show_json(written)
    else:
        Console().print(
            f"{out}: {written['bytes'] / 1e6:.1f} MB, version {written['version']}, {count(len(written['releases']), 'release')}\n"
            f"sha256 {written['sha256']}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def source_tree(path: Path) -> Path:
    """The tree that holds app/ and requirements/, given it or its app/."""
    for tree in (path.resolve(), path.resolve().parent):
        if (tree / "app/pyproject.toml").is_file():
            if not (tree / "requirements").is_dir():
                raise fail(f"{tree}: has no requirements/ beside app/", Exit.USAGE)
            return tree
    raise fail(f"{path}: neither a tree that holds app/ and requirements/ nor the app/ of one", Exit.USAGE)


def localhost() -> Path:
    """An inventory with this machine alone."""
    path = places.state() / "localhost.yml"
    path.write_text("all: {hosts: {localhost: {ansible_connection: local}}}\n", encoding="utf-8")
    return path


# ── rollout and what belongs to it


@app.command("rollout", epilog=EXITS)
def rollout_command(
    context: typer.Context,
    inventory: Inventory,
    file: Annotated[
        Path | None, typer.Argument(help="The bundle, made by noxctl bundle. --resume knows it.", exists=True, dir_okay=False)
    ] = None,
    limit: Limit = "",
    canary: Annotated[str, typer.Option(help="How many hosts go first, or which (names, with commas).")] = "",
    waves: Annotated[
        str,
        typer.Option(help="Sizes of the waves: numbers, or percentages of the fleet; the last repeats. Without --canary the first is the canary."),
    ] = "",
    budget: Annotated[int, typer.Option(min=0, help="How many hosts may fail, be rescued or unreachable after the canary.")] = 0,
    soak: Annotated[float, typer.Option(min=0, help="Seconds between a wave's change and its gate.")] = 10.0,
    on_failure: Annotated[
        rollout.OnFailure, typer.Option(help="stop: leave the rest untouched. rollback-all: also take the finished ones back. continue: ignore the budget, not the canary.")
    ] = rollout.OnFailure.STOP,
    sha256: Annotated[str, typer.Option(help="The bundle's digest, to be sure it is the one you mean.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last rollout of this inventory that didn't end: its bundle, waves and options, but for those given anew. -e isn't kept.")] = False,
    extra: Extra = [],  # noqa: B006
    vault: Vault = [],  # noqa: B006
    forks: Forks = 50,
    yes: Yes = False,
    json_wanted: Json = False,
) -> None:  # fmt: skip
    """Roll a release out in waves: canary, a few, the rest. A bad release never reaches a second host.

    After each wave: soak, then the gate: smoke tests through the proxy,
    error rate and latency against before, no unit restarted. A host that
    fails goes back to its last healthy release, and the rollout stops.

    Ctrl-C pauses after the wave; once more ends it at once. Both, and a controller that was killed, go on with --resume.

    Playbooks: upgrade.yml, gate.yml, rollback.yml
    """
    journal, old, proven = Journal(), None, frozenset[str]()
    try:
        if resume:
            old = rollout.unfinished(journal, inventory)
            said = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
            before = {name: value for name, value in old.options.items() if name not in said}
            limit, budget, soak = before.get("limit", limit), before.get("budget", budget), before.get("soak", soak)
            on_failure = rollout.OnFailure(before.get("on_failure", on_failure))
            file = file or Path(old.options["bundle"])
        elif file is None:
            raise rollout.Unusable("which bundle? noxctl rollout FILE; noxctl bundle makes one")
        options = Options(inventory, limit, forks=forks, extra=extra, vault=vault)
        wanted = rollout.Wanted(
            bundle=file, canary=canary, waves=waves, budget=budget, soak=soak, on_failure=on_failure, sha256=sha256
        )
        plan = rollout.Plan.make(wanted, fleet(options))
        if old:
            plan = rollout.resumed(plan, old, journal)
            proven = frozenset(host for host, row in journal.hosts(old.id).items() if row["state"] in DONE)
    except (PlayError, rollout.Unusable) as error:
        raise fail(str(error), Exit.USAGE) from None
    if not json_wanted:
        Console().print(rollout.plan_table(plan, proven))
    todo = [host for _, hosts in plan.waves for host in hosts if host not in proven]
    agree(f"Roll {plan.version} out to {len(todo)} hosts of {inventory}?", yes)
    shown = view(json_wanted)
    try:
        with locked(inventory, f"rollout of {plan.version}"):
            result = rollout.Rollout(plan, wanted, options, journal, shown, old).go()
    except Locked as error:
        raise fail(str(error), Exit.LOCKED) from None
    except (PlayError, rollout.Unusable) as error:
        raise fail(str(error), Exit.USAGE) from None
    if json_wanted:
        show_json(result.as_json())
    else:
        console = Console()
        console.print(result.table())
        for line in result.errors():
            console.print(Text(line, style="red"))
        console.print(Text(result.reason, style="green" if result.outcome == "done" else "bold red"))
        console.print(f"Report: noxctl report {result.run}", highlight=False)
    raise typer.Exit(result.exit_code)


@app.command(epilog=EXITS)
def runs(
    inventory: Annotated[Path | None, typer.Option("--inventory", "-i", help="Only of this inventory.")] = None,
    json_wanted: Json = False,
) -> None:
    """List what was done from here, the newest first."""
    journal = Journal()
    found = journal.runs(inventory=inventory)
    if json_wanted:
        show_json([{**vars(one)} for one in found])
        return
    table = Table(box=None, pad_edge=False)
    for name in ("run", "verb", "outcome", "began", "took", "hosts"):
        table.add_column(name, no_wrap=True)
    table.add_column("inventory", overflow="fold")
    # its last name is enough where no other has the same; the whole is in --json
    names = Counter(Path(place).name for place in {one.inventory for one in found})
    for one in found:
        hosts = journal.hosts(one.id)
        good = sum(row["state"] in DONE for row in hosts.values())
        table.add_row(
            one.id, one.verb, Text(one.outcome, style=STYLES.get(one.outcome, "yellow")),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(one.started)),
            f"{one.ended - one.started:.0f} s" if one.ended else "", f"{good}/{len(hosts)}",
            one.inventory if names[Path(one.inventory).name] > 1 else Path(one.inventory).name,
        )  # fmt: skip
    Console().print(table)


@app.command("report", epilog=EXITS)
def report_command(
    run_id: Annotated[
        str, typer.Argument(metavar="[RUN]", help="A run, see noxctl runs; the last one where not given.")
    ] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file; RUN.html here where not given.")] = None,
) -> None:
    """Write one HTML file about a run: a timeline per host, waves, slowest tasks, failures, versions."""
    journal = Journal()
    found = journal.run(run_id) if run_id else next(iter(journal.runs(limit=1)), None)
    if found is None:
        raise fail(f"{run_id or 'a run'}: there is none in {places.state()}; noxctl runs lists them", Exit.USAGE)
    path = out or Path(f"{found.id}.html")
    path.write_text(report.page(journal, found), encoding="utf-8")
    Console().print(f"{path}", highlight=False)


@app.command("lab", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def lab_command(context: typer.Context) -> None:
    """Real systemd test hosts on this machine: noxctl lab up -n 3, down, status, ssh."""
    from lab.__main__ import main as lab_main  # noqa: PLC0415

    raise typer.Exit(lab_main(context.args))


def main(run_app: Callable[[], None] = app) -> None:
    """The program."""
    if sys.version_info < (3, 11):
        sys.exit("noxctl needs Python 3.11 or newer; make setup makes the environment")
    run_app()
