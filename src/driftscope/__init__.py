"""driftscope: is it a bug or the price of quantization, and where does it start?"""

__version__ = "0.1.0"
