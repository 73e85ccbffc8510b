"""The version of the package, alone so that ``setup.py`` can read it without importing fairseq."""

__version__ = "0.1.0"
