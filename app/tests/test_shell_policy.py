from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from service import Service

from nox_api.shell_policy import MAX_EXAMINED, examine

REFUSED = [
    ("remove-system", "rm -rf /"),
    ("remove-system", "rm -fr -- /"),
    ("remove-system", "rm -r -f /*"),
    ("remove-system", "rm --recursive --force /etc"),
    ("remove-system", "rm --rec /etc/"),
    ("remove-system", "/bin/rm -Rf //usr/./"),
    ("remove-system", "rm -rf '/'"),
    ("remove-system", 'rm -rf "/"*'),
    ("remove-system", "r'm' -r\\f /var"),
    ("remove-system", "rm -rf /etc/../"),
    ("remove-system", "rm --no-preserve-root -rf /tmp/x /home"),
    ("remove-system", "echo ok; sudo -u root rm -rf /usr"),
    ("remove-system", "env -u A B=c nohup nice -n 5 rm -rf /boot &"),
    ("remove-system", "timeout -s KILL 5 rm -rf /lib"),
    ("remove-system", 'bash -c "rm -rf /"'),
    ("remove-system", "sh -ec 'rm -rf /etc'"),
    ("remove-system", "eval rm -rf /"),
    ("remove-system", "echo $(rm -rf /)"),
    ("remove-system", 'echo "a $(rm -rf /) b"'),
    ("remove-system", "echo `rm -rf /`"),
    ("remove-system", "x=${y:-$(rm -rf /)}"),
    ("remove-system", "x=/; rm -rf $x"),
    ("remove-system", 'x=/; rm -rf "${x}etc"'),
    ("remove-system", "cd / && rm -rf *"),
    ("remove-system", "cd /usr; rm -rf ../etc"),
    ("remove-system", "if true; then rm -rf /; fi"),
    ("remove-system", "for d in a b\ndo\n  rm -rf /etc\ndone"),
    ("remove-system", "case $1 in a) echo;; b|c) rm -rf /;; esac"),
    ("remove-system", "f() { rm -rf /; }; f"),
    ("remove-system", "(cd x; { rm -rf /; })"),
    ("remove-system", "sh <<EOF\nrm -rf /\nEOF"),
    ("remove-system", "cat <<EOF\n$(rm -rf /)\nEOF"),
    ("remove-system", "cat <<'EOF'\ntext\nEOF\nrm -rf /"),
    ("remove-system", "true ||\n  rm -rf \\\n  /"),
    ("remove-system", "ls # a comment\nrm -rf /"),
    ("remove-system", "2>/dev/null rm -rf /"),
    ("remove-system", "rm -rf 2>x /"),
    ("remove-system", "rm -rf / 2>&1"),
    ("remove-system", "find / -delete"),
    ("remove-system", "find /etc -type f -exec rm -f {} +"),
    ("remove-system", "mv /* /dev/null"),
    ("remove-system", "busybox rm -rf /"),
    ("permissions-system", "chmod -R 777 /"),
    ("permissions-system", "chown -R nobody:nogroup /etc"),
    ("permissions-system", "sudo chmod --recursive a+w /usr/*"),
    ("format-device", "mkfs.ext4 /dev/sda1"),
    ("format-device", "mkfs -t xfs /dev/nvme0n1"),
    ("format-device", "wipefs -a /dev/sda"),
    ("write-device", "dd if=/dev/zero of=/dev/sda bs=1M"),
    ("write-device", "echo x > /dev/sda"),
    ("write-device", "cat image >/dev/disk/by-id/x"),
    ("write-device", "cat image | tee /dev/sdb"),
    ("write-device", "cp image /dev/mmcblk0"),
    ("kernel", "echo b > /proc/sysrq-trigger"),
    ("kernel", "echo '|/x' | tee /proc/sys/kernel/core_pattern"),
    ("fork-bomb", ":(){ :|:& };:"),
    ("fork-bomb", ":(){ :|: & };:"),
    ("fork-bomb", "bomb() {\n  bomb | bomb &\n}\nbomb"),
    ("fork-bomb", "function f { f & f; }; f"),
    ("fork-bomb", 'bash -c ":(){ :|:& };:"'),
    ("power", "shutdown -h now"),
    ("power", "sudo reboot"),
    ("power", "/sbin/poweroff"),
    ("power", "systemctl --force reboot"),
    ("power", "init 0"),
]

