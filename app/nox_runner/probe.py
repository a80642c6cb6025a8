"""Tries each wall and limit of the sandbox it is run in. Its text is given to a run, as a program.

Arguments: JSON of what proof.py expects. Prints JSON: by name what is open ("walls") and what
does not hold ("limits"), with what was seen. The interpreter is the host's own.
"""


def _probe() -> None:
    import ctypes
    import errno
    import json
    import os
    import resource
    import sys
    import time

    expected = json.loads(sys.argv[1])
    walls = {}
    limits = {}

    def read(path: str) -> str:
        with open(path) as file:
            return file.read()

    for line in read("/proc/self/maps").splitlines():
        mode = line.split()[1]
        if "w" in mode and "s" in mode:
            walls["memory"] = "shared with other processes: " + line
    same = [
        name
        for name, host in expected["namespaces"].items()
        if os.readlink("/proc/self/ns/" + name) == host
    ]
    if same:
        walls["namespaces"] = "shared with the host: " + ", ".join(same)
    interfaces = {line.partition(":")[0].strip() for line in read("/proc/net/dev").split("\n")[2:]}
    if interfaces - {"", "lo"} and not expected["network"]:
        walls["network"] = "interfaces " + ", ".join(sorted(interfaces))
    for place in ("/", "/usr", "/etc", "/dev", "/proc/sys/kernel"):
        try:
            os.close(os.open(place + "/nox-proof", os.O_WRONLY | os.O_CREAT, 0o600))
            walls["system_files"] = place + " can be written to"
        except OSError:
            pass
    processes = [name for name in os.listdir("/proc") if name.isdigit()]
    if len(processes) > 4:
        walls["processes"] = f"{len(processes)} processes are seen"
    status = dict(line.split(":\t", 1) for line in read("/proc/self/status").splitlines())
    kept = [name for name in status if name.startswith("Cap") and int(status[name], 16)]
    if kept or status.get("NoNewPrivs") != "1":
        walls["capabilities"] = ", ".join(kept) or "new privileges can be gained"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000) == 0 or ctypes.get_errno() != errno.EPERM:
        walls["system_calls"] = "unshare is not refused"
    if status.get("Seccomp") != "2":
        walls["system_calls"] = "no seccomp filter"
    for pid in processes:
        try:
            names = {line.partition("=")[0] for line in read(f"/proc/{pid}/environ").split("\0")}
        except OSError:
            continue
        if names - set(expected["environment"]) - {""}:
            walls["environment"] = "a process shows " + ", ".join(sorted(names))
    for place in ("/tmp", "/dev/shm"):
        if os.stat(place).st_dev in expected["devices"]:
            walls["temporary_files"] = place + " is the host's"
        with open(place + "/nox-proof", "w") as file:
            file.write("able")
    for name, most in expected["resources"].items():
        soft, hard = resource.getrlimit(getattr(resource, name))
        if not 0 <= soft <= most or hard != soft:
            limits[name.lower()] = f"is {soft}, {hard} at most"
    # Runs share this directory and may do anything to it. So what goes wrong here is no wall, and
    # the name is none that one of them can take before.
    name = "nox-proof-" + os.urandom(8).hex()
    try:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        os.unlink(name)
    except OSError as error:
        limits["sandbox"] = f"a run cannot write there: {error.strerror}"
    # Long enough for the watch over temporary files to have looked once.
    time.sleep(0.1)
    print(json.dumps({"walls": walls, "limits": limits}))


if __name__ == "__main__":
    _probe()
