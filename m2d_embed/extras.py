"""What the extra ``eval`` brings, asked for by name where it is missing."""

from __future__ import annotations

import importlib.util

from m2d_embed.errors import UnsupportedError


def require_sklearn(what: str) -> None:
    """Raise UnsupportedError if scikit-learn, which ``what`` needs, is not installed."""
    require("sklearn", what)


def require(module: str, what: str) -> None:
    """Raise UnsupportedError if a module of the extra ``eval``, which ``what`` needs, is not installed."""
    if importlib.util.find_spec(module) is None:
        raise UnsupportedError(f"{what}: {module} is not installed: pip install 'm2d-embed[eval]'")
