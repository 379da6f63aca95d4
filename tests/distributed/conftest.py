"""The processes that the tests here share: one set for each number of them."""

from collections.abc import Callable
from functools import cache

import pytest
from ranks import case_of, run_cases


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[str, str]]:
    """For a number of processes: what went wrong with each of the tests selected for it."""
    cases = [(item, case) for item in request.session.items if (case := case_of(item))]

    @cache
    def of(world: int) -> dict[str, str]:
        selected = [case for item, case in cases if case.arguments["world"] == world]
        return run_cases(world, selected, tmp_path_factory.mktemp(f"ranks{world}"))

    return of
