"""How ranks share a clip: their group, their windows, and how they stop."""
