"""The sweep's band where nothing else is said; in a module of its own, which loads at once."""

DEFAULT_BAND = (0.0, 1.6)
"""Measured over expected NMSE within which a tensor counts as quantized from the other."""
