"""Which backend serves: the wanted one, or the fast one if it can be trusted on this host."""

from __future__ import annotations

from collections.abc import Callable

from nox_runner import control_group, seccomp
from nox_runner.backend import Backend
from nox_runner.bubblewrap import Bubblewrap
from nox_runner.command import Command
from nox_runner.control_group import NotDelegatedError
from nox_runner.log import log
from nox_runner.proof import Proof
from nox_runner.settings import Settings
from nox_runner.zygote.fast import Zygote


def choose(command: Command, settings: Callable[[], Settings]) -> tuple[Backend, Proof]:
    """The backend of NOX_BACKEND, and its proof; `auto` is the zygote where its self-test passes.

    OSError where the filter for system calls cannot be made: without it nothing may run.
    """
    wanted = settings().backend
    call_filter = seccomp.program()
    groups, why = None, ""
    try:
        groups = control_group.delegated()
    except NotDelegatedError as error:
        why = str(error)
        log("warning", "no_control_groups", reason=why)
    if wanted == "bubblewrap":
        bubblewrap = Bubblewrap(command, call_filter, groups, why)
        return bubblewrap, Proof(bubblewrap, settings)
    zygote = Zygote(settings, groups, why)
    proof = Proof(zygote, settings)
    if wanted == "zygote" or proof.able():
        return zygote, proof
    zygote.close()
    log("warning", "backend_fallback", backend="bubblewrap", reason=proof.reason)
    instead_of = f"the zygote backend is not used: {proof.reason}"
    bubblewrap = Bubblewrap(command, call_filter, groups, why, instead_of)
    return bubblewrap, Proof(bubblewrap, settings)
