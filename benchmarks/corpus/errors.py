"""What can go wrong while a corpus is built."""

from m2d_embed.errors import M2DEmbedError


class CorpusError(M2DEmbedError, RuntimeError):
    """A package that cannot be had or read, or a machine that lacks what building a corpus needs."""
