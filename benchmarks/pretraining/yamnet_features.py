"""Offline targets for M2D-S: embeddings of a corpus by YAMNet (Google, Apache-2.0), a tagger trained on AudioSet.

    pip install ai-edge-litert
    python -m benchmarks.pretraining.yamnet_features corpus/manifest.csv yamnet.tflite features
    m2d-embed pretrain ... objective=m2d_s data.source=features/manifest.csv data.feature_hop_ms=480

Writes a ``.npy`` (frames, 1024) float16 a clip, a frame every ``--hop`` milliseconds, and a manifest with the column
``features``. Files that are there already are kept, so a run that was stopped goes on. ``--layer 12 --layer 13`` append
the mean activations of those layers: linear probes read more from them than from the embedding, which is after them.
"""

import json
import os
import warnings
from collections.abc import Iterator
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from tqdm.auto import tqdm

from benchmarks.pretraining.targets import Job, save, todo, write_manifest
from m2d_embed.audio.clips import load_audio

_RATE = 16_000
_WINDOW = 15_600  # samples that YAMNet hears at a time
_EMBEDDING = "global_average_pooling2d/Mean"
_ACTIVATION = "/layer{}/pointwise_conv/relu/Relu"
_LAYERS = range(2, 15)  # of depthwise and pointwise convolutions; the embedding is the mean over the last one

Floats = npt.NDArray[np.float32]


@cache
def interpreter(model: Path, layers: tuple[int, ...]) -> tuple[Any, int, list[int]]:
    """YAMNet in one thread, and the places of its input, of its embedding and of the activations of some layers."""
    from ai_edge_litert.interpreter import Interpreter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all tensors are kept takes memory: a few MB here
        yamnet = Interpreter(model_path=str(model), num_threads=1, experimental_preserve_all_tensors=True)
    yamnet.allocate_tensors()
    names = {tensor["name"]: tensor["index"] for tensor in yamnet.get_tensor_details()}
    wanted = []
    for name in (_EMBEDDING, *map(_ACTIVATION.format, layers)):
        places = [place for fused, place in names.items() if fused.split(";")[0].endswith(name)]
        if len(places) != 1:
            raise SystemExit(f"{model}: has {len(places)} tensors whose name ends in {name}; is it YAMNet?")
        wanted += places
    return yamnet, yamnet.get_input_details()[0]["index"], wanted


def windows(audio: Floats, hop: float) -> Iterator[Floats]:
    """Windows around the times ``(j + 0.5) * hop`` (samples), with zeros before and after the clip; at least one."""
    count = max(1, round(len(audio) / hop))
    padded = np.pad(audio, (_WINDOW, 2 * _WINDOW))
    for j in range(count):
        start = round((j + 0.5) * hop - _WINDOW / 2) + _WINDOW
        yield padded[start : start + _WINDOW]


def embed(audio: Floats, model: Path, hop: float, layers: tuple[int, ...] = ()) -> npt.NDArray[np.float16]:
    """(frames, 1024 and as many as the layers have channels) of a clip."""
    yamnet, given, wanted = interpreter(model, layers)
    rows = []
    for window in windows(audio, hop):
        yamnet.set_tensor(given, window[None])
        yamnet.invoke()
        tensors = [yamnet.get_tensor(place) for place in wanted]
        means = [tensor.reshape(-1, tensor.shape[-1]).mean(axis=0) for tensor in tensors]  # over time and frequency
        rows.append(np.concatenate(means).astype(np.float16))
    return np.stack(rows)


def claim(output: Path, hop: float, layers: tuple[int, ...]) -> None:
    """Say in a folder what its features are. SystemExit if those that it has are others, which would be kept."""
    file = output / "yamnet.json"
    asked = {"hop": hop, "layers": list(layers)}
    if file.is_file():
        there = json.loads(file.read_text())
        if there != asked:
            raise SystemExit(f"{output}: has features of {there}, not of {asked}; choose another folder.")
    elif layers and (output / "manifest.csv").is_file():
        raise SystemExit(f"{output}: has features of the embedding alone; choose another folder.")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asked) + "\n")


def _write(job: tuple[Job, Path, float, tuple[int, ...]]) -> None:
    clip, model, hop, layers = job
    save(clip.target, embed(load_audio(clip.source, _RATE), model, hop, layers))


def main(
    manifest: Path,
    model: Path,
    output: Path,
    hop: Annotated[float, typer.Option(help="Milliseconds between frames.")] = 480.0,
    layer: Annotated[list[int] | None, typer.Option(help="Append its activations; 2 to 14, repeatable.")] = None,
    processes: int = os.cpu_count() or 1,
) -> None:
    """Embed every file of a manifest."""
    layers = tuple(layer or ())
    if any(number not in _LAYERS for number in layers):
        raise SystemExit(f"--layer: YAMNet's are {_LAYERS.start} to {_LAYERS.stop - 1}.")
    claim(output, hop, layers)
    jobs = [(job, model, hop * _RATE / 1000, layers) for job in todo(manifest, output)]
    with get_context("spawn").Pool(processes) as pool:
        for _ in tqdm(pool.imap_unordered(_write, jobs, chunksize=8), total=len(jobs), unit="clip"):
            pass
    write_manifest(manifest, output)


if __name__ == "__main__":
    typer.run(main)
