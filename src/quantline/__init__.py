"""Quantline: quantized variants of a causal language model, proven, served, measured and reproducible.

Importing the package is free: worker environments import it with nothing but the standard library at hand.
"""

__version__ = "0.1.0"
