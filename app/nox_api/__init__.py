"""The front: HTTP, the token, the limits, the queue. It never starts a process.

`nox_api.app` is the ASGI application, built at its first use from the settings in the default
place, so that `uvicorn nox_api:app` works. The service itself starts by `python -m nox_api`, which
adds log files, reload, and an orderly stop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nox_runner import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

    app: FastAPI

__all__ = ["__version__", "app"]


def __getattr__(name: str) -> object:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nox_api import application, settings
    from nox_api.runner import DEFAULT_SOCKET, RunnerClient

    built = application.create_app(
        settings.load(settings.DEFAULT_PATH), RunnerClient(DEFAULT_SOCKET)
    )
    globals()["app"] = built
    return built
