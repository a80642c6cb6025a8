# SPDX-License-Identifier: Apache-2.0
"""The control side of nox_archive: asks the host how much it has, and sends the rest piece by piece."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ansible_collections.nox.platform.plugins.modules.nox_archive import ARGUMENTS
from ansible_collections.nox.platform.plugins.plugin_utils.on_host import OwnCopyAction

PIECE = 8 << 20  # what is lost at most when a connection ends in the middle


class ActionModule(OwnCopyAction):
    """See the module of this name."""

    LOGIC, ARGUMENTS = "archives", ARGUMENTS

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The module's last answer."""
        answer = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        source = Path(arguments["src"]).expanduser()
        size = source.stat().st_size
        pieces = 0
        begun_anew = False
        while not (answer.get("failed") or answer.get("complete") or self._task.check_mode):
            have = int(answer["have"])
            if have >= size:
                # whole, but not this archive: what was kept is of no use. Once; then the fault is at this end.
                if begun_anew:
                    answer |= {"failed": True, "msg": f"{source} isn't the archive with SHA-256 {arguments['sha256']}"}
                    break
                begun_anew, have = True, 0
            answer = self._send(source, have, arguments, task_vars)
            pieces += 1
        if pieces:
            answer["pieces"] = pieces
        return answer

    def _send(self, source: Path, offset: int, arguments: dict[str, Any], task_vars: Any) -> dict[str, Any]:
        if not self._connection._shell.tmpdir:
            self._make_tmp_path()
        remote = self._connection._shell.join_path(self._connection._shell.tmpdir, "piece")
        with source.open("rb") as handle, tempfile.NamedTemporaryFile(prefix="nox-piece-") as piece:
            handle.seek(offset)
            piece.write(handle.read(PIECE))
            piece.flush()
            self._transfer_file(piece.name, remote)
        self._fixup_perms2((self._connection._shell.tmpdir, remote))
        return self.answer({**arguments, "piece": remote, "offset": offset}, task_vars)
