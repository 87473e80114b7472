"""One command line for mixture-of-experts systems."""

__version__ = "0.1.0"
