"""The weights of two models held against each other: relations of tensors, transforms, single blocks."""
