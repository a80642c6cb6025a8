# SPDX-License-Identifier: Apache-2.0
"""The control side of nox_status: a host that has the same code needn't be sent it."""

from __future__ import annotations

from ansible_collections.nox.platform.plugins.modules.nox_status import ARGUMENTS
from ansible_collections.nox.platform.plugins.plugin_utils.on_host import OwnCopyAction


class ActionModule(OwnCopyAction):
    """See the module of this name."""

    LOGIC, ARGUMENTS = "host_status", ARGUMENTS
