"""``python -m m2d_embed`` is ``m2d-embed``; torchrun starts it so: ``torchrun -m m2d_embed pretrain ...``."""

from m2d_embed.cli import main

if __name__ == "__main__":
    main()
