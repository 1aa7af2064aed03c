"""The command line: its options for all commands, its errors and its signals."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import threading
from typing import Annotated

import typer

from m2d_embed import __version__
from m2d_embed.errors import M2DEmbedError

app = typer.Typer(
    name="m2d-embed",
    help="Audio embeddings from Masked Modeling Duo (M2D). Works offline on the bundled model; "
    "--model takes a folder, a published .pth or .zip, a Hub repository (org/name or org/name@revision) or the name "
    "of an official release.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; errors of ours are printed without a traceback."""
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except M2DEmbedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; try again to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno is None:
            raise
        where = f": {error.filename}" if error.filename else ""
        hint = "; what was done is kept, try again to go on" if error.errno in _DISK_FULL else ""
        print(f"error: {error.strerror}{where}{hint}", file=sys.stderr)
        sys.exit(2)


def _terminate(number: int, frame: object) -> None:
    """End as on Ctrl-C, so that what is done is kept: clusters and containers ask in this way."""
    sys.exit(128 + number)


def _version(show: bool) -> None:
    if show:
        print(f"m2d-embed {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more, e.g. what a checkpoint holds besides.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    logger = logging.getLogger("m2d_embed")  # not the root: huggingface_hub prints its own messages
    if verbose and not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
