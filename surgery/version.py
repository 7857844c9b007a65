"""The version. Not in the package's ``__init__``, which another project on the index may have overwritten."""

__version__ = "0.1.0"
