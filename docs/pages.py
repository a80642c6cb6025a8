"""A hook of mkdocs: the navigation lists only pages that exist, and every decision, without being told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent


def existing(entries: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for entry in entries:
        if isinstance(entry, str):
            if (DOCS / entry).exists():
                kept.append(entry)
            continue
        ((title, below),) = entry.items()
        if title == "Decisions":
            below = [f"decisions/{path.name}" for path in sorted((DOCS / "decisions").glob("*.md"))]
        kept.append({title: below if isinstance(below, str) else existing(below)})
    return kept


def on_config(config: Any) -> Any:
    config["nav"] = existing(config["nav"])
    return config
