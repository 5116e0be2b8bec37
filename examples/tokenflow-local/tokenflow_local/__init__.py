"""Local edits for tokenflow."""

from tokenflow_local.editor import LocalPnP
from tokenflow_local.kernel import LocalField

__all__ = ["LocalField", "LocalPnP"]
