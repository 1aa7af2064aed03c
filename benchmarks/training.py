"""Clips trained on per second: our loop in float32 and bfloat16 against a plain loop, whole steps, data included.

    python -m benchmarks.training              # writes benchmarks/training.json
    python -m benchmarks.render                # puts it into the README

On a machine with a GPU that is measured too, into benchmarks/training-gpu.json. Sounds are made up, in a temporary
folder: noise and tones. The contestants take turns, round after round, so that a busy spell of the machine hits them
alike; each is credited with its median round. A turn begins with steps that do not count, as many as it finds batches
waiting: those that do count have to wait for theirs. The signs of collapse that our loop computes for its log every so
many steps are left out.
"""

import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import torch
import typer
from accelerate.state import AcceleratorState

from benchmarks.reference_style import ReferenceStyleM2D, ReferenceTraining, mel_loader
from benchmarks.timing import machine, product_rates
from m2d_embed.config import ModelConfig
from m2d_embed.model.frontend import LogMel
from m2d_embed.pretrain.datasets import DataConfig
from m2d_embed.pretrain.loop import Pretraining
from m2d_embed.pretrain.masking import MaskingConfig, num_visible
from m2d_embed.pretrain.predictor import PredictorConfig
from m2d_embed.pretrain.recipe import ModelSection, PretrainingSection, Recipe, Size
from m2d_embed.training.settings import Precision
from m2d_embed.training.stop import Stop
from m2d_embed.training.trainer import Trainer

RESULT = Path(__file__).with_suffix(".json")
GPU_RESULT = RESULT.with_stem("training-gpu")
REFERENCE = "reference style, fp32"
EXACT, HALF = "m2d-embed, fp32", "m2d-embed, bf16"
SECONDS = 10
_NEVER = 1_000_000  # steps: more than any of these runs takes
_PRODUCT = 8192  # rows and columns of the matrices that a GPU's peak is measured with


@dataclass(frozen=True)
class Shape:
    """What is trained, in batches of how many clips, and how many steps of it a turn is timed over."""

    name: str
    model: ModelSection
    predictor: PredictorConfig
    batch: int
    steps: int

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(**self.model.given())


@dataclass(frozen=True)
class Sounds:
    """The clips, once as ``audio/*.flac`` and once as ``mels/*.npy``, and a folder for what runs write."""

    folder: Path

    @property
    def mels(self) -> list[Path]:
        return sorted((self.folder / "mels").iterdir())


@dataclass(frozen=True)
class Place:
    """Where it is trained, and by how many processes the data is read."""

    device: torch.device
    workers: int = 1

    @property
    def queued(self) -> int:
        """Batches that the workers read ahead."""
        return 2 * self.workers


@dataclass(frozen=True)
class Turn:
    """Seconds of the steps of one turn, and those of them spent waiting for data."""

    seconds: float
    waited: float


class Training(Protocol):
    """A training that can be taken step by step."""

    def step(self) -> float:
        """Take one step; return the seconds it waited for data."""

    def close(self) -> None:
        """End the data workers."""


class OurTraining:
    """The loop of ``m2d-embed pretrain``, as the command runs it."""

    def __init__(self, recipe: Recipe):
        self.trainer = Trainer(recipe, Pretraining, Stop())
        self.batches = self.trainer.task.batches(0)

    def step(self) -> float:
        return self.trainer.take_step(self.batches)["waited"]

    def close(self) -> None:
        self.batches.close()


# --- what is trained -----------------------------------------------------------------------------------------------


def shape(size: Size, frames: int, predictor: tuple[int, int, int], batch: int, steps: int) -> Shape:
    """A ViT of 16x16 patches; ``predictor`` is its width, depth and heads."""
    model = ModelSection(size=size, input_size=(80, frames), patch_size=(16, 16))
    return Shape(f"ViT-{size.capitalize()}, 80x{frames}", model, PredictorConfig(*predictor), batch, steps)


def make_sounds(folder: Path, count: int) -> Sounds:
    """Ten seconds each of tones in noise."""
    config = ModelConfig(norm_stats=(0.0, 1.0))
    log_mel, rng = LogMel(config), np.random.default_rng(0)
    times = np.arange(SECONDS * config.sample_rate) / config.sample_rate
    for name in ("audio", "mels"):
        (folder / name).mkdir()
    for number in range(count):
        pitches = rng.uniform(100, 4000, size=(3, 1))
        tones = 0.1 * np.sin(2 * np.pi * pitches * times).sum(0)
        audio = (tones + 0.05 * rng.standard_normal(len(times))).astype(np.float32)
        soundfile.write(folder / "audio" / f"{number:05d}.flac", audio, config.sample_rate)
        np.save(folder / "mels" / f"{number:05d}.npy", log_mel(torch.from_numpy(audio)[None])[0, 0].numpy())
    return Sounds(folder)


