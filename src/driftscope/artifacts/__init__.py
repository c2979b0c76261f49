"""Models on disk: reading, names, legal transforms, tokenizers, sources and derivation."""
