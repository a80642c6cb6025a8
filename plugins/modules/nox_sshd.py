#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""sshd's settings in a file of their own, on trial: unless somebody confirms the change, the host takes it back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_sshd
short_description: Changes sshd's settings for good only when a new login has worked
description:
  - O(state=tried) writes F(/etc/ssh/sshd_config.d/10-nox.conf) with those of the wanted settings that are stricter than what
    the rest of the configuration says, has sshd check the whole, starts a timer that would put everything back, and
    reloads. Sessions that are open stay. Ports, addresses and the lists of users are not touched.
  - O(state=kept) ends the timer, O(state=back) does at once what the timer would have done.
author: The Nox maintainers
options:
  settings:
    description: sshd_config keywords and values, for O(state=tried). Without any the file is taken away.
    type: dict
    default: {}
  header:
    description: First line of the file.
    type: str
    default: ""
  seconds:
    description: After how long a change that nobody confirmed is taken back.
    type: int
    default: 120
  state:
    description: Which step is meant.
    type: str
    choices: [tried, kept, back]
    default: tried
"""

EXAMPLES = r"""
- name: Try it
  nox.platform.nox_sshd:
    settings: {X11Forwarding: "no"}
"""

RETURN = r"""
left:
  description: Wanted settings that are not written, and why. The host has them already, or stricter.
  returned: when state is tried
  type: dict
overridden:
  description: Settings that another file says first, so that ours have no effect.
  returned: when state is tried
  type: dict
"""

import re
import shutil
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils import host_files

CONFIG = "/etc/ssh/sshd_config"
DROP_IN = "/etc/ssh/sshd_config.d/10-nox.conf"
BEFORE = "/var/lib/nox/sshd-before"  # the file as it was before the trial; an empty one for none
TIMER = "nox-sshd-back"
# From loose to strict, in the words of `sshd -T`. What isn't here is strict in one value only.
ORDER = {
    "permitrootlogin": ["yes", "without-password", "forced-commands-only", "no"],
    "compression": ["yes", "delayed", "no"],
    "loglevel": ["quiet", "fatal", "error", "info", "verbose", "debug", "debug1", "debug2", "debug3"],
    "allowtcpforwarding": ["yes", "all", "local", "remote", "no"],
}
LESS_IS_STRICTER = ("logingracetime", "clientaliveinterval", "clientalivecountmax")
SAME = {"prohibit-password": "without-password"}


def sshd(module: AnsibleModule, *words: str) -> tuple[int, str, str]:
    result: tuple[int, str, str] = module.run_command(["/usr/sbin/sshd", *words], environ_update={"LC_ALL": "C"})
    return result


def effective(module: AnsibleModule, config: str) -> dict[str, str]:
    """Keyword in lower case → value, as this sshd understands a configuration."""
    rc, out, err = sshd(module, "-T", "-f", config)
    if rc != 0:
        module.fail_json(msg=f"sshd can't read its configuration: {err.strip()}. See: sudo sshd -t")
    found: dict[str, str] = {}
    for line in out.splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key.lower(), value)
    return found


def matching(pattern: str) -> list[str]:
    """In the order in which sshd reads them."""
    return sorted(str(path) for path in Path("/").glob(pattern.lstrip("/")))


def without_ours(text: str) -> str:
    """sshd_config with its Include lines resolved to every file but ours."""

    def resolved(match: re.Match[str]) -> str:
        paths = []
        for pattern in match.group(1).split():
            paths += matching(pattern if pattern.startswith("/") else f"/etc/ssh/{pattern}")
        return "".join(f"Include {path}\n" for path in paths if path != DROP_IN)

    return re.sub(r"(?mi)^[ \t]*Include[ \t=]+(.+)\n?", resolved, text)


def strict_enough(keyword: str, now: str, wanted: str) -> bool:
    """Whether what the host says by itself is the wanted value or a stricter one."""
    now, wanted = now.lower(), SAME.get(wanted.lower(), wanted.lower())
    if now == wanted:
        return True
    if keyword in ORDER and {now, wanted} <= set(ORDER[keyword]):
        return ORDER[keyword].index(now) > ORDER[keyword].index(wanted)
    if keyword in LESS_IS_STRICTER and now.isdigit() and wanted.isdigit():
        return 0 < int(now) < int(wanted)  # 0 switches it off
    return False


def reload(module: AnsibleModule) -> None:
    """A running sshd reads it anew; one that is started for each connection does so by itself."""
    rc, _, _ = module.run_command(["systemctl", "is-active", "--quiet", "ssh.service"])
    if rc == 0:
        rc, _, err = module.run_command(["systemctl", "reload", "ssh.service"])
        if rc != 0:
            module.fail_json(msg=f"sshd isn't reloaded: {err.strip()}. See: sudo systemctl status ssh")


def arm(module: AnsibleModule) -> None:
    """The way back that needs nobody's connection."""
    disarm(module)
    back = f"if [ -s {BEFORE} ]; then cp -p {BEFORE} {DROP_IN}; else rm -f {DROP_IN}; fi; rm -f {BEFORE}; systemctl reload ssh.service"
    words = [f"--unit={TIMER}", f"--on-active={module.params['seconds']}", "--timer-property=AccuracySec=1s"]
    rc, _, err = module.run_command(["systemd-run", "--quiet", *words, "/bin/sh", "-c", back])
    if rc != 0:
        module.fail_json(msg=f"No timer for the way back, so nothing was changed: {err.strip()}")