ALLOWED = [
    "", "echo hello", 'echo "rm -rf /"', "echo 'rm -rf /'", "echo rm -rf /", "rm -rf ./build",
    "rm -rf build", "rm -rf *", "rm -rf /tmp/x", "rm -rf /tmp/*", "rm -f /etc/passwd", "rm /",
    "rm -rf '/*'", "rm -rf /home/nox/nox/sandbox/build", "rm -rf $UNKNOWN", "rm -rf $UNKNOWN/",
    'rm -rf "$(pwd)"', "# rm -rf /", "echo a # rm -rf /\nls", "cat <<EOF\nrm -rf /\nEOF",
    "cat <<-'EOF'\n\t$(rm -rf /)\n\tEOF", "grep -r 'rm -rf /' .", "printf %s 'shutdown'",
    "git commit -m 'rm -rf / is bad; shutdown'", "(cd / && ls); rm -rf *", "cd /tmp && rm -rf *",
    "dd if=/dev/zero of=image bs=1M count=1", "dd if=/dev/sda of=/dev/null", "echo x >/dev/null",
    "echo x >/dev/stderr 2>&1", "cat /dev/sda", "cp /dev/stdin x", "mkfs.ext4 disk.img",
    "fdisk -l /dev/sda", "chmod 755 /etc", "chmod -R 755 .", "chown -R me ./x", "find . -delete",
    "find / -name x", "mv a b", "mv a /tmp", "f() { f; }; f", "fact() { fact $(($1-1)); }",
    "walk() { ls | while read x; do walk $x; done; }", "case $1 in shutdown) echo no;; esac",
    "case $1 in (rm) ;; esac", "shutdown_hook=1; echo $shutdown_hook", "systemctl status nox",
    "init() { echo; }", "x=reboot; echo $x", "echo ${x#*/}", "echo $((1 << 2)) $(( (1+2)*3 ))",
    "echo 'unclosed", 'echo "unclosed', "echo $(unclosed", "echo `unclosed", ")", "}", ";;", "case",
    "echo a{b,c}", "[ -d /etc ] && echo yes", "echo \\", "cat <<EOF", "f() (", "'' x", "$x -rf /",
    "echo } ; echo {", "x=/; x=$(pwd); rm -rf $x", "x=/ y=1 echo; rm -rf $x",
    "time", "env", "sudo -u", "timeout", "bash -c", "eval",
]  # fmt: skip


@pytest.mark.parametrize(("rule", "script"), REFUSED)
def test_refused(rule: str, script: str) -> None:
    found = examine(script)
    assert found is not None and found.rule == rule


@pytest.mark.parametrize("script", ALLOWED)
def test_allowed(script: str) -> None:
    assert examine(script) is None


def test_arguments_and_environment_are_known() -> None:
    assert examine('rm -rf "$1"', args=["/"]) is not None
    assert examine('rm -rf "$1"', args=["/tmp/x"]) is None
    assert examine("rm -rf $WHERE", env={"WHERE": "/etc"}) is not None


@given(st.text(alphabet="rm -f/'\"$`(){}|&;<>\n\\#*=cased ino[]E"))
def test_nothing_upsets_the_parser(script: str) -> None:
    examine(script)


@pytest.mark.parametrize(
    "piece", ["$(", "`", "((", "a;", "2> a ", "x=$x$x;", '"$(', "\\", "<<E\n", "{ ", "case a in "]
)
def test_hostile_scripts_cost_little(piece: str) -> None:
    started = time.process_time()
    examine(piece * (2 * MAX_EXAMINED // len(piece)))
    assert time.process_time() - started < 1


def test_the_rule_is_named(nox: Service) -> None:
    with nox.client() as client:
        response = client.post("/run_sh", json={"cmd": "echo start; rm -rf /"})
    assert response.status_code == 403
    problem = response.json()
    assert problem["rule"] == "remove-system" and "NOX_SHELL_POLICY" in problem["detail"]
    assert nox.shell('echo "rm -rf /"')["stdout"] == "rm -rf /\n"


def test_the_policy_may_be_off(own: Callable[..., Service]) -> None:
    nox_off = own(NOX_SHELL_POLICY="off").start()
    assert nox_off.shell("rm -rf /etc; echo went on")["stdout"] == "went on\n"
