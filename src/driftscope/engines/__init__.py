"""What computes logits and taps: our own paths, llama.cpp, transformers."""
