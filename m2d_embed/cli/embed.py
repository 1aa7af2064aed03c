"""``m2d-embed embed``: files to vectors on disk."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm.auto import tqdm

from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.labelled.inputs import find_inputs

if TYPE_CHECKING:
    from m2d_embed.jobs.shards import Shard, ShardSummary


from m2d_embed.cli.app import app
from m2d_embed.cli.options import (
    BatchSize,
    Concat,
    Device,
    Dtype,
    Flat,
    Inputs,
    Kind,
    Layers,
    Listing,
    Model,
    Scenes,
    Threads,
    features_of,
    load_model,
)


@app.command()
def embed(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="*.parquet, *.npz, or a folder that gets one .npy a clip.")
    ],
    inputs: Inputs = None,
    listing: Listing = None,
    kind: Annotated[Kind, typer.Option(help="One embedding a clip, or one every hop with its time.")] = Kind.scene,
    model: Model = "",
    hop_ms: Annotated[float | None, typer.Option(help="Step of timestamps; the model's own by default.")] = None,
    layers: Layers = None,
    concat: Concat = None,
    flat: Flat = None,
    scene_pooling: Scenes = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    batch_size: BatchSize = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output; start anew.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Threads that read files ahead of the model.", show_default="by the number of cores"),
    ] = None,
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Run the model through torch.compile; for GPUs and many clips.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time went, and what limits it.")] = False,
    shard: Annotated[
        str,
        typer.Option(
            help="Take one share of the files, e.g. 3/8, or auto: the one that Slurm, MPI or another launcher gave to "
            "this process; give the other shares to other processes."
        ),
    ] = "",
) -> None:
    """Turn sound files into embeddings.

    A bad file is reported and skipped; the exit status is then 1. Give the same command again after a run was killed:
    it goes on where that stopped. On several devices: torchrun --nproc-per-node N -m m2d_embed embed ..., or --shard;
    the last process to finish puts the shards together.
    """
    from m2d_embed.jobs.embed import embed_files
    from m2d_embed.jobs.shards import Shard, embed_shard, local_device
    from m2d_embed.runtime.batching import Pipeline
    from m2d_embed.runtime.profiling import Profile, Stopwatch

    files = find_inputs(inputs or [], listing)
    part = Shard.parse(shard) if shard else Shard.from_environment()
    if part is not None and overwrite:
        raise ConfigError(f"--overwrite does not go with shards, others may be at work; remove {output} first.")
    features = features_of(layers, concat, flat, scene_pooling, hop_ms)
    loaded = load_model(model, device if part is None else local_device(device), dtype, features, threads)
    if compile_model:
        loaded.compile_encoder()
    stopwatch = Profile() if profile else Stopwatch()
    pipeline = Pipeline(workers, stopwatch)
    started = time.perf_counter()
    hidden = None if part is None or part.number == 1 else True  # one bar on a terminal
    with tqdm(total=len(files) if part is None else None, unit="clip", disable=hidden) as bar:

        def on_progress(file: Path, error: AudioError | None) -> None:
            bar.update()
            if error is not None:
                tqdm.write(f"skipped: {error}", file=sys.stderr)

        if part is None:
            summary = embed_files(loaded, files, output, kind.value, batch_size, overwrite, on_progress, pipeline)
        else:
            shared = embed_shard(loaded, files, output, part, kind.value, batch_size, on_progress, pipeline)
    if isinstance(stopwatch, Profile):
        print(stopwatch.table(pipeline.threads_for(loaded.device)))
    if part is not None:
        _report_shard(shared, part, output, exits=bool(shard))
        return
    done = summary.embedded + summary.resumed
    earlier = f" ({summary.resumed} by an earlier run)" if summary.resumed else ""
    size = loaded.scene_embedding_size if kind == Kind.scene else loaded.timestamp_embedding_size
    where = f" -> {output}" if done else f"; there is no {output}"
    print(f"{done} clips{earlier}, {size} values each, {time.perf_counter() - started:.1f} s{where}")
    if summary.failed:
        print(f"{len(summary.failed)} of {len(files)} files could not be embedded, see above.", file=sys.stderr)
        raise typer.Exit(1)


def _report_shard(done: ShardSummary, part: Shard, output: Path, exits: bool) -> None:
    """Tell what became of a share and of the whole; ``exits``: with status 1 even if only this share has bad files."""
    earlier = f" ({done.share.resumed} by an earlier run)" if done.share.resumed else ""
    print(f"shard {part.number}/{part.count}: {done.share.embedded + done.share.resumed} clips{earlier}")
    if done.missing:
        print(f"shards not done yet: {', '.join(map(str, done.missing))}; the last one puts {output} together")
    if done.whole is not None:
        clips = done.whole.embedded + done.whole.resumed
        print(f"{clips} clips -> {output}" if clips else f"there is no {output}")
        for file, error in done.whole.failed.items():
            if file not in done.share.failed:  # those are reported already
                print(f"skipped: {error}", file=sys.stderr)
    failed = (done.whole or done.share).failed
    if failed:
        print(f"{len(failed)} files could not be embedded, see above.", file=sys.stderr)
    # torchrun stops all other processes when one ends with another status than 0.
    if failed and (exits or done.whole is not None):
        raise typer.Exit(1)
