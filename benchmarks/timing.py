"""What the benchmarks share: the machine they ran on, turns taken, and the machine's own rate of matrix products."""

import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import m2d_embed
from m2d_embed.backends import native
from m2d_embed.backends.packed import packed_layer
from m2d_embed.backends.selection import capabilities
from m2d_embed.config import ModelConfig

_BATCH = 8  # windows whose tokens make the rows of a product
_SECONDS = 10.0  # of rounds of products, at least


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu, family, flags = platform.processor() or platform.machine(), None, ""
    if Path("/proc/cpuinfo").exists():
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        fields = {key.strip(): value.strip() for key, _, value in lines}
        cpu, family, flags = fields.get("model name", cpu), fields.get("cpu family"), fields.get("flags", "")
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags.split()]
    facts = {
        "cpu": cpu,
        "family": family,
        "matrix units": units[:1],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": list(native.available()),
        "torch": torch.__version__.split("+")[0],
        "m2d_embed": m2d_embed.__version__,
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def measure(contestants: dict[str, Callable[[], Any]], rounds: int, seconds: float = 0) -> dict[str, list[float]]:
    """Seconds of every round of every contestant, after one round that does not count.

    The contestants take turns, so that a busy spell of the machine hits them alike. There are at least so many rounds,
    and more until so many seconds have passed.
    """
    for run in contestants.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    while len(next(iter(taken.values()))) < rounds or time.perf_counter() - began < seconds:
        for name, run in contestants.items():
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            taken[name].append(time.perf_counter() - started)
    return taken


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_rates(config: ModelConfig, rounds: int, device: str = "cpu") -> dict[str, float]:
    """GFLOP/s of the matrix products of one block, for the tokens of 8 windows, by PyTorch and oneDNN.

    float32 is measured as PyTorch does it; on a CPU packed weights are measured, too, and bfloat16 and int8 are packed.
    """
    dim, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    grid_rows, grid_columns = config.grid_size
    tokens = _BATCH * (1 + grid_rows * grid_columns)
    shapes = [(dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim)]
    operations = sum(2 * tokens * inputs * outputs for inputs, outputs in shapes)
    contestants: dict[str, Callable[[], Any]] = {}
    for name, make in _products(device).items():
        calls = [make(inputs, outputs, tokens) for inputs, outputs in shapes]
        contestants[name] = partial(_call_all, calls)
    with torch.no_grad():
        seconds = measure(contestants, rounds, _SECONDS)
    return {name: round(operations / min(times) / 1e9, 1) for name, times in seconds.items()}


def unit_rates() -> dict[str, float]:
    """GFLOP/s of the CPU's units from registers alone, by kind of product; empty without kernels or a compiler."""
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None or not native.available():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "unit_rates"
        flags = "-O3 -std=gnu11 -mavx2 -mfma -lpthread"
        if any(unit != "avx2" for unit in native.available().values()):
            flags += " -mavx512f -mavx512vl -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16 -mamx-int8"
        source = Path(__file__).with_name("unit_rates.c")
        subprocess.run([compiler, str(source), "-o", str(program), *flags.split()], check=True)
        units = [f"{kind}:{unit}" for kind, unit in native.available().items()]
        command = [str(program), str(torch.get_num_threads()), *units]
        lines = subprocess.check_output(command, text=True).splitlines()
    return {kind: float(rate) for kind, rate in map(str.split, lines)}


def _products(device: str) -> dict[str, Callable[[int, int, int], Callable[[], Tensor]]]:
    def plain(dtype: torch.dtype) -> Callable[[int, int, int], Callable[[], Tensor]]:
        def make(inputs: int, outputs: int, rows: int) -> Callable[[], Tensor]:
            layer = nn.Linear(inputs, outputs).to(device, dtype)
            return partial(layer, torch.randn(rows, inputs, device=device, dtype=dtype))

        return make

    def packed(dtype: torch.dtype) -> Callable[[int, int, int], Callable[[], Tensor]]:
        def make(inputs: int, outputs: int, rows: int) -> Callable[[], Tensor]:
            layer = nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)
            return partial(packed_layer(layer, dtype, "none"), torch.randn(rows, inputs, dtype=dtype))

        return make

    if device != "cpu":
        return {"float32": plain(torch.float32), "bfloat16": plain(torch.bfloat16)}
    made = {"float32": plain(torch.float32)}
    made |= {"float32, packed": packed(torch.float32)} if "fp32" in capabilities().onednn else {}
    made |= {"bfloat16": packed(torch.bfloat16)} if "bf16" in capabilities().onednn else {}
    return made | ({"int8": _int8_product} if "int8" in capabilities().onednn else {})


def _int8_product(inputs: int, outputs: int, rows: int) -> Callable[[], Tensor]:
    """The product alone, of what is rounded already."""
    weight = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), None)
    levels = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
    scales, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
    return partial(
        torch.ops.onednn.qlinear_pointwise,
        *(levels, 1.0, 128, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""),
    )


def _call_all(calls: list[Callable[[], Tensor]]) -> None:
    for call in calls:
        call()
