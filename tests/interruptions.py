"""What tests of long jobs share: clips, commands as processes of their own, signals at chosen moments, what came of it.

Nothing of the package's inside is used but the length of a part, see ``shorten_parts``. As a program this module is the
command line with shorter parts: ``python tests/interruptions.py SECONDS embed ...``.
"""

import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soundfile

OPEN_FILES = 64  # a limit as it is met in containers and old clusters, only smaller
_POLL_SECONDS = 0.001
_TIMEOUT = 300
RECORDS = "_m2d_embed"
LEFT_WHILE_AT_WORK = ("partial", "tmp", "shard", "whole", "part-")


# --- clips ------------------------------------------------------------------------------------------------------------


def write_clips(folder: Path, count: int, bad: Sequence[int] = (), seed: int = 0) -> list[Path]:
    """Short clips of 0.2 to 2 s, no two alike: notes in noise, at three rates; those whose numbers are in ``bad`` are
    not audio.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        rate = (16_000, 16_000, 22_050, 48_000)[number % 4]
        seconds = (0.2, 0.5, 0.8, 1.1, 2.0)[number % 5]
        time_axis = np.arange(round(seconds * rate)) / rate
        note = 0.3 * np.sin(2 * np.pi * rng.uniform(80, 4000) * time_axis) * np.exp(-rng.uniform(0, 4) * time_axis)
        samples = note + rng.uniform(0.001, 0.1) * rng.standard_normal(len(time_axis))
        files.append(folder / f"{number:04}.wav")
        soundfile.write(files[-1], samples.clip(-1, 1).astype(np.float32), rate)
    for number in bad:
        files[number].write_text("not audio")
    return files


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it said."""

    status: int
    out: str
    err: str


def command(*arguments: object, part_seconds: float | None = None) -> list[str]:
    """The command line with these arguments, as users have it, or with parts of so many seconds."""
    how = ["-m", "m2d_embed"] if part_seconds is None else [__file__, str(part_seconds)]
    return [sys.executable, *how, *map(str, arguments)]


def start(
    arguments: Sequence[str],
    open_files: int | None = None,
    file_bytes: int | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    own_session: bool = False,
) -> subprocess.Popen[str]:
    """Start a command; ``open_files`` and ``file_bytes`` are limits of the system for it."""

    def limit() -> None:
        if open_files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
        if file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environ or {}),
        cwd=cwd,
        start_new_session=own_session,
    )


def end_of(process: subprocess.Popen[str]) -> Ended:
    """Wait for the end of a process."""
    try:
        out, err = process.communicate(timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"{process.args} had not ended after {_TIMEOUT} s:\n{out}\n{err}") from None
    return Ended(process.returncode, out, err)


def run(arguments: Sequence[str], **options: object) -> Ended:
    """Run a command to its end; options as for ``start``."""
    return end_of(start(arguments, **options))  # type: ignore[arg-type]  # of any option of start


def kill(process: subprocess.Popen[str], group: bool = False) -> Ended:
    """SIGKILL to a process, or to all of its group."""
    with suppress(ProcessLookupError):
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    return end_of(process)


# --- watching a folder ------------------------------------------------------------------------------------------------


def state_of(folder: Path) -> frozenset[tuple[str, int, int]]:
    """Everything below a folder: names, sizes and times of change."""
    found = set()
    for directory, folders, names in os.walk(folder):
        for name in (*folders, *names):
            with suppress(OSError):  # it was renamed meanwhile
                status = os.stat(os.path.join(directory, name))  # noqa: PTH116, PTH118  (looked at a thousand times a second)
                found.add((os.path.join(directory, name), status.st_size, status.st_mtime_ns))  # noqa: PTH118
    return frozenset(found)


