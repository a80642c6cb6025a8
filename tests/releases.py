"""Releases to try: copies of this checkout's service under another number, good ones and bad ones."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# At the end of nox_api/application.py: every run of a Python program takes this much longer.
SLOW = """

_prompt = create_app


def create_app(*words):
    import asyncio
    app = _prompt(*words)

    @app.middleware("http")
    async def slow(request, call_next):
        await asyncio.sleep(1.5 if request.url.path == "/run_py" else 0)
        return await call_next(request)

    return app
"""


def tree(place: Path, version: str, additions: dict[str, str]) -> Path:
    """Writes place/version; `additions` are a file of app/ and what is added at its end. Returns its app/."""
    app = place / version / "app"
    shutil.rmtree(app.parent, ignore_errors=True)
    shutil.copytree(ROOT / "app", app, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copytree(ROOT / "requirements", app.parent / "requirements")
    for name, key in (("pyproject.toml", "version"), ("nox_runner/__init__.py", "__version__")):
        path = app / name
        path.write_text(re.sub(rf'(?m)^{key} = "[^"]+"', f'{key} = "{version}"', path.read_text()))
    for name, addition in additions.items():
        with (app / name).open("a") as handle:
            handle.write(addition)
    return app
