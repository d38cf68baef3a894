import pytest
from mmengine.logging import MMLogger


@pytest.fixture(autouse=True)
def always_restore_scope(restore_scope):
    """In all tests of this folder."""


@pytest.fixture
def log(caplog, request):
    """What the engine's current logger says."""
    logger = MMLogger.get_instance(request.module.__name__)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
