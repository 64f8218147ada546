"""The one place where environment variables are read."""

import os


def variable(name: str) -> str | None:
    """The value of an environment variable; None where it is not set, or empty."""
    return os.environ.get(name) or None
