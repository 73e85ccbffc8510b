"""The one study that all tests of the report look at."""

import pytest
from helpers.study import make_study


@pytest.fixture(scope="session")
def study():
    return make_study()
