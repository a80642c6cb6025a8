# SPDX-License-Identifier: Apache-2.0
"""The layout of a bundle: one uncompressed tar with BUNDLE.json, sbom.json, releases/ and collection/."""

from __future__ import annotations

import json
import tarfile
from typing import Any

FORMAT = 1
CONTENTS = "BUNDLE.json"


def read_contents(tar: tarfile.TarFile) -> dict[str, Any]:
    """What BUNDLE.json says. Raises KeyError or ValueError where this isn't a bundle that we can read."""
    handle = tar.extractfile(CONTENTS)
    contents: dict[str, Any] = json.loads(handle.read()) if handle else {}
    if contents.get("format") != FORMAT:
        raise ValueError(f"format {contents.get('format')}, this toolkit reads {FORMAT}")
    return contents
