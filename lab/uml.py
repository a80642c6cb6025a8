"""Hosts as User-mode Linux: a kernel as a process of this machine, whose cgroup limits hold."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

from lab import base, nspawn, process, ssh
from lab.machine import default_mtu, need_tools, run, step
from lab.state import CACHE, Host, Lab, LabError, locked

BOOT_BOUND = 240  # seconds to ssh; about 10 on a quiet machine
MEMORY = 1024  # MiB of RAM of a host
DISK = "6G"  # the size of its disk: a sparse file, shared; what a host writes goes to its own file
_PACKAGE = "user-mode-linux"
# Without kmod (and udev) the network interface never comes up. iptables is there to be told to use
# its legacy back end, the only one with which ufw works on this kernel.
_PACKAGES = ("kmod", "iptables")

_INIT = """\
#!/bin/sh
# The first boot of a lab host: what makes it this host is a tar archive on its second disk.
[ -s /etc/machine-id ] || tar -xf /dev/ubdb -C /
exec /lib/systemd/systemd "$@"
"""


def prepare(suite: str) -> str:
    """Have all that a start needs; returns the directory of the suite's base.

    Raises LabError when apt knows no package of the kernel.
    """
    need_tools({"mke2fs": "e2fsprogs"})
    kernel = _fetch_kernel()
    _preload(kernel)
    recipe = base.recipe(suite, "uml", _PACKAGES, kernel.name)
    return str(base.base_for(recipe, lambda root: _make_disk(root, kernel)))


def _fetch_kernel() -> Path:
    """The unpacked kernel package. It isn't installed: no other program is to meet it."""
    versions = run("apt-cache", "show", "--no-all-versions", _PACKAGE, check=False)
    version = re.search(r"^Version: (\S+)$", versions, re.MULTILINE)
    if not version:
        raise LabError(f"apt knows no {_PACKAGE} here; see: apt update; apt policy {_PACKAGE}")
    kernel = CACHE / f"kernel-uml-{version[1]}"
    with locked("-kernel"):
        if not kernel.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            what = f"fetching with apt, not installing: {_PACKAGE} {version[1]}"
            with step(what), tempfile.TemporaryDirectory(dir=CACHE, prefix=".building-") as place:
                fetch = f'cd "$0" && apt-get -qq -o APT::Sandbox::User=root download {_PACKAGE}'
                run("sh", "-c", fetch, place)
                (package,) = Path(place).glob("*.deb")
                run("dpkg-deb", "--extract", package, Path(place) / "kernel")
                (Path(place) / "kernel").rename(kernel)
    return kernel


def _preload(kernel: Path) -> Path | None:
    """The library this machine's processor needs under the kernel (see uml_xstate.c), or None."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if not flags or not {"amx_tile", "apx"} & set(flags[1].split()):
        return None
    library = kernel / "xstate.so"
    with locked("-kernel"):
        if not library.exists():
            need_tools({"cc": "gcc libc6-dev"})
            source = Path(__file__).with_name("uml_xstate.c")
            new = library.with_suffix(".new")
            run("cc", "-O2", "-Wall", "-shared", "-fPIC", "-o", new, source, "-ldl")
            new.rename(library)
    return library


def _make_disk(root: Path, kernel: Path) -> None:
    """Turn a root into the disk ``disk.raw`` beside it."""
    (modules,) = (kernel / "usr/lib/uml/modules").iterdir()
    shutil.copytree(modules, root / "usr/lib/modules" / modules.name, symlinks=True)
    run("chroot", root, "depmod", modules.name)
    for tool in ("iptables", "ip6tables"):
        run("chroot", root, "update-alternatives", "--set", tool, f"/usr/sbin/{tool}-legacy")
    (root / "etc/fstab").write_text("")
    init = root / "usr/sbin/lab-init"
    init.write_text(_INIT)
    init.chmod(0o755)
    run("mke2fs", "-q", "-t", "ext4", "-m", "0", "-d", root, root.with_name("disk.raw"), DISK)
    base.remove_tree(root)


def furnish(lab: Lab, host: Host, files: dict[str, str]) -> None:
    """Write the archive that makes the shared disk a new host's, with these files its own."""
    files["etc/systemd/network/10-vec0.network"] = nspawn.network_file(lab, host, "vec0")
    key = lab.key.with_suffix(".pub").read_text()
    with tarfile.open(host.dir / "identity.tar", "w") as archive:
        for file in base.host_files(files, key):
            member = tarfile.TarInfo(file.path)
            member.mode = file.mode
            member.mtime = int(time.time())
            member.uid = member.gid = file.owner
            if file.text is None:
                member.type = tarfile.DIRTYPE
            content = (file.text or "").encode()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def start(lab: Lab, host: Host) -> None:
    """Start a furnished host; it outlives this process."""
    kernel = CACHE / base.kernel_of(host.base)
    if not kernel.is_dir():
        raise LabError(f"{kernel}, the kernel of the host {host.name}, is gone: end the host first")
    tap = _tap(host)
    if not Path("/sys/class/net", tap).exists():
        run("ip", "tuntap", "add", "dev", tap, "mode", "tap")
    run("ip", "link", "set", tap, "master", lab.bridge, "mtu", str(default_mtu()), "up")
    # To reboot, the kernel executes its own argv[0] anew, but with the tap device still open, which
    # it then finds busy. So that name is given to a script that ends, and asks for a new start.
    again = host.dir / "again"
    again.write_text(f"#!/bin/sh\nexit {process.RESTART}\n")
    again.chmod(0o755)
    environment = [f"TMPDIR={_memory_directory(host)}"]
    preload = _preload(kernel)
    if preload:
        environment.append(f"LD_PRELOAD={preload}")
    command = [
        *("env", *environment),
        *("bash", "-c", 'exec -a "$0" "$@"', str(again)),
        str(kernel / "usr/bin/linux.uml"),
        f"umid={host.machine}",
        f"uml_dir={host.dir}/",
        f"mem={MEMORY}M",
        f"ubda=disk.cow,{host.base}/disk.raw",
        "ubdbr=identity.tar",
        "root=/dev/ubda",
        "rw",
        f"vec0:transport=tap,ifname={tap},depth=128,gro=1",
        "con=null",
        "con0=null,fd:1",
        "ssl=null",
        "quiet",
        "init=/usr/sbin/lab-init",
    ]
    process.launch(host, f"exec {shlex.join(command)}")


def _tap(host: Host) -> str:
    """The name of the host's interface on this machine, from its address: at most 13 characters."""
    _, _, index, last = host.address.split(".")
    return f"noxtap{index}-{last}"


def _memory_directory(host: Host) -> str:
    """Where the file that is the host's RAM goes: to memory if it fits, else to the slower disk."""
    shared = Path("/dev/shm")  # noqa: S108 (UML opens a file there that has no name)
    if shared.is_dir() and shutil.disk_usage(shared).free > (MEMORY + 64) * 2**20:
        return str(shared)
    return str(host.dir)


def poweroff(lab: Lab, host: Host) -> None:
    """Ask the host to shut down, without waiting for it."""
    subprocess.Popen(
        [*ssh.command(lab, host), "systemctl", "poweroff"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def clean(host: Host) -> None:
    """Remove what an ended host left in the machine's kernel: its interface."""
    run("ip", "link", "delete", _tap(host), check=False)
