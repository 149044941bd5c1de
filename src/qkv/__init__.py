"""qkv: the whole Transformer family from one set of parts. Importing this module imports no torch."""

__version__ = "0.1.0"