def disarm(module: AnsibleModule) -> None:
    module.run_command(["systemctl", "stop", f"{TIMER}.timer"])
    module.run_command(["systemctl", "reset-failed", f"{TIMER}.service"])


def restore(module: AnsibleModule) -> None:
    before = host_files.read(BEFORE) or ""
    if before:
        host_files.put(DROP_IN, before, 0o644)
    else:
        host_files.take_back(DROP_IN)
        Path(DROP_IN).unlink(missing_ok=True)
    reload(module)


def keep_before(now: str) -> None:
    Path(BEFORE).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    host_files.write(BEFORE, now, 0o644)


def tested(module: AnsibleModule, text: str) -> dict[str, str]:
    """Has sshd check the whole configuration with this as our part of it; what it would then say of each keyword."""
    with tempfile.TemporaryDirectory() as place:
        own = Path(place, "10-nox.conf")
        own.write_text(text, encoding="utf-8")
        whole = Path(place, "sshd_config")
        rest = re.sub(
            r"(?mi)^[ \t]*Include[ \t=]+/etc/ssh/sshd_config\.d/\*\.conf[ \t]*\n?",
            lambda _: "".join(
                f"Include {own if path == DROP_IN else path}\n"
                for path in sorted({*matching("/etc/ssh/sshd_config.d/*.conf"), DROP_IN})
            ),
            Path(CONFIG).read_text(encoding="utf-8", errors="replace"),
        )
        whole.write_text(rest, encoding="utf-8")
        rc, _, err = sshd(module, "-t", "-f", str(whole))
        if rc != 0:
            module.fail_json(msg=f"sshd refuses these settings, so nothing was changed: {err.strip()}")
        return effective(module, str(whole))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "settings": {"type": "dict", "default": {}},
            "header": {"type": "str", "default": ""},
            "seconds": {"type": "int", "default": 120},
            "state": {"type": "str", "choices": ["tried", "kept", "back"], "default": "tried"},
        },
        supports_check_mode=True,
    )
    state = module.params["state"]
    if state != "tried":
        if not module.check_mode:
            disarm(module)
            if state == "back":
                restore(module)
            Path(BEFORE).unlink(missing_ok=True)
        module.exit_json(changed=state == "back")

    if not shutil.which("/usr/sbin/sshd"):
        module.exit_json(changed=False, left={"sshd": "not installed"}, overridden={})
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".conf") as rest:
        rest.write(without_ours(Path(CONFIG).read_text(encoding="utf-8", errors="replace")))
        rest.flush()
        alone = effective(module, rest.name)
    settings = {key: str(value) for key, value in module.params["settings"].items()}
    left = {
        key: f"{alone[key.lower()]} already"
        for key, value in settings.items()
        if key.lower() in alone and strict_enough(key.lower(), alone[key.lower()], value)
    }
    left |= {key: "this sshd doesn't know it" for key in settings if key.lower() not in alone}
    # with another second step than the key a login would end half-way
    if alone.get("authenticationmethods", "any") != "any" and "KbdInteractiveAuthentication" in settings:
        left["KbdInteractiveAuthentication"] = f"AuthenticationMethods {alone['authenticationmethods']}"
    lines = [f"{key} {value}" for key, value in settings.items() if key not in left]
    text = "\n".join([module.params["header"], *lines]) + "\n" if lines else ""
    now = host_files.read(DROP_IN) or ""
    changed = not host_files.in_place(DROP_IN, text, 0o644) if text else bool(now)
    overridden: dict[str, str] = {}
    if text:
        then = tested(module, text)
        for key, value in settings.items():
            if key not in left and then.get(key.lower(), "").lower() != SAME.get(value.lower(), value.lower()):
                overridden[key] = then.get(key.lower(), "")
    if changed and not module.check_mode:
        keep_before(now)
        arm(module)
        if text:
            host_files.put(DROP_IN, text, 0o644)
        else:
            host_files.take_back(DROP_IN)
            Path(DROP_IN).unlink(missing_ok=True)
        rc, _, err = sshd(module, "-t")
        if rc != 0:
            disarm(module)
            restore(module)
            module.fail_json(msg=f"sshd refuses the whole of it, so everything is as it was: {err.strip()}")
        reload(module)
    module.exit_json(
        changed=changed,
        left=left,
        overridden=overridden,
        diff={"before_header": DROP_IN, "after_header": DROP_IN, "before": now, "after": text if changed else now},
    )


if __name__ == "__main__":
    main()
