"""Options that several commands share."""

from __future__ import annotations

import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2d_embed.config import FeatureConfig
from m2d_embed.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from m2d_embed.m2d import M2D


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


Concat = Annotated[
    bool | None, typer.Option("--concat/--no-concat", help="Concatenate several layers; else they are averaged.")
]


Flat = Annotated[
    bool | None, typer.Option("--flat/--no-flat", help="Average the patches of a column; else they are stacked.")
]


Scenes = Annotated[
    Pooling | None,
    typer.Option(help="Scenes: the mean over time, or also the standard deviation.", show_default="the model's own"),
]


TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many to show.")]


Json = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of text.")]


def features_of(
    layers: str | None,
    concat: bool | None,
    flat: bool | None,
    scene_pooling: Pooling | None,
    hop_ms: float | None = None,
) -> FeatureConfig:
    """The features that these options ask for; None everywhere is the model's own choice."""
    return FeatureConfig(
        layers=_parse_layers(layers) if layers is not None else None,
        layer_pooling=None if concat is None else ("concat" if concat else "mean"),
        flat=flat,
        hop_ms=hop_ms,
        scene_pooling=scene_pooling.value if scene_pooling else None,
    )


def _parse_layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--layers takes numbers separated by commas, not {text!r}.") from None


def load_model(
    model: str, device: str | None, dtype: Precision | None, features: FeatureConfig, threads: int | None = None
) -> M2D:
    """The model that is named; a mistake in a name ends the command with an error."""
    from m2d_embed.m2d import M2D

    precision = dtype.value if dtype else None
    return M2D.from_pretrained(model, device=device, dtype=precision, features=features, threads=threads)


def require_extra(extra: str, *modules: str) -> None:
    """End the command with the extra to install, UnsupportedError, unless its modules are there."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UnsupportedError(f"this needs {', '.join(missing)}: pip install 'm2d-embed[{extra}]'")
