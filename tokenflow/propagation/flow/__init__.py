"""Optical flow: what finds it (DIS, RAFT, files), and one cache of it for kernels and metrics."""
