"""Commands about single clips: ``tag``, ``zero-shot``, ``similar``, ``plot``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm.auto import tqdm

from m2d_embed.audio.clips import load_audio
from m2d_embed.config import FeatureConfig
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.labelled.inputs import find_inputs

if TYPE_CHECKING:
    from m2d_embed.m2d import M2D
    from m2d_embed.model.heads.tagging import Tag


from m2d_embed.cli.app import app
from m2d_embed.cli.options import (
    Device,
    Dtype,
    Inputs,
    Json,
    Listing,
    Model,
    Threads,
    TopK,
    load_model,
)

_A_TAGGER = "m2d_as_vit_base-80x1001p16x16-240213_AS-FT_enconly"


_A_CLAP = "m2d_clap_vit_base-80x608p16x16-240128"


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
    loaded = load_model(model, device, dtype, FeatureConfig(), threads)
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
    loaded = load_model(model, device, dtype, FeatureConfig(), threads)
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

    loaded = load_model(model, device, dtype, FeatureConfig(), threads)
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
    from m2d_embed.cli.plots import plot_clip

    output = output or Path(f"{file.name}.png")
    plot_clip(load_model(model, device, dtype, FeatureConfig(hop_ms=hop_ms), threads), file, output)
    print(output)


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
