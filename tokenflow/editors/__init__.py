"""Image editing methods: what becomes of the keyframes."""

from tokenflow.editors.base import Edit, Editor, Pass, Start
from tokenflow.editors.pnp import PnP

__all__ = ["Edit", "Editor", "Pass", "PnP", "Start"]
