"""Making the counterpart of an artifact: an exact teacher, a quantized candidate."""
