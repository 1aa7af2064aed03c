"""Commands about models: ``info``, ``models``, ``convert``, ``export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2d_embed.checkpoints import registry
from m2d_embed.config import FeatureConfig, resolve_layers
from m2d_embed.errors import ConfigError, ModelNotFoundError

if TYPE_CHECKING:
    from m2d_embed.m2d import M2D


from m2d_embed.cli.app import app
from m2d_embed.cli.options import (
    Concat,
    ExportKind,
    Flat,
    HalfPrecision,
    Json,
    Layers,
    Model,
    Precision,
    Scenes,
    features_of,
    load_model,
    require_extra,
)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Which model; the bundled one by default.")] = "", as_json: Json = False
) -> None:
    """Show a model's shape, rate, embedding sizes, source and licence."""
    facts = _facts(load_model(model, "cpu", None, FeatureConfig()))
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
def convert(
    source: Annotated[Path, typer.Argument(help="A .pth, its folder, a release's .zip, or a converted folder.")],
    destination: Annotated[Path, typer.Argument(help="A new folder for config.json, model.safetensors and README.md.")],
    dtype: Annotated[
        list[HalfPrecision] | None, typer.Option(help="Also write a half-precision file; repeatable.")
    ] = None,
) -> None:
    """Convert a checkpoint of any layout to config.json + safetensors."""
    from m2d_embed.backends.devices import parse_dtype
    from m2d_embed.checkpoints import layouts

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
    concat: Concat = None,
    flat: Flat = None,
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
    features = features_of(layers, concat, flat, scene_pooling, hop_ms)
    if kind is ExportKind.tags and features != FeatureConfig():
        raise ConfigError("--kind tags takes the features the classifier was trained on; leave out options for them.")
    if hop_ms is not None and kind is not ExportKind.timestamps:
        raise ConfigError("--hop-ms is for --kind timestamps.")
    if opset is not None and onnx is None:
        raise ConfigError("--opset is for --onnx.")
    if onnx is not None:
        require_extra("onnx", "onnx", "onnxruntime", "onnxscript")
        check_target(onnx, ".onnx", overwrite)
    if pt2 is not None:
        check_target(pt2, ".pt2", overwrite)
    loaded = load_model(model, "cpu", Precision.fp32, features)
    if onnx is not None:
        print(describe(export_onnx(loaded, onnx, kind.value, opset, overwrite)))
    if pt2 is not None:
        print(describe(export_program(loaded, pt2, kind.value, overwrite)))


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
