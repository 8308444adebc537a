"""The package's version: part of the key under which compiled regions are cached."""

__version__ = "0.1.0"
