"""Seconds of audio embedded per second: ours in float32 and bfloat16 against the reference-style runtime, in one run.

    python -m benchmarks.throughput            # writes benchmarks/throughput.json
    python -m benchmarks.render                # puts it into the README

The contestants take turns, round after round, so that a busy spell of the machine hits them alike; each is credited
with its median round.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

import m2d_embed
from benchmarks.reference_style import ReferenceStyle
from m2d_embed.config import ModelConfig
from m2d_embed.model import M2D

RESULT = Path(__file__).with_suffix(".json")
SECONDS = 10


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    flags = ""
    if Path("/proc/cpuinfo").exists():
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        fields = {key.strip(): value.strip() for key, _, value in lines}
        cpu, flags = fields.get("model name", cpu), fields.get("flags", "")
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags.split()]
    return {
        "cpu": cpu,
        "matrix units": units[:1],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        "m2d_embed": m2d_embed.__version__,
    }


def measure(contestants: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every contestant, after one round that does not count."""
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(config: ModelConfig, batch: int, rounds: int) -> list[dict[str, Any]]:
    """One model shape: the peer and ours on the same clips."""
    torch.manual_seed(0)
    audio = 0.1 * torch.randn(batch, SECONDS * config.sample_rate)
    reference = ReferenceStyle(config).eval()
    exact, half = M2D(config).eval(), M2D(config).eval().set_dtype(torch.bfloat16)
    contestants: dict[str, Callable[[], Tensor]] = {
        "reference style, fp32": lambda: reference(audio),
        "m2d-embed, fp32": lambda: exact.scene(audio),
        "m2d-embed, bf16": lambda: half.scene(audio),
    }
    with torch.no_grad():
        seconds = measure(contestants, rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    slowest = medians["reference style, fp32"]
    return [
        {
            "runtime": name,
            "seconds of audio per second": round(batch * SECONDS / median, 1),
            "ratio": round(slowest / median, 2),
            "rounds": [round(t, 4) for t in seconds[name]],
        }
        for name, median in medians.items()
    ]


def matrix_products(config: ModelConfig, rounds: int) -> dict[str, float]:
    """GFLOP/s of a product of the model's shape, (tokens of 8 windows, d) x (d, 4 d): what no runtime can exceed."""
    rows, columns = config.grid_size
    m, k, n = 8 * (1 + rows * columns), config.embed_dim, 4 * config.embed_dim
    contestants: dict[str, Callable[[], Tensor]] = {}
    for name, layer, dtype in (
        ("float32", nn.Linear(k, n), torch.float32),
        
        ("bfloat16", nn.Linear(k, n), torch.bfloat16),
    ):
        contestants[name] = partial(layer.to(dtype), torch.randn(m, k, dtype=dtype))
    with torch.no_grad():
        seconds = measure(contestants, 5 * rounds)
    return {name: round(2 * m * k * n / statistics.median(times) / 1e9, 1) for name, times in seconds.items()}


def main(batch: int = 8, rounds: int = 9, threads: int = 0) -> None:
    """Measure, print, and write the JSON."""
    if threads:
        torch.set_num_threads(threads)
    base = ModelConfig()
    bundled = m2d_embed.load_model(device="cpu").config
    models = {
        "ViT-Base, 80x608, 16x16 patches": compare(base, batch, rounds),
        f"bundled ViT-Tiny, 80x{bundled.input_size[1]}, 16x16 patches": compare(bundled, batch, rounds),
    }
    result = {
        "command": f"python -m benchmarks.throughput --batch {batch} --rounds {rounds}",
        "machine": machine(),
        "clips": f"batches of {batch} clips of {SECONDS} s",
        "matrix products, GFLOP/s": matrix_products(base, rounds),
        "models": models,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for model, rows in models.items():
        print(model)
        for row in rows:
            print(f"  {row['runtime']:<24}{row['seconds of audio per second']:>9.1f} s/s  x{row['ratio']:.2f}")


if __name__ == "__main__":
    typer.run(main)
