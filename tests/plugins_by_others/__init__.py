"""Plugins as somebody else would write them, by tokenflow's public names and its pages alone."""
