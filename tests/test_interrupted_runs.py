"""Runs of ``embed`` killed at random moments under a low limit of open files, and then one that finishes."""

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TINY, random_model
from interruptions import (
    OPEN_FILES,
    Clip,
    Ended,
    assert_same,
    command,
    end_of,
    kill,
    leftovers,
    read_output,
    run,
    start,
    state_of,
    wait_for_changes,
    write_clips,
)

_BAD = 7  # the number of the file that is not audio
_ROUNDS_A_KILL = 5  # a kill that comes too late does not count


@dataclass
class Job:
    """Commands that make one output together, each in a process of its own."""

    commands: list[list[str]]  # with the usual parts
    small_parts: list[list[str]]  # the same, with short ones
    output: Path
    expected: list[Clip]
    begin: float  # seconds until the first trace of an undisturbed run, and from there to its end
    work: float
    with_group: bool = False
    log: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.output.parent

    def disturb(self, rng: np.random.Generator) -> list[int]:
        """Start all commands, kill each at a moment of its own, and return their statuses."""
        before = state_of(self.folder)
        chosen = self.commands if rng.random() < 0.5 else self.small_parts
        limit = None if self.with_group else OPEN_FILES
        processes = [start(one, open_files=limit, own_session=self.with_group) for one in chosen]
        moments = [self._moment(rng) for _ in processes]
        started, seen = time.monotonic(), None
        living = dict(enumerate(processes))
        ended: dict[int, Ended] = {}
        while living:
            now = time.monotonic()
            if seen is None and state_of(self.folder) != before:
                seen = now
            for number, process in list(living.items()):
                from_start, delay = moments[number]
                origin = started if from_start else seen
                if process.poll() is not None or (origin is not None and now - origin >= delay):
                    ended[number] = kill(living.pop(number), self.with_group)
            time.sleep(0.001)
        self.log += [f"{ended[n].status} {moments[n]} {ended[n].err[-2000:]}" for n in sorted(ended)]
        for one in ended.values():
            assert one.status in (-signal.SIGKILL, 0, 1), one
            assert "Traceback" not in one.err, one.err
        return [one.status for one in ended.values()]

    def _moment(self, rng: np.random.Generator) -> tuple[bool, float]:
        """Seconds from the start, or, more often, from the first trace of this run on."""
        if rng.random() < 0.2:
            return True, rng.uniform(0, self.begin + self.work)
        return False, self.work * rng.random() ** 2  # what is left to do gets less

    def finish(self) -> None:
        """Give all commands to their ends, and check the statuses."""
        was_there = self.output.is_file()
        processes = [
            start(one, open_files=None if self.with_group else OPEN_FILES, own_session=self.with_group)
            for one in self.commands
        ]
        ended = [end_of(process) for process in processes]
        for one in ended:
            assert "Traceback" not in one.err, one.err
        if was_there and len(ended) == 1 and ended[0].status == 2:
            assert "exists" in ended[0].err, ended
        elif self.with_group:
            assert [one.status for one in ended] == [0], ended
        else:
            assert max(one.status for one in ended) == 1, ended  # there is a bad file
            assert any(f"{_BAD:04}.wav" in one.err for one in ended), ended
            assert any(f"{len(self.expected)} clips" in one.out for one in ended), ended

    def check(self) -> None:
        """Everything is there, right, once, in order, and nothing else."""
        assert_same(self.read(), self.expected)
        assert leftovers_besides(self.output) == set()

    def read(self) -> list[Clip]:
        return read_dataset(self.output) if self.with_group else read_output(self.output)

    def remove_output(self) -> None:
        shutil.rmtree(self.output) if self.output.is_dir() else self.output.unlink()


def leftovers_besides(output: Path) -> set[str]:
    """What looks left over, but for the Parquet files of ``embed_dataset``, which are its output."""
    results = {file.relative_to(output.parent).as_posix() for file in output.glob("part-*.parquet")}
    return leftovers(output.parent) - results


def torture(job: Job, kills: int, seed: int) -> None:
    """Kill runs until so many kills have hit; whenever an output is whole nevertheless, check it and begin anew."""
    rng = np.random.default_rng(seed)
    landed = 0
    for _ in range(_ROUNDS_A_KILL * kills):
        statuses = job.disturb(rng)
        landed += statuses.count(-signal.SIGKILL)
        if landed >= kills:
            break
        if job.output.is_file() or -signal.SIGKILL not in statuses:
            job.finish()  # clears away what a run left that was killed at its very end
            job.check()
            job.remove_output()
    assert landed >= kills, "\n".join(job.log)
    job.finish()
    job.check()


