"""docs/models.md: its tables are those of the tests and of the sizes that are published."""

import pytest

from shared.models.gpt import GPT
from shared.registry import without_memory
from tests.models_page import KNOWN, PAGE, config_of, filled


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_has_the_parameters_that_its_files_have(name):
    with without_memory():
        assert GPT(config_of(name)).num_parameters() == KNOWN[name][1]


@pytest.mark.slow
def test_the_page_is_what_the_tests_make_of_it():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "run: python -m tests.models_page"
