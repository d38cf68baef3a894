import pytest


@pytest.fixture(autouse=True)
def always_restore_scope(restore_scope):
    """In all tests of this folder."""
