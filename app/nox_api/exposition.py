"""`GET /metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from nox_api import state
from nox_api.problem import responses

router = APIRouter(tags=["metrics"], responses=responses(401))


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format"}},
    summary="Measurements for Prometheus",
)
async def metrics(request: Request) -> Response:
    """Counters since the start of the front; slots, queue and sandbox as they are now."""
    nox = state.of(request)
    content = nox.metrics.exposition(
        nox.slots, nox.recorder, await request.app.state.runner_health.ask()
    )
    return Response(content, media_type=CONTENT_TYPE_LATEST)
