"""The ASGI application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from nox_api import __version__, exposition, files, health, problem, runs
from nox_api.access import AccessLog
from nox_api.auth import BearerAuth
from nox_api.body import BodyLimit
from nox_api.history import routes as history
from nox_api.history.recorder import DEFAULT_PATH
from nox_api.runner import RunnerClient
from nox_api.settings import FrontSettings
from nox_api.state import State

_DESCRIPTION = "Runs Python and shell programs in a sandbox. Errors are problems (RFC 9457)."


def create_app(
    settings: FrontSettings, runner: RunnerClient, history_path: str = DEFAULT_PATH
) -> FastAPI:
    """The application; `app.state.nox` is its State, by which a reload is done."""
    app = FastAPI(
        title="Nox",
        version=__version__,
        description=_DESCRIPTION,
        # The interactive pages load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    state = State(settings, runner, history_path)
    app.state.nox = state
    app.state.runner_health = health.RunnerHealthCheck(runner)
    for module in (health, runs, files, history, exposition):
        app.include_router(module.router)
    problem.install(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    # The last one added is the outermost.
    app.add_middleware(BearerAuth, tokens=lambda: state.settings.tokens())
    app.add_middleware(BodyLimit, limit=lambda: state.settings.max_body)
    app.add_middleware(AccessLog, observe=state.metrics.request)
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document that FastAPI derives, and what it cannot know."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        components = document["components"]
        components["schemas"].update(problem.schemas())
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"bearer": []}]
        document["paths"]["/health"]["get"]["security"] = [{}, {"bearer": []}]
    return app.openapi_schema or {}
