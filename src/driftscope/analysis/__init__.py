"""Comparing, relating and judging: pure functions of evidence and of what the kernels measure."""
