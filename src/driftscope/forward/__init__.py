"""The forward pass: token batches, policies, the architecture as a list of ops, streaming execution."""
