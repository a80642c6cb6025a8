from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import hypothesis.configuration
import pytest
from service import Service, why_not

# A checkout stays as it was.
hypothesis.settings.register_profile("clean", database=None)
hypothesis.settings.load_profile("clean")
hypothesis.configuration.set_hypothesis_home_dir(tempfile.gettempdir())


@pytest.fixture(scope="session")
def possible() -> None:
    if reason := why_not():
        print(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session", params=["zygote", "bubblewrap"])
def nox(possible: None, request: pytest.FixtureRequest) -> Iterator[Service]:
    """One service per backend, for all tests that neither stop it nor fill it."""
    service = Service(NOX_BACKEND=request.param)
    try:
        yield service.start()
    finally:
        service.stop()


@pytest.fixture
def own(possible: None) -> Iterator[Callable[..., Service]]:
    """Makes services for one test; `start` them yourself."""
    services: list[Service] = []

    def make(**settings: object) -> Service:
        services.append(Service(**settings))
        return services[-1]

    yield make
    for service in services:
        service.stop()
