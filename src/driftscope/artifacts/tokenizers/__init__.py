"""Tokenizers: vocabularies from GGUF and from Hugging Face folders, and the ids that they give."""
