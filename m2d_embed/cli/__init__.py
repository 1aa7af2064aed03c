"""The command line: ``m2d-embed embed | tag | zero-shot | similar | plot | probe | convert | export | info | models``.

And for training ``finetune | pretrain | masks``.
"""

from m2d_embed.cli import embed, explore, models, training  # noqa: F401  (they add their commands to ``app``)
from m2d_embed.cli.app import app, main

__all__ = ["app", "main"]
