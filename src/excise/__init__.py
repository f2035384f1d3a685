"""Remove whole blocks from language models."""

__version__ = "0.1.0"
