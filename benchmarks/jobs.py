"""What it costs to keep results safely: merging a million rows, and ``embed`` beside an earlier revision of itself.

python -m benchmarks.jobs                       # writes benchmarks/jobs.json; 16 GB of disk, about an hour
python -m benchmarks.jobs --rows 100000 --clips 0      # the merge alone, of fewer rows

The merge: parts of random rows, as a run leaves them that was killed at its very end, are taken up, which compares the
checksum of each, and then put together into the output. Memory is that of the process beyond what it had when it knew
the list of files; the time of putting together is set against ``shutil.copyfile`` of the output on the same disk, both
until the disk has everything. Cold: the system was told to drop all files from its memory before; the merge then still
finds what the check has just read, if that fits.

The overhead: ``embed`` of many clips of 1 s by this code and by another revision of it, taking turns.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile
import typer

from benchmarks.timing import machine, measure
from m2d_embed.files import atomic_write
from m2d_embed.jobs.outputs import EMBEDDINGS, write_output
from m2d_embed.jobs.store import Entry, PartStore, key_of
from m2d_embed.runtime.profiling import peak_memory

RESULT = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[1]
DIM = 1920
_ROWS_A_PART = 1000
_ROWS_SORTED = 2048  # embed sorts so many clips by length, so parts do not have the files' order
_RATE = 16_000
_SETTINGS = {"kind": "scene", "dim": DIM, "model": "none", "fingerprint": "of random rows"}


# --- merging ----------------------------------------------------------------------------------------------------------


def parts_of(rows: int) -> Iterator[tuple[list[int], np.ndarray[Any, np.dtype[np.float32]]]]:
    """Numbers of the rows of each part, and their random embeddings (n, 1920): the same in every call."""
    order = np.random.default_rng(0)
    shuffled: list[int] = []
    for first in range(0, rows, _ROWS_SORTED):
        shuffled += (first + order.permutation(min(_ROWS_SORTED, rows - first))).tolist()
    for first in range(0, rows, _ROWS_A_PART):
        numbers = shuffled[first : first + _ROWS_A_PART]
        yield numbers, np.random.default_rng(first).standard_normal((len(numbers), DIM), np.float32)


def name_of(number: int) -> str:
    return f"sounds/recordings/{number // 1000:06}/{number:09}.wav"


def make_parts(folder: Path, output: Path, rows: int) -> None:
    """Parts as a run keeps them, of clips that need not be there."""
    store = PartStore(folder, output)
    with store.claim():
        store.open(_SETTINGS)
        for numbers, embeddings in parts_of(rows):
            entries = [Entry(key_of(name_of(number)), 1, (32_044, number, number)) for number in numbers]
            store.add(entries, {EMBEDDINGS: [embeddings]})


def merge(folder: Path, output: Path, rows: int) -> dict[str, float]:
    """Take up the parts and put them together: seconds of each, and MB beyond what the process had before."""
    files = [Path(name_of(number)) for number in range(rows)]  # as a run has them all the time
    for file in files:
        str(file)  # which they keep
    before = peak_memory() or 0
    started = time.perf_counter()
    store = PartStore(folder, output)
    with store.claim():
        store.open(_SETTINGS)
        store.check()
        opened = time.perf_counter()
        with atomic_write(output) as partial:
            write_output(partial, output.suffix, store, files, _SETTINGS)
    ended = time.perf_counter()
    return {
        "take up": opened - started,
        "merge": ended - opened,
        "MB": ((peak_memory() or 0) - before) / 1e6,
    }


_MERGE = """
import json, sys
from pathlib import Path
from benchmarks.jobs import merge
print(json.dumps(merge(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
"""


def merge_in_a_process(folder: Path, output: Path, rows: int) -> dict[str, float]:
    """``merge`` in a process of its own."""
    command = [sys.executable, "-c", _MERGE, str(folder), str(output), str(rows)]
    found: dict[str, float] = json.loads(subprocess.check_output(command, cwd=ROOT))
    return found


def check_merged(output: Path, rows: int) -> None:
    """A few rows of the output are those that were made."""
    file = pq.ParquetFile(output)
    assert file.metadata.num_rows == rows
    _, first = next(iter(parts_of(rows)))
    numbers, _ = next(iter(parts_of(rows)))
    batch = next(file.iter_batches(max(numbers) + 1, columns=["embedding"]))
    held = batch["embedding"].flatten().to_numpy().reshape(-1, DIM)
    assert np.array_equal(held[numbers], first)


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a file, and to have it on the disk."""
    started = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Have the system drop files from its memory."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_merge(rows: int, suffix: str, rounds: int) -> dict[str, Any]:
    """Memory and time of the merge, and the time of copying what comes of it."""
    taken_up: dict[str, list[float]] = {"cold": [], "warm": []}
    merges: dict[str, list[float]] = {"cold": [], "warm": []}
    copies: dict[str, list[float]] = {"cold": [], "warm": []}
    memory = []
    scratch = ROOT / "build"  # git passes over it, and it is on a disk, where temporary files may be in memory
    scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        output, copied = folder / f"out{suffix}", folder / "copy"
        make_parts(folder / "parts", output, rows)
        for state in ["cold", "warm"] * rounds:
            output.unlink(missing_ok=True)
            if state == "cold":
                forget(folder)
            merged = merge_in_a_process(folder / "parts", output, rows)
            taken_up[state].append(merged["take up"])
            merges[state].append(merged["merge"])
            memory.append(merged["MB"])
            if state == "cold":
                forget(folder)
            copies[state].append(copy(output, copied))
            copied.unlink()
        if suffix == ".parquet":
            check_merged(output, rows)
        size = output.stat().st_size
    return {
        "rows": rows,
        "values": DIM,
        "suffix": suffix,
        "GB": round(size / 1e9, 2),
        "peak memory, MB": round(max(memory)),
        **{
            state: {
                "take up and verify, s": round(min(taken_up[state]), 1),
                "merge, s": round(min(merges[state]), 1),
                "copy, s": round(min(copies[state]), 1),
                "ratio": round(min(merges[state]) / min(copies[state]), 2),
            }
            for state in merges
        },
    }


# --- overhead ---------------------------------------------------------------------------------------------------------


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The files of a revision in a folder of their own, its kernels compiled if those of this one are."""
    with tempfile.TemporaryDirectory() as name:
        archive = subprocess.Popen(["git", "archive", revision], stdout=subprocess.PIPE, cwd=ROOT)
        subprocess.run(["tar", "-x", "-C", name], stdin=archive.stdout, check=True)
        if archive.wait():
            raise SystemExit(f"git archive {revision} failed; is it a revision of this repository?")
        if (ROOT / "m2d_embed" / "native" / "kernels.so").exists():
            build = "import hatch_build, pathlib; hatch_build.compile_kernels(pathlib.Path('.'))"
            subprocess.run([sys.executable, "-c", build], cwd=name, check=True)
        yield Path(name)


def write_clips(folder: Path, count: int) -> None:
    """Clips of 1 s of noise, no two alike."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        soundfile.write(folder / f"{number:06}.wav", 0.1 * rng.standard_normal(_RATE, np.float32), _RATE)


def embed(root: Path, source: Path, output: Path) -> None:
    """``embed`` by the code in ``root``, anew."""
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "m2d_embed", "embed", str(source), "-o", str(output), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)


def measure_overhead(clips: int, against: str, rounds: int) -> list[dict[str, Any]]:
    """Seconds of both revisions for each kind of output."""
    found = []
    with tempfile.TemporaryDirectory() as name, checkout(against) as other:
        source = Path(name) / "in"
        write_clips(source, clips)
        for output in ("out.parquet", "out"):
            contestants: dict[str, Callable[[], None]] = {
                against: partial(embed, other, source, Path(name) / f"theirs-{output}"),
                "now": partial(embed, ROOT, source, Path(name) / output),
            }
            seconds = measure(contestants, rounds)
            found.append(
                {
                    "clips": clips,
                    "output": ".npy folder" if output == "out" else ".parquet",
                    "seconds": {who: [round(s, 2) for s in times] for who, times in seconds.items()},
                    "ratio of medians": _ratio(seconds, statistics.median, against),
                    "ratio of minima": _ratio(seconds, min, against),
                }
            )
    return found


def _ratio(seconds: dict[str, list[float]], of: Callable[[list[float]], float], against: str) -> float:
    return round(of(seconds["now"]) / of(seconds[against]), 3)


def main(
    rows: int = 1_000_000, clips: int = 5000, against: str = "039720c", rounds: int = 5, merge_rounds: int = 2
) -> None:
    """Measure, print, and write the JSON. No rows, or no clips: that part is left out, and nothing is written."""
    options = f"--rows {rows} --clips {clips} --against {against} --rounds {rounds} --merge-rounds {merge_rounds}"
    result: dict[str, Any] = {"command": f"python -m benchmarks.jobs {options}", "machine": machine()}
    if rows:
        result["merge"] = [measure_merge(rows, suffix, merge_rounds) for suffix in (".parquet", ".npz")]
    if clips:
        result["overhead"] = measure_overhead(clips, against, rounds)
    print(json.dumps(result, indent=1))
    if rows and clips:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
