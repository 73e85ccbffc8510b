"""A datastore that every test of this folder begins from."""

import shutil

import pytest
from helpers.small import make_datastore
from helpers.writing import SIZES, make_rows


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A datastore that nothing disturbed."""
    return make_datastore(tmp_path_factory.mktemp("finished") / "d", *make_rows(), SIZES)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(finished, tmp_path / "copy")
