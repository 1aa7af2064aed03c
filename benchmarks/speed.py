"""Speed, memory and agreement of this package's modes and of other runtimes of the same model, in one run.

    python -m benchmarks.speed                 # writes speed-avx512_bf16-family26.json, say, and docs/images/*.png
    python -m benchmarks.speed --model base    # one of the two models, beside what is known of the other
    python -m benchmarks.speed --more          # further rounds, beside those that the JSON has of the same machine
    python -m benchmarks.speed --more --model base --cell 10x8   # of one length in seconds and batch size
    python -m benchmarks.speed --more --once   # no rounds, but what is measured once: start, memory, agreement
    python -m benchmarks.speed --device cuda   # speed-cuda.json and its picture
    python -m benchmarks.render                # puts them into the README

There is a JSON for each kind of processor, named after its best unit for matrix products and its family: 6 are Intel's
Xeons, 25 is AMD's Zen 4, 26 is Zen 5.

Runtimes are in ``benchmarks/runtimes.py``; they take turns, and each is credited with its best round, as whatever else
the machine does can only make one slower. Beside the speed stands the share that the model's operations reach of what
the processor's units do by themselves (``unit_rates.c``), and the rate of matrix products of the model's shapes by
PyTorch and oneDNN, each measured in the same run. Start and memory are measured in a process for each
runtime. Each model's results are written when it is done.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import soundfile
import soxr
import torch
import typer

from benchmarks.runtimes import REFERENCE, UNITS, build, exported, load, runtimes
from benchmarks.timing import machine, measure, product_rates, unit_rates
from m2d_embed.audio.clips import find_audio, open_clip
from m2d_embed.backends.devices import DTYPES
from m2d_embed.backends.selection import supports_int8
from m2d_embed.config import ModelConfig
from m2d_embed.model.windows import cut
from m2d_embed.runtime.profiling import peak_memory

HERE = Path(__file__).parent
PICTURES = HERE.parent / "docs" / "images"
MODELS = {"base": "ViT-Base, 80x608, 16x16 patches", "bundled": "bundled ViT-Tiny, 80x304, 16x16 patches"}
LENGTHS = (1, 10, 60)  # seconds
BATCHES = (1, 8, 64, 256)
MAX_SECONDS = {"base": 256, "bundled": 2560}  # of audio in a call on a CPU, for the sake of a run's length
_CLIPS = HERE.parent / "tests" / "data"
_MIB = 1 << 20
_AST_CLIP = 10
_RATE = 16_000  # of both models
_FORGET = Path("/proc/self/clear_refs")  # Linux: 5 sets the peak of memory to what there is now
# Of rounds of a cell, at least: on a machine that others use, a few short rounds may all be slowed down.
_SECONDS = 40.0


def kind_of_cpu() -> str:
    """What of this CPU is best at matrix products, and its family, if it states one."""
    facts = machine()
    unit = next(iter(facts["matrix units"]), "cpu")
    return f"{unit}-family{facts['family']}" if facts["family"] else unit


def cells(name: str, device: str) -> list[tuple[int, int]]:
    """Lengths and batch sizes to measure."""
    return [(s, b) for s in LENGTHS for b in BATCHES if device != "cpu" or s * b <= MAX_SECONDS[name]]


def operations(config: ModelConfig, seconds: float) -> float:
    """Floating-point operations of one clip, multiplications and additions: patches, blocks and attention."""
    dim, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    patch = config.patch_size[0] * config.patch_size[1]
    total = 0.0
    for window in cut(1 + int(seconds * config.sample_rate) // config.hop_length, config):
        columns = min(-(-(window.stop - window.start) // config.patch_size[1]), config.grid_size[1])
        patches = config.grid_size[0] * columns
        tokens = 1 + patches
        matrices = 4 * dim * dim + 2 * dim * hidden
        total += 2 * patches * patch * dim + config.depth * (2 * tokens * matrices + 4 * tokens * tokens * dim)
    return total


def compare(
    name: str, rounds: int, device: str, folder: Path, chosen: list[str], before: dict[str, Any]
) -> dict[str, Any]:
    """All runtimes of one model on clips of all lengths and batch sizes.

    ``before`` is what this returned of earlier rounds, or empty; of the cells that are not ``chosen`` it is kept.
    """
    config = load(name).config
    rates = _best(product_rates(config, 3 * rounds, device), before.get("matrix products, GFLOP/s", {}))
    units = _best(unit_rates() if device == "cpu" else {}, before.get("units alone, GFLOP/s", {}))
    runs = {runtime: build(runtime, name, device, folder) for runtime in runtimes(name, device)}
    measured = []
    for seconds, batch in cells(name, device):
        earlier = next((c for c in before.get("cells", []) if (c["clip"], c["batch"]) == (seconds, batch)), None)
        if chosen and f"{seconds}x{batch}" not in chosen:
            measured += [earlier] if earlier else []
            continue
        torch.manual_seed(0)
        audio = (0.1 * torch.randn(batch, seconds * config.sample_rate)).to(device)
        with torch.no_grad():
            turns: dict[str, Callable[[], Any]] = {
                r: partial(run, audio) for r, run in runs.items() if hears(r, seconds)
            }
            times = measure(turns, rounds, _SECONDS)
        best = {runtime: min(found) for runtime, found in times.items()}
        for row in earlier["runtimes"] if earlier else []:
            best[row["runtime"]] = min(best[row["runtime"]], row["seconds"])
        rows = [
            {
                "runtime": runtime,
                "seconds": round(taken, 5),
                "seconds of audio per second": round(batch * seconds / taken, 1),
                "ratio": round(best[REFERENCE] / taken, 2),
                "share of units": _share(runtime, batch * operations(config, seconds) / taken / 1e9, units),
            }
            for runtime, taken in best.items()
        ]
        measured.append({"clip": seconds, "batch": batch, "runtimes": rows})
        print(f"{MODELS[name]}: {batch} clips of {seconds} s")
        for row in rows:
            print(
                f"  {row['runtime']:<28}{row['seconds of audio per second']:>9.1f} s/s  x{row['ratio']:.2f}", flush=True
            )
    return {"matrix products, GFLOP/s": rates, "units alone, GFLOP/s": units, "cells": measured}


def _least(times: dict[str, float], earlier: dict[str, float]) -> dict[str, float]:
    return {name: min(taken, earlier.get(name, taken)) for name, taken in times.items()}


def _best(rates: dict[str, float], earlier: dict[str, float]) -> dict[str, float]:
    return {name: max(rate, earlier.get(name, 0.0)) for name, rate in rates.items()}


def hears(runtime: str, seconds: int) -> bool:
    """Whether clips of this length are a fair thing to ask: AST pads every clip to 10 s."""
    return seconds == _AST_CLIP or not runtime.startswith("transformers")


def _share(runtime: str, rate: float, units: dict[str, float]) -> float | None:
    """Of what the units do from registers in a runtime's precision; None if unknown, or for another model."""
    limit = units.get(UNITS[runtime.split(", ")[1]])
    return None if runtime.startswith("transformers") or limit is None else round(rate / limit, 3)