def our_recipe(trained: Shape, sounds: Sounds, precision: Precision, workers: int, cached: bool = True) -> Recipe:
    """M2D with the published settings; ``cached`` reads log-mels from a cache, else audio from files."""
    name = f"{trained.model.size}-{precision}-{'cache' if cached else 'files'}"
    return Recipe(
        name=name,
        objective="m2d",
        model=trained.model,
        predictor=trained.predictor,
        data=DataConfig(
            source=str(sounds.folder / "audio"),
            norm_stats=trained.config.norm_stats,
            cache=str(sounds.folder / "cache") if cached else None,
            workers=workers,
        ),
        training=PretrainingSection(
            steps=_NEVER,
            batch_size=trained.batch,
            micro_batch=trained.batch,
            precision=precision,
            log_every=_NEVER,
        ),
        output=str(sounds.folder / "runs" / name),
    )


def contestants(trained: Shape, sounds: Sounds, place: Place) -> dict[str, Callable[[], Training]]:
    """What builds each contestant."""

    def reference() -> Training:
        model = ReferenceStyleM2D(trained.config, trained.predictor)
        loader = mel_loader(sounds.mels, trained.config, trained.batch, place.workers)
        return ReferenceTraining(model, loader, place.device)

    def ours(precision: Precision, cached: bool = True) -> Training:
        return OurTraining(our_recipe(trained, sounds, precision, place.workers, cached))

    return {
        REFERENCE: reference,
        EXACT: partial(ours, "fp32"),
        HALF: partial(ours, "bf16"),
        f"{HALF}, from audio files": partial(ours, "bf16", cached=False),
    }


def training_flops(config: ModelConfig, predictor: PredictorConfig, visible: int) -> int:
    """Floating-point operations in the matrix products of one M2D step on one clip, forward and backward.

    A product of the backward pass is one for the gradient of the input, and one for that of the weights: of the log-mel
    there is none, of the target network neither. Nothing computed again to save memory counts.

    Args:
        config: the encoder's.
        predictor: the predictor's.
        visible: patches that the online encoder sees; the target network sees the others.
    """
    patches = math.prod(config.grid_size)
    masked, dim = patches - visible, config.embed_dim
    encoder = partial(_transformer_flops, dim=dim, depth=config.depth, mlp_dim=int(dim * config.mlp_ratio))
    mlp_dim = int(predictor.dim * predictor.mlp_ratio)
    embedding = 2 * patches * math.prod(config.patch_size) * dim
    projections = 2 * (1 + visible + masked) * dim * predictor.dim  # into the predictor, and out of it
    predicting = _transformer_flops(1 + patches, dim=predictor.dim, depth=predictor.depth, mlp_dim=mlp_dim)
    return 2 * embedding + 3 * (encoder(1 + visible) + projections + predicting) + encoder(1 + masked)


def _transformer_flops(tokens: int, dim: int, depth: int, mlp_dim: int) -> int:
    linears = 2 * tokens * dim * (4 * dim + 2 * mlp_dim)
    attention = 4 * tokens**2 * dim
    return depth * (linears + attention)


# --- measuring -----------------------------------------------------------------------------------------------------


def compare(trained: Shape, sounds: Sounds, place: Place, rounds: int) -> dict[str, Any]:
    """One model shape: all contestants on the same clips."""
    torch.manual_seed(0)
    trainings: dict[str, Training] = {}
    memory: dict[str, int] = {}
    try:
        for name, build in contestants(trained, sounds, place).items():
            trainings[name], memory[name] = _enter(build, place.device)
        turns = measure(trainings, trained.steps, rounds, place)
    finally:
        for training in trainings.values():
            training.close()
    rows = [_row(trained, name, turns, memory[name]) for name in trainings]
    speeds = {row["loop"]: row["clips per second"] for row in rows}
    return {
        "batch": trained.batch,
        "steps a turn": trained.steps,
        "bf16 to fp32": round(speeds[HALF] / speeds[EXACT], 2),
        "loops": rows,
    }


def measure(trainings: dict[str, Training], steps: int, rounds: int, place: Place) -> dict[str, list[Turn]]:
    """Every turn of every contestant, ``steps`` steps each after those that do not count."""
    turns: dict[str, list[Turn]] = {name: [] for name in trainings}
    for _ in range(rounds):
        for name, training in trainings.items():
            for _ in range(place.queued):
                training.step()
            _synchronize(place.device)
            started = time.perf_counter()
            waited = sum(training.step() for _ in range(steps))
            _synchronize(place.device)
            turns[name].append(Turn(time.perf_counter() - started, waited))
    return turns


def _enter(build: Callable[[], Training], device: torch.device) -> tuple[Training, int]:
    """A contestant, and the most bytes of GPU memory it has during a step; 0 without a GPU."""
    if device.type != "cuda":
        return build(), 0
    gc.collect()  # what is left of the shape before would be counted, or freed meanwhile
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    training = build()
    for _ in range(2):  # the optimiser's state is there from the second on
        training.step()
    return training, torch.cuda.max_memory_allocated() - before


