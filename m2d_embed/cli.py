"""The command line: ``m2d-embed embed | tag | zero-shot | similar | plot | probe | convert | export | info | models``.

And for training ``finetune | pretrain | masks | corpus``.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm.auto import tqdm

from m2d_embed import __version__
from m2d_embed.audio.clips import load_audio
from m2d_embed.audio.find import find_inputs
from m2d_embed.checkpoints import registry
from m2d_embed.config import FeatureConfig, resolve_layers
from m2d_embed.errors import AudioError, ConfigError, M2DEmbedError, ModelNotFoundError, UnsupportedError

if TYPE_CHECKING:
    from m2d_embed.jobs.shards import Shard, ShardSummary
    from m2d_embed.m2d import M2D
    from m2d_embed.model.heads.tagging import Tag
    from m2d_embed.pretrain.corpus import CorpusSummary

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_A_TAGGER = "m2d_as_vit_base-80x1001p16x16-240213_AS-FT_enconly"
_A_CLAP = "m2d_clap_vit_base-80x608p16x16-240128"

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


corpus_app = typer.Typer(help="Build training corpora from public sources.", no_args_is_help=True)
app.add_typer(corpus_app, name="corpus")


class Kind(StrEnum):
    """What an embedding is of."""

    scene = "scene"
    timestamps = "timestamps"


class Precision(StrEnum):
    """Dtype of the model's matrices."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"


class Probe(StrEnum):
    """A classifier on fixed embeddings."""

    linear = "linear"
    knn = "knn"
    mlp = "mlp"


class ExportKind(StrEnum):
    """What an exported graph returns."""

    scene = "scene"
    timestamps = "timestamps"
    tags = "tags"


class Pooling(StrEnum):
    """How a scene embedding is made of those of its time columns."""

    mean = "mean"
    mean_std = "mean_std"


class HalfPrecision(StrEnum):
    """A half-precision dtype to store."""

    bf16 = "bf16"
    fp16 = "fp16"