def starts(name: str, device: str, folder: Path) -> dict[str, dict[str, float]]:
    """Of each runtime, in a process of its own: the seconds to a first result, and memory beyond the loaded model."""
    if any(runtime.startswith(("ONNX Runtime", "OpenVINO")) for runtime in runtimes(name, device)):
        exported(name, folder)  # which is not part of starting
    return {runtime: _child("start", runtime, name, device, str(folder)) for runtime in runtimes(name, device)}


def agreement(name: str, device: str) -> dict[str, float]:
    """Least cosine similarity of scene embeddings with those of float32 on the CPU, real clips."""
    files = find_audio([_CLIPS])
    exact = torch.from_numpy(load(name).encode(files))
    modes = ["bf16", *(["int8"] if device == "cpu" and supports_int8() else [])]
    found: dict[str, float] = {"clips": len(files)}
    for mode in modes:
        other = load(name).to(device).set_dtype(DTYPES[mode]).encode(files)
        found[mode] = round(float(torch.cosine_similarity(exact.double(), torch.from_numpy(other).double()).min()), 7)
    return found


def hour(name: str, dtype: str, device: str) -> dict[str, float]:
    """Seconds, and MiB beyond the loaded model, to embed a file of an hour."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hour.flac"
        noise = np.random.default_rng(0)
        with soundfile.SoundFile(file, "w", _RATE, 1) as sound:
            for _ in range(3600):
                sound.write(0.1 * noise.standard_normal(_RATE).astype(np.float32))
        return _child("hour", str(file), name, device, dtype)


def decoding(rounds: int) -> dict[str, float]:
    """Milliseconds of one core to decode, downmix and resample a clip of 10 s, by format."""
    formats = {"WAV 16 kHz mono": ("wav", 16_000, 1), "FLAC 44.1 kHz stereo": ("flac", 44_100, 2)}
    formats |= {"Opus 48 kHz stereo": ("opus", 48_000, 2), "MP3 44.1 kHz stereo": ("mp3", 44_100, 2)}
    source, rate = soundfile.read(find_audio([_CLIPS / "sounds"])[0], dtype="float32", always_2d=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (suffix, new_rate, channels) in formats.items():
            mono = soxr.resample(source.mean(axis=1), rate, new_rate)
            clip = np.resize(mono, 10 * new_rate)[:, None].repeat(channels, axis=1)
            file = Path(folder) / f"clip.{suffix}"
            container = {"opus": {"format": "OGG", "subtype": "OPUS"}}.get(suffix, {})
            soundfile.write(file, clip, new_rate, **container)
            times = measure({name: partial(_decode, file)}, 4 * rounds)[name]
            found[name] = round(1000 * min(times), 2)
    return found


def _decode(file: Path) -> int:
    return sum(len(block) for block in open_clip(file, None, _RATE, str(file)).blocks(_RATE))


def _child(task: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.speed", "--task", task, *(f"--argument={word}" for word in arguments)]
    output = subprocess.check_output([*command, f"--threads={torch.get_num_threads()}"], text=True)
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def _start_task(runtime: str, name: str, device: str, folder: str) -> dict[str, float]:
    began = time.perf_counter()
    run = build(runtime, name, device, Path(folder))
    loaded = _memory(device)
    with torch.no_grad():
        run(0.1 * torch.randn(1, 10 * _RATE, device=device))
        first = time.perf_counter() - began
        run(0.1 * torch.randn(8, 10 * _RATE, device=device))
    return {
        "load and first result, s": round(first, 3),
        "8 clips of 10 s, MiB": round((_peak_memory(device) - loaded) / _MIB, 1),
    }


def _hour_task(file: str, name: str, device: str, dtype: str) -> dict[str, float]:
    model = load(name).to(device).set_dtype(DTYPES[dtype])
    loaded, began = _memory(device), time.perf_counter()
    model.encode(file)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "MiB": round((_peak_memory(device) - loaded) / _MIB, 1),
    }


def _peak_memory(device: str) -> int:
    """The most bytes so far, of the GPU's allocator or of the process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    peak = peak_memory()
    if peak is None:
        raise SystemExit("this system does not tell how much memory a process has used")
    return peak