def _row(trained: Shape, name: str, turns: dict[str, list[Turn]], memory: int) -> dict[str, Any]:
    seconds = {other: statistics.median(turn.seconds for turn in turns[other]) for other in (name, REFERENCE)}
    clips = trained.batch * trained.steps / seconds[name]
    visible = num_visible(math.prod(trained.config.grid_size), MaskingConfig().mask_ratio)
    flops = training_flops(trained.config, trained.predictor, visible)
    row = {
        "loop": name,
        "clips per second": round(clips, 2),
        "ratio": round(seconds[REFERENCE] / seconds[name], 2),
        "data share": round(sum(t.waited for t in turns[name]) / sum(t.seconds for t in turns[name]), 4),
        "model GFLOP/s": round(clips * flops / 1e9, 1),
        "rounds": [round(turn.seconds, 4) for turn in turns[name]],
    }
    return row | ({"peak memory, GiB": round(memory / 2**30, 2)} if memory else {})


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def training_on(device: str) -> Iterator[torch.device]:
    """Have our loop, which takes a GPU where there is one, train on ``device``, "cpu" or "cuda"."""
    before = os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = str(device == "cpu").lower()
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield torch.device(device)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        del os.environ["ACCELERATE_USE_CPU"]
        if before is not None:
            os.environ["ACCELERATE_USE_CPU"] = before


def measure_cpu(shapes: list[Shape], sounds: Sounds, rounds: int) -> dict[str, Any]:
    """Every shape on the CPU, with one data worker."""
    with training_on("cpu") as device:
        models = {s.name: compare(s, sounds, Place(device), rounds) for s in shapes}
    return {"matrix products, GFLOP/s": product_rates(ModelConfig(), rounds), "models": models}


def measure_gpu(shapes: list[Shape], sounds: Sounds, rounds: int, workers: int) -> dict[str, Any]:
    """Every shape on a GPU, and what share of its rate of bf16 products the models' own operations reach."""
    with training_on("cuda") as device:
        peak = peak_flops(device)
        models = {s.name: compare(s, sounds, Place(device, workers), rounds) for s in shapes}
    for result in models.values():
        for row in result["loops"]:
            row["utilisation"] = round(row["model GFLOP/s"] * 1e9 / peak, 4)
    return {
        "gpu": torch.cuda.get_device_name(),
        "data workers": workers,
        "bf16 products, TFLOP/s": round(peak / 1e12, 1),
        "models": models,
    }


def peak_flops(device: torch.device, size: int = _PRODUCT) -> float:
    """Floating-point operations a second in the fastest of some runs of bfloat16 products of square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best, products = math.inf, 20
    for _ in range(6):
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(products):
            a @ b
        _synchronize(device)
        best = min(best, (time.perf_counter() - started) / products)
    return 2 * size**3 / best


def main(
    rounds: int = 3,
    files: int = 64,
    tiny_batch: int = 64,
    base_batch: int = 8,
    gpu_batch: int = 256,
    threads: int = 0,
    cpu: bool = True,
    out: Path = RESULT.parent,
) -> None:
    """Measure, print, and write the JSON."""
    if threads:
        torch.set_num_threads(threads)
    settings = f"--rounds {rounds} --files {files}"
    about = {"machine": machine(), "data": f"{files} clips of {SECONDS} s"}
    with tempfile.TemporaryDirectory() as folder:
        sounds = make_sounds(Path(folder), files)
        if cpu:
            shapes = [
                shape("tiny", 304, (192, 4, 6), tiny_batch, steps=2),
                shape("base", 608, (512, 8, 16), base_batch, steps=1),
            ]
            command = f"python -m benchmarks.training {settings} --tiny-batch {tiny_batch} --base-batch {base_batch}"
            _write({"command": command, **about, **measure_cpu(shapes, sounds, rounds)}, out / RESULT.name)
        if torch.cuda.is_available():
            shapes = [
                shape("tiny", 304, (192, 4, 6), gpu_batch, steps=20),
                shape("small", 304, (256, 4, 8), gpu_batch, steps=20),
                shape("base", 608, (512, 8, 16), gpu_batch, steps=10),
            ]
            command = f"python -m benchmarks.training {settings} --gpu-batch {gpu_batch} --no-cpu"
            workers = min(8, os.cpu_count() or 1)
            _write({"command": command, **about, **measure_gpu(shapes, sounds, rounds, workers)}, out / GPU_RESULT.name)


def _write(result: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(result, indent=1) + "\n")
    for model, measured in result["models"].items():
        print(f"{model}, batch {measured['batch']}")
        for row in measured["loops"]:
            print(
                f"  {row['loop']:<36}{row['clips per second']:>9.1f} clips/s  x{row['ratio']:.2f}"
                f"  {row['data share']:.1%} waiting for data"
            )


if __name__ == "__main__":
    typer.run(main)
