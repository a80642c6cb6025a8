from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from service import Service, why_not


@pytest.fixture(scope="session")
def possible() -> None:
    if reason := why_not():
        print(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def nox(possible: None) -> Iterator[Service]:
    """One service for all tests that neither stop it nor fill it."""
    service = Service()
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
