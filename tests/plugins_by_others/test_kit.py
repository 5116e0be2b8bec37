"""The conformance kit on each of them."""

from __future__ import annotations

import pytest

from tests.plugins_by_others.no_inversion import NoInversion
from tests.plugins_by_others.prompt_to_prompt import PromptToPrompt
from tests.plugins_by_others.top_k import TopK
from tokenflow.testing import Check, editor_checks, kernel_checks

CHECKS = [
    *editor_checks(PromptToPrompt()),
    *editor_checks(NoInversion()),
    *kernel_checks(TopK()),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: f"{type(c.plugin).__name__}-{c.__name__}")
def test_contract(check: Check) -> None:
    check()
