import pytest

from tests.space.models import make_models


@pytest.fixture(scope="session")
def tiny_space(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("space-models"))
