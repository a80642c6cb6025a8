# SPDX-License-Identifier: Apache-2.0
"""Host names and addresses, in the forms that URLs and certificates want."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def url_host(name: str) -> str:
    """ "::1" → "[::1]"; everything else as it is."""
    return f"[{name}]" if _is_address(name) and ":" in name else name


def alt_name(name: str) -> str:
    """A subjectAltName entry as openssl takes it: "IP:192.0.2.1", "DNS:example.org"."""
    return f"IP:{name}" if _is_address(name) else f"DNS:{name}"


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"url_host": url_host, "alt_name": alt_name}
