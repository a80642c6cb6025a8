"""Links between the repository's own documents. Those among the pages of docs/ are the page builder's to check."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
DOCUMENTS = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True
).stdout.split()


@pytest.mark.parametrize("name", DOCUMENTS or [str(path.relative_to(ROOT)) for path in ROOT.glob("*.md")])
def test_links_lead_somewhere(name: str) -> None:
    document = ROOT / name
    targets = LINK.findall(re.sub(r"(?ms)^```.*?^```", "", document.read_text(encoding="utf-8")))
    assert [target for target in targets if not (document.parent / target).exists()] == []