def make_job(folder: Path, name: str, clips: Path, options: Sequence[object], shards: int = 0) -> Job:
    """A job, after an undisturbed run that says what is right and how long it takes."""
    for place in ("expected", "out"):
        (folder / place).mkdir()
    started = time.monotonic()
    process = start(command("embed", clips, "-o", folder / "expected" / name, *options))
    assert wait_for_changes(process, folder / "expected"), end_of(process)
    begin = time.monotonic() - started
    assert end_of(process).status == 1
    work = time.monotonic() - started - begin
    expected = read_output(folder / "expected" / name)

    def commands(part_seconds: float | None) -> list[list[str]]:
        whole = ("embed", clips, "-o", folder / "out" / name, *options)
        shares = [("--shard", f"{number}/{shards}") for number in range(1, shards + 1)] or [()]
        return [command(*whole, *share, part_seconds=part_seconds) for share in shares]

    # Several processes at once take longer each.
    many = max(1, shards // 2)
    return Job(commands(None), commands(work / 20), folder / "out" / name, expected, many * begin, many * work)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    random_model(TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "in"
    write_clips(folder, 400, bad=[_BAD])
    return folder


def test_killed_now_and_then(tmp_path, tiny_model):
    write_clips(tmp_path / "in", 60, bad=[_BAD])
    options = ["--model", tiny_model, "--device", "cpu", "--batch-size", "4"]
    job = make_job(tmp_path, "out.parquet", tmp_path / "in", options)
    job.commands = job.small_parts
    torture(job, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "shards"),
    [
        ("out.parquet", [], 0),
        ("out.npz", [], 0),
        ("out", [], 0),
        ("out.parquet", ["--kind", "timestamps"], 0),
        ("out.npz", ["--kind", "timestamps"], 0),
        ("out", ["--kind", "timestamps"], 0),
        ("out.parquet", [], 4),
        ("out.npz", ["--kind", "timestamps"], 4),
        ("out", [], 4),
    ],
)
def test_killed_forty_times(tmp_path, clips, name, options, shards):
    job = make_job(tmp_path, name, clips, ["--device", "cpu", *options], shards)
    torture(job, kills=40, seed=len(name) + len(options) + shards)


# --- Ray --------------------------------------------------------------------------------------------------------------

_CALL = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from m2d_embed.jobs.on_ray import Actors, embed_dataset
folder, source, output, model = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False, _temp_dir=folder)
summary = embed_dataset(source, output, model, clips_per_part=10, actors=Actors(number=1))
print(summary.embedded, summary.resumed, len(summary.failed))
"""


def read_dataset(folder: Path) -> list[Clip]:
    """The rows of ``embed_dataset`` by file; a bad clip has no embeddings."""
    rows = pq.read_table(folder, columns=["file", "embedding", "error"]).to_pylist()
    for row in rows:
        assert (row["embedding"] is None) == (row["error"] is not None)
    good = [row for row in rows if row["error"] is None]
    assert len(rows) == len(good) + 1
    clips = [Clip(row["file"], np.array([row["embedding"]], np.float32), None) for row in good]
    return sorted(clips, key=lambda clip: clip.name)


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A short path: those of Ray's sockets may have 107 characters."""
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    folder = tempfile.mkdtemp(prefix="ray-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_calls_of_ray_killed_forty_times(tmp_path, clips, tiny_model, ray_folder):
    """The whole group of the calling process dies, as with a terminal that is closed; Ray's own processes then end."""
    for place in ("expected", "out"):
        (tmp_path / place).mkdir()
    options = ["--model", tiny_model, "--device", "cpu"]
    assert run(command("embed", clips, "-o", tmp_path / "expected" / "out.parquet", *options)).status == 1
    expected = read_output(tmp_path / "expected" / "out.parquet")
    output = tmp_path / "out" / "out"
    call = [sys.executable, "-c", _CALL, ray_folder, str(clips), str(output), str(tiny_model)]
    started = time.monotonic()
    process = start(call, own_session=True)
    assert wait_for_changes(process, tmp_path / "out", 4), end_of(process)
    begin = time.monotonic() - started
    ended = end_of(process)
    assert (ended.status, ended.out.split()) == (0, ["399", "0", "1"]), ended
    work = time.monotonic() - started - begin
    shutil.rmtree(output)
    job = Job([call], [call], output, expected, begin, work, with_group=True)
    torture(job, kills=40, seed=0)
