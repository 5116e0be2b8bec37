"""Optical flow: what finds it (DIS, RAFT, files), and what mends it."""
