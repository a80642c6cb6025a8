"""What the runner's failures are in HTTP."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nox_api.problem import ProblemError
from nox_api.runner import RunnerUnavailableError
from nox_runner.protocol import Code, Failure

_RETRY_SECONDS = 2
_STATUS: dict[Code, int] = {
    "bad_path": 422,
    "not_found": 404,
    "exists": 409,
    "not_regular": 409,
    "not_empty": 409,
    "denied": 403,
    "too_large": 413,
    "no_space": 507,
    "busy": 503,
    "unable": 503,
}
_log = logging.getLogger("nox.runner")


@contextmanager
def as_problems() -> Iterator[None]:
    """Turn failures of the runner into problems; each that is not the client's is logged.

    A full sandbox is the clients' own doing: the access log, the metrics and /health tell of it.
    """
    try:
        yield
    except Failure as failure:
        status = _STATUS.get(failure.code, 500)
        if status >= 500 and failure.code != "no_space":
            fields = {"code": failure.code, "reason": failure.message}
            _log.error("runner_failure", extra={"fields": fields})
        if status == 422:
            errors = [{"field": "path", "reason": failure.message}]
            raise ProblemError(422, failure.message, extra={"errors": errors}) from None
        detail = "The runner failed; its log says why" if status == 500 else failure.message
        raise _problem(status, detail) from None
    except RunnerUnavailableError as error:
        _log.error("runner_unavailable", extra={"fields": {"reason": str(error)}})
        raise _problem(503, "The runner is not available") from None


def _problem(status: int, detail: str) -> ProblemError:
    headers = {"Retry-After": str(_RETRY_SECONDS)} if status == 503 else {}
    return ProblemError(status, detail, headers=headers)
