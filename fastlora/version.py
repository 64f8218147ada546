"""The version of this package, for those who stand below the package's own names."""

__version__ = "0.1.0"
