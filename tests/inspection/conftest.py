"""One compilation and its page for the tests of the report."""

import pytest

from slim.inspection.page import write_page
from tests.stories import tiny_story


@pytest.fixture(scope="session")
def story():
    return tiny_story()


@pytest.fixture(scope="session")
def page(story, tmp_path_factory):
    return write_page(story, tmp_path_factory.mktemp("page") / "report.html")
