"""Hosts as User-mode Linux: a Linux kernel that runs as a process of this machine, with cgroup limits that hold."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from lab import base, process, ssh
from lab.machine import default_mtu, need_tools, run, step
from lab.state import CACHE, Host, Lab, LabError, locked

TOOLS = {"mke2fs": "e2fsprogs"}
BOOT_BOUND = 240  # seconds to ssh; 10 to 20 on a quiet machine
MEMORY = 1024  # MiB of RAM of a host
DISK = "6G"  # its disk, sparse; a host writes to a copy-on-write file over it
# udev and kmod: without them the network interface never comes up. iptables: so that it can be told to use the legacy
# back end, the only one that ufw gets on with in this kernel.
PACKAGES = ("kmod", "iptables")
_PACKAGE = "user-mode-linux"

_INIT = """#!/bin/sh
# A lab host's first boot: its name, keys and network come as a tar archive on the second disk.
[ -s /etc/machine-id ] || tar -xf /dev/ubdb -C /
exec /lib/systemd/systemd "$@"
"""


def prepare(suite: str) -> str:
    """Fetch the kernel, build the disk image if need be; returns the base's directory.

    Raises LabError when this machine's apt knows no package of the kernel.
    """
    need_tools(TOOLS)
    kernel = _kernel()
    return str(
        base.base_for(
            base.recipe(suite, "uml", PACKAGES, kernel.name), lambda root: _make_image(root, kernel)
        )
    )


def _kernel() -> Path:
    """The unpacked kernel package, fetched with apt but not installed: nothing else on the machine is to know it."""
    candidate = re.search(
        r"^Version: (\S+)$",
        run("apt-cache", "show", "--no-all-versions", _PACKAGE, check=False),
        re.M,
    )
    if not candidate:
        raise LabError(
            f"apt knows no package {_PACKAGE} here; look for it with: apt-get update && apt-cache policy {_PACKAGE}"
        )
    unpacked = CACHE / f"kernel-uml-{candidate[1]}"
    with locked("kernel-uml"):
        if not unpacked.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            with (
                step(
                    f"fetching the kernel with apt (not installed on this machine): {_PACKAGE} {candidate[1]}"
                ),
                tempfile.TemporaryDirectory(dir=CACHE, prefix=".building-") as directory,
            ):
                Path(directory).chmod(0o755)
                run(
                    "sh",
                    "-c",
                    f'cd "$0" && apt-get -qq -o APT::Sandbox::User=root download {_PACKAGE}',
                    directory,
                )
                (archive,) = Path(directory).glob("*.deb")
                run("dpkg-deb", "--extract", archive, Path(directory) / "kernel")
                (Path(directory) / "kernel").rename(unpacked)
    return unpacked


def _preload(kernel: Path) -> Path | None:
    """The library that this machine's processor needs under the kernel (see uml_xstate.c); None where it needs none."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    if not flags or not {"amx_tile", "apx"} & set(flags[1].split()):
        return None
    library = kernel / "xstate.so"
    with locked("kernel-uml"):
        if not library.exists():
            need_tools({"cc": "gcc libc6-dev"})
            source = Path(__file__).with_name("uml_xstate.c")
            run("cc", "-O2", "-Wall", "-shared", "-fPIC", "-o", library.with_suffix(".new"), source, "-ldl")
            library.with_suffix(".new").rename(library)
    return library


def _make_image(root: Path, kernel: Path) -> None:
    """Turn a root into the disk image ``disk.raw`` beside it."""
    (modules,) = (kernel / "usr/lib/uml/modules").iterdir()
    shutil.copytree(modules, root / "usr/lib/modules" / modules.name, symlinks=True)
    run("chroot", root, "depmod", modules.name)
    for tool in ("iptables", "ip6tables"):
        run("chroot", root, "update-alternatives", "--set", tool, f"/usr/sbin/{tool}-legacy")
    (root / "etc/fstab").write_text("")
    init = root / "usr/sbin/lab-init"
    init.write_text(_INIT)
    init.chmod(0o755)
    image = root.with_name("disk.raw")
    run(
        "mke2fs", "-q", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1", "-d", root, image, DISK
    )
    base.remove_tree(root)


def _tap(lab: Lab, host: Host) -> str:
    return f"noxtap{lab.index}-{host.address.rpartition('.')[2]}"


def furnish(lab: Lab, host: Host, files: dict[str, str]) -> None:
    """Write what makes the image this host, as the archive its first boot unpacks."""
    network = (
        "[Match]\nName=vec0\n\n"
        f"[Link]\nMTUBytes={default_mtu()}\n\n"
        f"[Network]\nAddress={host.address}/24\nGateway={lab.gateway}\nIPv6AcceptRA=no\n"
    )
    files = {**files, "etc/systemd/network/10-vec0.network": network}
    with tarfile.open(host.dir / "identity.tar", "w") as archive:
        for entry in base.host_files(files, lab.key.with_suffix(".pub").read_text()):
            member = tarfile.TarInfo(entry.path)
            member.uid = member.gid = entry.owner
            member.mode = entry.mode
            member.mtime = int(host.dir.stat().st_mtime)
            if entry.text is None:
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
            else:
                content = entry.text.encode()
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def start(lab: Lab, host: Host) -> None:
    """Start a furnished host; it outlives this process."""
    tap = _tap(lab, host)
    if not Path(f"/sys/class/net/{tap}").exists():
        run("ip", "tuntap", "add", "dev", tap, "mode", "tap")
    run("ip", "link", "set", tap, "master", lab.bridge, "mtu", str(default_mtu()), "up")
    kernel = CACHE / base.recipe_of(host.base)["kernel"]
    if not kernel.exists():
        raise LabError(
            f"the kernel of host {host.name} is gone from {CACHE}; end the host and bring it up anew"
        )
    arguments = [
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
    environment = [f"TMPDIR={_memory_dir(host)}"]
    preload = _preload(kernel)
    if preload:
        environment.append(f"LD_PRELOAD={preload}")
    # To reboot, the kernel executes its own argv[0] again, but keeps the tap device open, which it then finds busy. So
    # that name is given to a script that ends in its place and asks for a new start.
    again = host.dir / "again"
    again.write_text(f"#!/bin/sh\nexit {process.RESTART}\n")
    again.chmod(0o755)
    words = ["env", *environment, "bash", "-c", 'exec -a "$0" "$@"', str(again), *arguments]
    process.launch(host, f"exec {shlex.join(words)}")


def _memory_dir(host: Host) -> str:
    """Where the file that is the host's RAM goes: in memory where there is room, else on disk, which is slower."""
    shared = Path("/dev/shm")
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
    """Remove what an ended host left in the machine's kernel: its network interface."""
    for tap in Path("/sys/class/net").glob(f"noxtap*-{host.address.rpartition('.')[2]}"):
        if host.address.split(".")[2] == tap.name.removeprefix("noxtap").partition("-")[0]:
            run("ip", "link", "delete", tap.name, check=False)
