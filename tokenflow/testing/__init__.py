"""The conformance kit for plugin authors: checks a plugin or a backbone against its contract.

Example:
    >>> check_kernel(NNField())  # every check in turn; raises ConformanceError at the first failure

In pytest, each check as its own test:
    >>> @pytest.mark.parametrize("check", kernel_checks(NNField()))
    ... def test_contract(check):
    ...     check()
"""

from tokenflow.testing.backbone_checks import backbone_checks, check_backbone
from tokenflow.testing.checks import Check, ConformanceError
from tokenflow.testing.editor_checks import check_editor, editor_checks
from tokenflow.testing.kernel_checks import check_kernel, kernel_checks
from tokenflow.testing.tiny import tiny_backbone, tiny_clip, write_tiny_model

__all__ = [
    "Check",
    "ConformanceError",
    "backbone_checks",
    "check_backbone",
    "check_editor",
    "check_kernel",
    "editor_checks",
    "kernel_checks",
    "tiny_backbone",
    "tiny_clip",
    "write_tiny_model",
]