Inputs = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Sound files, folders (searched recursively), glob patterns, or CSV files with a column 'file'."
    ),
]
Listing = Annotated[
    Path | None,
    typer.Option("--list", help="A file with one path a line, or a CSV with a column 'file'; - is standard input."),
]
Model = Annotated[str, typer.Option("--model", "-m", help="Which model; the bundled one by default.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ... By default a CUDA GPU if there is one.")]
Dtype = Annotated[Precision | None, typer.Option(help="Precision of the matrices.", show_default="fp32")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Threads that the model computes with on a CPU; OMP_NUM_THREADS chooses, too.",
        show_default="by the cores that it may use",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows encoded at a time, at most.")]
Layers = Annotated[
    str | None, typer.Option(help="Transformer blocks to read, e.g. -1 or 6,9,11.", show_default="the model's own")
]
Concat = Annotated[bool, typer.Option("--concat", help="Concatenate several layers; else they are averaged.")]
Flat = Annotated[bool, typer.Option("--flat", help="Average the patches of a column instead of stacking.")]
Scenes = Annotated[
    Pooling | None,
    typer.Option(help="Scenes: the mean over time, or also the standard deviation.", show_default="the model's own"),
]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many to show.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of text.")]


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
    concat: Concat = False,
    flat: Flat = False,
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
    features = _features(layers, concat, flat, scene_pooling, hop_ms)
    loaded = _load(model, device if part is None else local_device(device), dtype, features, threads)
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


@app.command()
def tag(
    model: Annotated[str, typer.Option("--model", "-m", help=f"A fine-tuned checkpoint, e.g. {_A_TAGGER}.")],
    inputs: Inputs = None,
    listing: Listing = None,
    top_k: TopK = 5,
    frames: Annotated[bool, typer.Option("--frames", help="Tags of every time column, with its time.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Print the most probable labels of each clip, best first. Needs a fine-tuned checkpoint."""
    import torch

    files = find_inputs(inputs or [], listing)
    loaded = _load(model, device, dtype, FeatureConfig(), threads)
    head = loaded.column_head() if frames else loaded.tagging_head()
    loaded.features = loaded.head_features()

    def tag_clip(file: Path) -> None:
        scene = torch.as_tensor(loaded.encode(file)).to(loaded.device)
        _print_tags(file, None, head.top_tags(head(scene[None])[0], top_k), as_json)

    def tag_columns(file: Path) -> None:
        columns, times = loaded.encode_timestamps(file)
        for logits, ms in zip(head(columns.to(loaded.device)), times.tolist(), strict=True):
            _print_tags(file, ms / 1000, head.top_tags(logits, top_k), as_json)

    with torch.no_grad():
        _for_each(files, tag_columns if frames else tag_clip)


@app.command()
def zero_shot(
    labels: Annotated[str, typer.Option("--labels", "-l", help="Labels, separated by commas.")],
    model: Annotated[str, typer.Option("--model", "-m", help=f"A CLAP checkpoint, e.g. {_A_CLAP}.")],
    inputs: Inputs = None,
    listing: Listing = None,
    template: Annotated[
        str, typer.Option(help="Sentence put around each label; {} stands for it.")
    ] = "{} can be heard",
    top_k: TopK = 5,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Classify clips by labels of your own. Needs a CLAP checkpoint and the extra 'clap'."""
    import torch

    from m2d_embed.model.heads.tagging import Tag

    names = [label.strip() for label in labels.split(",") if label.strip()]
    if not names or "{}" not in template:
        raise ConfigError("--labels needs at least one label, and --template the place {} for it.")
    files = find_inputs(inputs or [], listing)
    loaded = _load(model, device, dtype, FeatureConfig(), threads)
    clap = loaded.clap_head()

    with torch.no_grad():
        texts = loaded.encode_text([template.replace("{}", name) for name in names])

        def classify(file: Path) -> None:
            audio = torch.from_numpy(load_audio(file, loaded.sample_rate)).to(loaded.device)
            scores = clap.similarity(loaded.encode_audio_clap(audio[None]), texts)[0].softmax(-1)
            best = scores.topk(min(top_k, len(names)))
            tags = [Tag(names[i], s) for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
            _print_tags(file, None, tags, as_json)

        _for_each(files, classify)


@app.command()
def similar(
    query: Annotated[Path, typer.Argument(help="A sound file.")],
    among: Annotated[
        list[Path],
        typer.Argument(
            help="Sound files or folders to search, or what 'embed' wrote: .npz, .parquet, folders or patterns."
        ),
    ],
    model: Model = "",
    top_k: TopK = 10,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Print the clips nearest to a query by cosine similarity of their scene embeddings, nearest first."""
    import numpy as np

    from m2d_embed.jobs.outputs import find_outputs

    loaded = _load(model, device, dtype, FeatureConfig(), threads)
    target = np.asarray(loaded.encode(query))
    failed = 0
    outputs = find_outputs(among)
    if outputs:
        names, embeddings = _read_index(outputs, loaded)
    else:
        names, embeddings, failed = _encode_readable(loaded, find_inputs(among))
    lengths = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(target)
    scores = embeddings @ target / np.maximum(lengths, np.finfo(np.float32).tiny)
    others = [i for i in np.argsort(-scores, kind="stable") if not _same_file(names[i], query)]
    for i in others[:top_k]:
        line = {"file": names[i], "similarity": round(float(scores[i]), 6)}
        print(json.dumps(line, ensure_ascii=False) if as_json else f"{scores[i]:.4f}  {names[i]}")
    if failed:
        raise typer.Exit(1)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="A sound file.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The PNG; by default <file>.png in the current folder.")
    ] = None,
    model: Model = "",
    hop_ms: Annotated[float | None, typer.Option(help="Step of timestamps; the model's own by default.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
) -> None:
    """Draw a clip: log-mel, self-similarity of its timestamps, their principal components over time."""
    from m2d_embed.plots import plot_clip

    output = output or Path(f"{file.name}.png")
    plot_clip(_load(model, device, dtype, FeatureConfig(hop_ms=hop_ms), threads), file, output)
    print(output)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .pth, its folder, a release's .zip, or a converted folder.")],
    destination: Annotated[Path, typer.Argument(help="A new folder for config.json, model.safetensors and README.md.")],
    dtype: Annotated[
        list[HalfPrecision] | None, typer.Option(help="Also write a half-precision file; repeatable.")
    ] = None,
) -> None:
    """Convert a checkpoint of any layout to config.json + safetensors."""
    from m2d_embed.checkpoints import layouts
    from m2d_embed.m2d import parse_dtype

    if not source.exists():
        raise ModelNotFoundError(f"{source}: no such file or folder.")
    checkpoint = layouts.convert(source, destination, [parse_dtype(half.value) for half in dtype or ()])
    print(f"{destination}: {', '.join(sorted(file.name for file in destination.iterdir()))}")
    if checkpoint.unused:
        print(f"left out, not part of the model: {layouts.summarise_unused(checkpoint.unused)}")


@app.command()
def export(
    onnx: Annotated[Path | None, typer.Option("--onnx", help="The ONNX file to write, *.onnx.")] = None,
    pt2: Annotated[Path | None, typer.Option("--pt2", help="The torch.export program to write, *.pt2.")] = None,
    kind: Annotated[
        ExportKind, typer.Option(help="One embedding a clip, one every hop with its time, or a classifier's labels.")
    ] = ExportKind.scene,
    model: Model = "",
    hop_ms: Annotated[float | None, typer.Option(help="Step of timestamps; the model's own by default.")] = None,
    layers: Layers = None,
    concat: Concat = False,
    flat: Flat = False,
    scene_pooling: Scenes = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX, 18 (the default) to 25.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Write a model for other runtimes: waveform in, embeddings out, any length and batch size.

    What is written is run and compared with the model. --onnx needs the extra 'onnx'.
    """
    from m2d_embed.export import check_target, describe, export_onnx, export_program

    if onnx is None and pt2 is None:
        raise ConfigError("what is to be written? Give --onnx FILE.onnx, --pt2 FILE.pt2, or both.")
    features = _features(layers, concat, flat, scene_pooling, hop_ms)
    if kind is ExportKind.tags and features != FeatureConfig():
        raise ConfigError("--kind tags takes the features the classifier was trained on; leave out options for them.")
    if hop_ms is not None and kind is not ExportKind.timestamps:
        raise ConfigError("--hop-ms is for --kind timestamps.")
    if opset is not None and onnx is None:
        raise ConfigError("--opset is for --onnx.")
    if onnx is not None:
        _require_extra("onnx", "onnx", "onnxruntime", "onnxscript")
        check_target(onnx, ".onnx", overwrite)
    if pt2 is not None:
        check_target(pt2, ".pt2", overwrite)
    loaded = _load(model, "cpu", Precision.fp32, features)
    if onnx is not None:
        print(describe(export_onnx(loaded, onnx, kind.value, opset, overwrite)))
    if pt2 is not None:
        print(describe(export_program(loaded, pt2, kind.value, overwrite)))


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Which model; the bundled one by default.")] = "", as_json: Json = False
) -> None:
    """Show a model's shape, rate, embedding sizes, source and licence."""
    facts = _facts(_load(model, "cpu", None, FeatureConfig()))
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


@app.command()
def models(as_json: Json = False) -> None:
    """List the models known by name: the bundled one and NTT's official releases."""
    releases = [(release.name, f"official release {release.tag}") for release in registry.RELEASES.values()]
    for name, where in [(registry.BUNDLED_NAME, "bundled"), *releases]:
        print(json.dumps({"name": name, "where": where}) if as_json else f"{name:<56}  {where}")


@app.command()
def probe(
    data: Annotated[Path, typer.Argument(help="A folder with one sub-folder a label, or a CSV (file, label, fold).")],
    model: Model = "",
    probe: Annotated[list[Probe] | None, typer.Option(help="Which classifiers; repeatable. All by default.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the report; probe-<data>-<model> by default.")
    ] = None,
    label_column: Annotated[str, typer.Option(help="The CSV's column of labels; 'label' or 'labels' by default.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many clips, some of every label.")] = None,
    draw_map: Annotated[bool, typer.Option("--map", help="Also write map.html: all clips to see and hear.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn: folds, if the data has none, the MLP ...")] = 0,
    layers: Layers = None,
    concat: Concat = False,
    flat: Flat = False,
    scene_pooling: Scenes = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    batch_size: BatchSize = 32,
) -> None:
    """Score embeddings on labelled clips: linear, nearest-neighbour and MLP probe. Needs the extra 'eval'.

    Prints a table, and writes results.json, predictions.csv and confusion.png. Embeddings are kept in the cache, so a
    second look at the same clips is quick, and a run that was stopped goes on where it was.
    """
    _require_extra("eval", "sklearn")
    from m2d_embed.evaluate.probe_run import ProbeOptions, data_name, run_probe
    from m2d_embed.evaluate.report import format_report

    features = _features(layers, concat, flat, scene_pooling)
    loaded = _load(model, device, dtype, features, threads)
    name = loaded.config.name or Path(model).name
    output = output or Path(f"probe-{data_name(data, label_column)}-{name}")
    probes = tuple(chosen.value for chosen in probe or Probe)
    options = ProbeOptions(probes, label_column, limit, seed, batch_size, draw_map, show_progress=True)
    report, files = run_probe(loaded, data, output, options)
    print(format_report(report))
    print(f"-> {output}: {', '.join(file.name for file in files)}")


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe of the package (--list).")] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="E.g. data.source=sounds/ training.steps=1000")
    ] = None,
    export: Annotated[
        bool, typer.Option("--export", help="Export the newest checkpoint of the run, without training further.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the whole recipe, defaults included, and stop.")] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes of the package.")] = False,
) -> None:
    """Pre-train a model. Needs the extra 'pretrain'.

    Give the same command again to go on with a run that was stopped. On several devices: torchrun --nproc-per-node N
    -m m2d_embed pretrain ..., or accelerate launch.
    """
    _require_extra("pretrain", "accelerate", "yaml", "tensorboard", "webdataset", "braceexpand", "sklearn")
    from m2d_embed.pretrain.recipe import known_recipes, load_recipe

    if list_recipes:
        for name, about in known_recipes().items():
            print(f"{name:<20}{about}")
        return
    if not recipe:
        raise ConfigError("which recipe? Give a YAML file, or one of the names that --list shows.")
    loaded = load_recipe(recipe, overrides or ())
    if show:
        print(loaded.to_yaml(), end="")
        return
    from m2d_embed.pretrain import loop
    from m2d_embed.training.processes import is_main_process

    if export:
        print(loop.export_latest(loaded))
        return
    try:
        exported = loop.pretrain(loaded)
    except KeyboardInterrupt as error:  # before the first step, or a second one
        print("interrupted; what is done is kept, try again to go on", file=sys.stderr)
        raise typer.Exit(130) from error
    if not is_main_process():
        return
    print(exported or f"stopped and saved in {loaded.folder}; give the same command again to go on")


@app.command()
def finetune(
    data: Annotated[Path, typer.Argument(help="A folder with a sub-folder a label, or a CSV of clips or of events.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="E.g. epochs=20 lr=5e-4 lora.rank=8")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Which model; the bundled one by default.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run; runs/finetune-<data>-<model> by default.")
    ] = None,
    fold: Annotated[
        str | None, typer.Option(help="The fold to test; the lowest by default. 'all': each in turn; 'none': no test.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file with settings, e.g. an earlier recipe.yaml.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print all settings, defaults included, and stop.")] = False,
) -> None:
    """Train a classifier on labelled clips or events, from a pretrained model. Needs the extra 'eval'.

    Give the same command again to go on with a run that was stopped. The model is in <output>/export; 'tag' takes it.
    On several devices: torchrun --nproc-per-node N -m m2d_embed finetune ..., or accelerate launch.
    """
    _require_extra("eval", "accelerate", "yaml", "tensorboard", "sklearn")
    from m2d_embed.finetune.recipe import load_recipe

    given = {"data": data, "model": model, "output": output, "fold": fold}
    named = {key: os.path.expanduser(value) for key, value in given.items() if value is not None}  # noqa: PTH111
    loaded = load_recipe(recipe, overrides or (), **named)
    if show:
        print(loaded.to_yaml(), end="")
        return
    from m2d_embed.finetune.evaluate import describe
    from m2d_embed.finetune.loop import finetune as run
    from m2d_embed.training.processes import is_main_process

    try:
        scores = run(loaded)
    except KeyboardInterrupt as error:  # before the first step, or a second one
        print("interrupted; what is done is kept, try again to go on", file=sys.stderr)
        raise typer.Exit(130) from error
    if not is_main_process():
        return
    if scores is None:
        print(f"stopped and saved in {loaded.folder}; give the same command again to go on")
        return
    print(f"{loaded.folder}: {describe(scores) if scores else 'trained on all clips, not tested'}")


@app.command()
def masks(
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG.")] = Path("masks.png"),
    input_size: Annotated[tuple[int, int], typer.Option(help="Mels and frames of the window.")] = (80, 608),
    patch_size: Annotated[tuple[int, int], typer.Option(help="Mels and frames of a patch.")] = (16, 16),
    mask_ratio: Annotated[float, typer.Option(help="Share of patches masked.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Other examples.")] = 0,
) -> None:
    """Draw a sheet of example masks, a row for each strategy of pre-training."""
    from m2d_embed.config import ModelConfig
    from m2d_embed.pretrain.mask_sheet import draw_sheet

    grid = ModelConfig(input_size=input_size, patch_size=patch_size).grid_size
    draw_sheet(output, grid, mask_ratio, seed)
    print(output)


@corpus_app.command()
def debian(
    out: Annotated[Path, typer.Option("--out", help="Folder of the corpus; what is there already is kept.")],
    packages: Annotated[
        Path | None, typer.Option(help="A file with one package a line; by default the list of m2d-embed.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Packages downloaded and converted at a time.")] = 2,
) -> None:
    """Build a training corpus from the audio in Debian packages. Needs apt-get (not root) and the extra 'pretrain'.

    About 65 hours of music, speech, effects, ambience and instruments, as 16 kHz FLAC files with a manifest that tells
    source package, kind and licence. Give the same command again after an interruption: it goes on where that stopped.
    """
    _require_extra("pretrain", "av")
    from m2d_embed.pretrain.corpus import build_debian, read_package_list

    with tqdm(unit="package", disable=None) as bar:
        names = read_package_list(packages) if packages else None
        summary = build_debian(out, names, workers, _corpus_progress(bar))
    _end_corpus(summary, out)


@corpus_app.command()
def github(
    out: Annotated[Path, typer.Option("--out", help="Folder of the corpus; what is there already is kept.")],
    repositories: Annotated[
        Path | None,
        typer.Option(
            help="A YAML list of repositories: their names, commits, files that state the licences, and sounds by "
            "folder, kind and licence; by default the list of m2d-embed (repositories.yaml of pretrain/corpus)."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Repositories fetched and converted at a time.")] = 2,
) -> None:
    """Build a training corpus from the sounds in public git repositories. Needs git and the extra 'pretrain'.

    Effects and ambience of free licences, at fixed commits: animals, machines, weather, rooms. The folder may be that
    of 'corpus debian', whose manifest then tells of both. Give the same command again after an interruption.
    """
    _require_extra("pretrain", "av")
    from m2d_embed.pretrain.corpus import build_repositories, read_repository_list

    with tqdm(unit="repository", disable=None) as bar:
        wanted = read_repository_list(repositories) if repositories else None
        summary = build_repositories(out, wanted, workers, _corpus_progress(bar))
    _end_corpus(summary, out)


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


def _require_extra(extra: str, *modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UnsupportedError(f"this needs {', '.join(missing)}: pip install 'm2d-embed[{extra}]'")


def _load(
    model: str, device: str | None, dtype: Precision | None, features: FeatureConfig, threads: int | None = None
) -> M2D:
    from m2d_embed.m2d import M2D

    precision = dtype.value if dtype else None
    return M2D.from_pretrained(model, device=device, dtype=precision, features=features, threads=threads)


def _facts(model: M2D) -> dict[str, Any]:
    from m2d_embed.backends import selection, threads

    config = model.config
    (mels, frames), (patch_mels, patch_frames) = config.input_size, config.patch_size
    hop_ms = model.features.hop_frames(config) * config.frame_ms
    facts: dict[str, Any] = {
        "name": config.name,
        "origin": model.origin,
        "source": config.source,
        "licence": config.license,
        "sample rate": f"{config.sample_rate} Hz",
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        "encoder": f"{config.depth} layers x {config.embed_dim} d, {config.num_heads} heads",
        "window": f"{mels} mels x {frames} frames ({frames * config.frame_ms / 1000:.2f} s)",
        "patch": f"{patch_mels} mels x {patch_frames} frames ({config.column_ms:g} ms)",
        "layers read": ", ".join(map(str, resolve_layers(model.features.blocks(config), config.depth))),
        "scene embedding": model.scene_embedding_size,
        "timestamp embedding": f"{model.timestamp_embedding_size}, every {hop_ms:g} ms",
    } | selection.describe(model.encoder)
    facts["threads on this CPU"] = threads.describe()
    if config.head is not None:
        facts["labels"] = f"{len(config.head.labels)} ({', '.join(config.head.labels[:3])} ...)"
    if config.clap is not None:
        facts["text encoder"] = config.clap.text_encoder
    return facts


def _features(
    layers: str | None, concat: bool, flat: bool, scene_pooling: Pooling | None, hop_ms: float | None = None
) -> FeatureConfig:
    return FeatureConfig(
        layers=_parse_layers(layers) if layers is not None else None,
        layer_pooling="concat" if concat else None,
        flat=flat or None,
        hop_ms=hop_ms,
        scene_pooling=scene_pooling.value if scene_pooling else None,
    )


def _parse_layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--layers takes numbers separated by commas, not {text!r}.") from None


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


def _read_index(files: Sequence[Path], model: M2D) -> tuple[list[str], Any]:
    """Paths and embeddings of outputs that were made as this model makes them."""
    from m2d_embed.jobs.outputs import read_scenes
    from m2d_embed.jobs.settings import job_settings

    scenes = read_scenes(files)
    mine = job_settings(model, "scene")
    differing = [key for key in mine if scenes.settings.get(key) != mine[key]]
    if differing:
        shown = ", ".join(f"{key}={scenes.settings.get(key)!r}, not {mine[key]!r}" for key in differing)
        raise ConfigError(
            f"{files[0]}: made with another model or other settings ({shown}); give the --model and --dtype it was "
            "made with, or embed the clips again without options for features."
        )
    root = scenes.settings.get("root", "")
    return [_shown_from_here(name, root) for name in scenes.names], scenes.embeddings


def _shown_from_here(name: str, root: str) -> str:
    """A name in an output as a path from the current folder, or the name itself if it leads there."""
    return name if root in ("", str(Path.cwd())) else os.path.join(root, name)  # noqa: PTH118  (keeps ".." and "./")


def _encode_readable(model: M2D, files: list[Path]) -> tuple[list[str], Any, int]:
    """Names and scene embeddings of the files that can be read, and how many cannot; those are reported."""
    import torch

    from m2d_embed.runtime.batching import encode_scenes

    scenes: dict[int, Any] = {}
    with torch.no_grad(), tqdm(total=len(files), unit="clip", disable=None) as bar:
        clips = list(model.open_clips(files))
        for index, result in encode_scenes(model, clips, model.features, batch_size=32):
            bar.update()
            if isinstance(result, AudioError):
                tqdm.write(f"skipped: {result}", file=sys.stderr)
            else:
                scenes[index] = result
    if not scenes:
        raise AudioError("none of the files to search can be read.")
    good = sorted(scenes)
    return [str(files[i]) for i in good], torch.stack([scenes[i] for i in good]).numpy(), len(files) - len(good)


def _same_file(name: str, file: Path) -> bool:
    return os.path.realpath(name) == os.path.realpath(file)


def _print_tags(file: Path, seconds: float | None, tags: Sequence[Tag], as_json: bool) -> None:
    if as_json:
        line: dict[str, Any] = {"file": str(file)}
        if seconds is not None:
            line["seconds"] = seconds
        line["tags"] = {tag.label: round(tag.score, 6) for tag in tags}
        print(json.dumps(line, ensure_ascii=False))
        return
    print(f"{file}" if seconds is None else f"{file}  {seconds:.3f} s")
    for tag in tags:
        print(f"  {tag.score:.4f}  {tag.label}")


def _for_each(files: Sequence[Path], work: Callable[[Path], None]) -> None:
    """Do each file; report the bad ones, and exit with 1 if there were any."""
    failed = 0
    for file in files:
        try:
            work(file)
        except AudioError as error:
            print(f"skipped: {error}", file=sys.stderr)
            failed += 1
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
