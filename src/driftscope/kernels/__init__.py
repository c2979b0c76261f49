"""Exact arithmetic on quantized tensors: block formats, dequantize, quantize activations, matmul.

Nothing here knows about models or files. Each module has a plain NumPy twin of the same name in
`driftscope.kernels.reference`, which says what is computed; the modules here say how to do it fast.
Every result is the same, bit for bit, whatever the number of threads and whatever else is in the batch.
"""
