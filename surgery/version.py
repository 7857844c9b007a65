"""The version. It is not in the package's ``__init__``, which another project's package of that name may have overwritten."""

__version__ = "0.2.0"
