"""Builds a training corpus from public sources: ``python -m benchmarks.corpus debian | github``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm.auto import tqdm

from benchmarks.corpus import (
    CorpusSummary,
    build_debian,
    build_repositories,
    read_package_list,
    read_repository_list,
)
from m2d_embed.errors import M2DEmbedError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def debian(
    out: Annotated[Path, typer.Option("--out", help="Folder of the corpus; what is there already is kept.")],
    packages: Annotated[
        Path | None, typer.Option(help="A file with one package a line; by default that of this folder.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Packages downloaded and converted at a time.")] = 2,
) -> None:
    """Build a training corpus from the audio in Debian packages. Needs apt-get (not root) and the extra 'pretrain'.

    About 65 hours of music, speech, effects, ambience and instruments, as 16 kHz FLAC files with a manifest that tells
    source package, kind and licence. Give the same command again after an interruption: it goes on where that stopped.
    """
    with tqdm(unit="package", disable=None) as bar:
        names = read_package_list(packages) if packages else None
        summary = build_debian(out, names, workers, _corpus_progress(bar))
    _end_corpus(summary, out)


@app.command()
def github(
    out: Annotated[Path, typer.Option("--out", help="Folder of the corpus; what is there already is kept.")],
    repositories: Annotated[
        Path | None,
        typer.Option(
            help="A YAML list of repositories: their names, commits, files that state the licences, and sounds by "
            "folder, kind and licence; by default that of this folder (repositories.yaml beside this file)."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Repositories fetched and converted at a time.")] = 2,
) -> None:
    """Build a training corpus from the sounds in public git repositories. Needs git and the extra 'pretrain'.

    Effects and ambience of free licences, at fixed commits: animals, machines, weather, rooms. The folder may be that
    of 'debian', whose manifest then tells of both. Give the same command again after an interruption.
    """
    with tqdm(unit="repository", disable=None) as bar:
        wanted = read_repository_list(repositories) if repositories else None
        summary = build_repositories(out, wanted, workers, _corpus_progress(bar))
    _end_corpus(summary, out)


def _corpus_progress(bar: tqdm[Any]) -> Callable[[str, int, int], None]:
    def on_progress(message: str, done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        tqdm.write(message, file=sys.stderr)

    return on_progress


def _end_corpus(summary: CorpusSummary, out: Path) -> None:
    """Tell of a corpus; exit with 1 if something that was asked for is not in it."""
    kinds = ", ".join(f"{kind} {hours:.2f} h" for kind, hours in summary.hours.items())
    print(f"{out / 'manifest.csv'}: {sum(summary.hours.values()):.2f} h from {len(summary.done)} sources ({kinds})")
    print(
        f"left out: {summary.duplicates} duplicates, {summary.silent} silent and {summary.too_short} very short "
        f"pieces, {len(summary.undecodable)} members that cannot be decoded"
    )
    for what, reasons in (
        ("not decoded", summary.undecodable),
        ("missing", summary.missing),
        ("failed", summary.failed),
    ):
        for name, reason in reasons.items():
            print(f"{what}: {name}: {reason}", file=sys.stderr)
    if summary.missing or summary.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        app()
    except M2DEmbedError as error:
        sys.exit(f"error: {error}")
