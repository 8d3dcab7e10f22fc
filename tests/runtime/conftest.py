"""In runtime tests, torch.empty gives NaN; inside the ranks the same holds through run_ranks(poison=True)."""

from collections.abc import Iterator

import pytest

from tests.runtime.poison import poisoned_empty


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_empty():
        yield