def _memory(device: str) -> int:
    """Bytes now; the peak is forgotten: what loading needed for a while must not stand for what comes after."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if _FORGET.exists():
        _FORGET.write_text("5")
    resident: int = psutil.Process().memory_info().rss
    return resident


def plot(result: dict[str, Any], output: Path) -> None:
    """Bars: seconds of audio per second of each runtime, for 8 clips of 10 s."""
    from matplotlib.figure import Figure

    models = result["models"]
    figure = Figure(figsize=(9, 2.9 * len(models)), layout="constrained")
    for axes, (name, measured) in zip(figure.subplots(len(models), squeeze=False)[:, 0], models.items(), strict=True):
        cell = next(c for c in measured["cells"] if (c["clip"], c["batch"]) == (10, 8))
        names = [row["runtime"] for row in cell["runtimes"]]
        speeds = [row["seconds of audio per second"] for row in cell["runtimes"]]
        colours = ["tab:blue" if runtime.startswith("m2d-embed") else "0.65" for runtime in names]
        bars = axes.barh(names, speeds, color=colours)
        axes.bar_label(
            bars, [f" {speed:,.0f} (x{row['ratio']:.2f})" for speed, row in zip(speeds, cell["runtimes"], strict=True)]
        )
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(speeds))
        axes.set_title(name, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("seconds of audio per second, 8 clips of 10 s")
    figure.savefig(output, dpi=120)


def main(
    rounds: int = 5,
    threads: int = 0,
    device: str = "cpu",
    model: Annotated[list[str] | None, typer.Option(help="base or bundled; both by default.")] = None,
    more: Annotated[bool, typer.Option("--more", help="Further rounds, beside those that the JSON has.")] = False,
    cell: Annotated[
        list[str] | None, typer.Option(help="With --more: seconds and batch, as 10x8; all by default.")
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="With --more: what is measured once, anew, and no rounds.")
    ] = False,
    task: Annotated[str, typer.Option(hidden=True)] = "",
    argument: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, print, and write the JSON and the plot."""
    if threads:
        torch.set_num_threads(threads)
    if task:
        print(json.dumps({"start": _start_task, "hour": _hour_task}[task](*(argument or ()))))
        return
    if (cell or once) and not more:
        raise typer.BadParameter("--cell and --once are for further rounds, so give --more, too")
    output = HERE / f"speed-{kind_of_cpu() if device == 'cpu' else device}.json"
    last = json.loads(output.read_text()) if output.exists() else {"models": {}}
    if more and last.get("machine") != machine():
        raise SystemExit(f"{output}: not of this machine and these versions, so no further rounds are added to it")
    command = f"python -m benchmarks.speed --rounds {rounds}" + (f" --device {device}" if device != "cpu" else "")
    again = " ".join([command, "--more", *(f"--model {m}" for m in model or ()), *(f"--cell {c}" for c in cell or ())])
    again += " --once" if once else ""
    result: dict[str, Any] = {
        "command": last["command"] if more else command,
        "further rounds": [*last.get("further rounds", []), again] if more else [],
        "machine": machine(),
        "decoding a clip of 10 s, ms": _least(decoding(rounds), last["decoding a clip of 10 s, ms"] if more else {}),
        "models": last["models"] if model or more else {},
    }
    for name in model or MODELS:
        before = result["models"].get(MODELS[name], {}) if more else {}
        with tempfile.TemporaryDirectory() as folder:
            measured = {} if once else compare(name, rounds, device, Path(folder), cell or [], before)
            single = _once(name, device, Path(folder)) if once or not before else {}
            result["models"][MODELS[name]] = before | measured | single
        output.write_text(json.dumps(result, indent=1) + "\n")
        plot(result, PICTURES / output.with_suffix(".png").name)


def _once(name: str, device: str, folder: Path) -> dict[str, Any]:
    return {
        "least cosine similarity with float32": agreement(name, device),
        "start": starts(name, device, folder),
        "an hour in one file": {dtype: hour(name, dtype, device) for dtype in ("fp32", "bf16")},
    }


if __name__ == "__main__":
    typer.run(main)
