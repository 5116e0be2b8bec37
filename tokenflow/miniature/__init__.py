"""The embedded models, the scenes that they know, and a judge of pictures of these."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
TRANSFORMER = Path(__file__).parent / "transformer"
LCM = Path(__file__).parent / "lcm"