def wait_for_changes(process: subprocess.Popen[str], folder: Path, count: int = 1) -> bool:
    """Wait until something below a folder has changed so many times; False if the process ends before that."""
    state, changes = state_of(folder), 0
    while changes < count:
        if process.poll() is not None:
            return False
        time.sleep(_POLL_SECONDS)
        now = state_of(folder)
        changes += now != state
        state = now
    return True


def kill_at_work(arguments: Sequence[str], folder: Path, changes: int, sign: int = signal.SIGKILL) -> Ended:
    """Start a command and send it a signal once something below ``folder`` has changed so many times."""
    process = start(arguments)
    assert wait_for_changes(process, folder, changes), f"ended before it could be disturbed: {end_of(process)}"
    process.send_signal(sign)
    return end_of(process)


def leftovers(folder: Path) -> set[str]:
    """What below a folder looks like work in progress.

    Hidden lock files may stay, and so does, in a folder of results, the record of what they are.
    """
    found = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        words = ("partial", "tmp") if f"/{RECORDS}/" in f"/{name}" else LEFT_WHILE_AT_WORK
        is_lock = path.name.startswith(".") and path.suffix == ".lock"
        if not is_lock and any(word in name for word in words):
            found.add(name)
    return found


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """What an output holds of one file: embeddings (rows, D) and, of timestamps, their times in ms."""

    name: str
    embeddings: np.ndarray
    times: np.ndarray | None


def read_output(output: Path) -> list[Clip]:
    """What ``embed`` wrote, in its order; a file that is in there twice comes twice. Read without the package."""
    if output.is_dir():
        return [
            Clip(file.relative_to(output).as_posix().removesuffix(".npy"), *_npy_of(file))
            for file in sorted(output.rglob("*.npy"))
            if not file.name.endswith(".times.npy")
        ]
    if output.suffix == ".npz":
        with np.load(output, allow_pickle=False) as held:
            names, embeddings = [str(name) for name in held["files"]], held["embeddings"]
            offsets = held.get("offsets", np.arange(len(names) + 1))
            times = held.get("timestamps")
        spans = list(itertools.pairwise(offsets.tolist()))
        assert len(spans) == len(names)
        return [
            Clip(name, embeddings[first:last], None if times is None else times[first:last])
            for name, (first, last) in zip(names, spans, strict=True)
        ]
    table = pq.read_table(output)
    clips, first = [], 0
    embeddings = np.array(table["embedding"].to_pylist(), np.float32)
    times = table["timestamp_ms"].to_numpy() if "timestamp_ms" in table.column_names else None
    for name, group in itertools.groupby(table["file"].to_pylist()):
        last = first + len(list(group))
        clips.append(Clip(name, embeddings[first:last], None if times is None else times[first:last]))
        first = last
    return clips


def _npy_of(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    times = file.with_name(file.name.removesuffix(".npy") + ".times.npy")
    embeddings = np.load(file)
    return (embeddings, np.load(times)) if times.exists() else (embeddings[None], None)


def assert_same(got: Sequence[Clip], expected: Sequence[Clip]) -> None:
    """The same files in the same order, each once, with the same rows: times exactly, embeddings up to rounding."""
    assert [clip.name for clip in got] == [clip.name for clip in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.embeddings.shape == theirs.embeddings.shape, mine.name
        assert np.abs(mine.embeddings - theirs.embeddings).max() <= 1e-5, mine.name
        assert (mine.times is None) == (theirs.times is None), mine.name
        assert mine.times is None or np.array_equal(mine.times, theirs.times), mine.name


# --- shorter parts ----------------------------------------------------------------------------------------------------


def shorten_parts(seconds: float, set_attribute: Callable[[object, str, float], None] = setattr) -> None:
    """Have what is done written every so many seconds; those that users have are longer than a test is."""
    from m2d_embed.jobs import embed

    set_attribute(embed, "_SECONDS_A_PART", seconds)


if __name__ == "__main__":
    from m2d_embed.cli import main

    shorten_parts(float(sys.argv.pop(1)))
    main()
