"""Image editing methods: what becomes of the keyframes."""

from tokenflow.editors.base import Edit, Editor, Start
from tokenflow.editors.pnp import PnP

__all__ = ["Edit", "Editor", "PnP", "Start"]
