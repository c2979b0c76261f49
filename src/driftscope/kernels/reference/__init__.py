"""What the kernels compute, in plain NumPy, written to be read: the oracle of the tests.

One module for each module of `driftscope.kernels`, with the same function names.
"""
