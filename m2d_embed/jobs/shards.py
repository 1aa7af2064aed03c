"""One job of ``embed`` for several processes, on one machine or many, that share a file system and nothing else.

Each takes a fixed share of the files, and all keep their results in the one store of the output. A share is done when
all its files are; whoever finds every share done puts the output together. What the processes have to agree on is in
the store, ``part-plan-of-8.plan``: the files and their sizes, from which the shares follow. No process waits for
another but while the output is put together, so a lost one hangs nobody: give its command again. A job that lost its
machines goes on with another number of shares, too.
"""

from __future__ import annotations

import heapq
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.files import write_json
from m2d_embed.jobs.embed import FileOutput, OnProgress, Options, Output, Summary, embed_missing, open_output
from m2d_embed.jobs.outputs import names_in
from m2d_embed.jobs.settings import Kind, job_settings
from m2d_embed.jobs.store import compare_settings, key_of, stamp_of, stamps_number
from m2d_embed.m2d import M2D
from m2d_embed.runtime.batching import DEFAULT_PIPELINE, Pipeline

_SHARD = re.compile(r"(\d+)/(\d+)")
#: What torchrun sets together; RANK and WORLD_SIZE alone are also set by notebooks and pods for ends of their own.
_TORCHRUN = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "RANK", "WORLD_SIZE")
#: Number of a process, from 0 on, and how many there are, as launchers say it.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)


@dataclass(frozen=True)
class Shard:
    """Which share of a job: ``number`` runs from 1 to ``count``.

    Raises:
        ConfigError: if there is no such share.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ConfigError(f"shard {self.number}/{self.count} does not exist; the first of 8 is 1/8, the last 8/8.")

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"

    @classmethod
    def parse(cls, text: str, environ: Mapping[str, str] = os.environ) -> Shard:
        """``"3/8"``, the third of eight, or ``"auto"``: what a launcher has put into the environment.

        Raises:
            ConfigError: on anything else, and if no launcher has said anything.
        """
        if text == "auto":
            for rank, world in _LAUNCHERS:
                if rank in environ and world in environ:
                    return cls._of_launcher(rank, world, environ)
            variables = ", ".join(f"{rank} and {world}" for rank, world in _LAUNCHERS)
            raise ConfigError(f"--shard auto: the environment does not say which share, by {variables}.")
        match = _SHARD.fullmatch(text)
        if match is None:
            raise ConfigError(f"a shard is written as 3/8, the third of eight, or auto, not as {text!r}.")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Shard | None:
        """The share of a process that torchrun started, or None if it did not, or started no other.

        Raises:
            ConfigError: if its variables contradict one another.
        """
        if any(name not in environ for name in _TORCHRUN):
            return None
        shard = cls._of_launcher("RANK", "WORLD_SIZE", environ)
        return shard if shard.count > 1 else None

    @classmethod
    def _of_launcher(cls, rank: str, world: str, environ: Mapping[str, str]) -> Shard:
        number, count = environ[rank], environ[world]
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ConfigError(f"{rank}={number} and {world}={count} in the environment are not what a launcher sets.")
        return cls(int(number) + 1, int(count))


@dataclass(frozen=True)
class ShardSummary:
    """What one process did, and where the whole job stands.

    Attributes:
        share: what was done of this process's share.
        missing: numbers of the shards that are not done yet. If there are none, the output is whole, or about to be
            made by another process.
        whole: of the whole job, from the process that finished it, and from one that finds it finished; else None.
    """

    share: Summary
    missing: list[int]
    whole: Summary | None


def embed_shard(
    model: M2D,
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    shard: Shard,
    kind: Kind = "scene",
    batch_size: int = 32,
    on_progress: OnProgress = lambda file, error: None,
    pipeline: Pipeline = DEFAULT_PIPELINE,
) -> ShardSummary:
    """Embed one share of the files; make the output if this was the last.

    Args:
        model: the same in every process.
        files: all files of the job, the same in every process.
        output: of the whole job: ``*.npz``, ``*.parquet``, or a folder that gets one ``.npy`` a clip.
        shard: which share this process takes.
        kind: "scene" or "timestamps".
        batch_size, on_progress, pipeline: as in ``embed_files``.

    Raises:
        BusyError: if another process works on this share, or a run without shards on the output.
        ConfigError: if the output is there already but of another job, or shares that are there are of other files or
            settings.
        OSError: if the disk is full or not writable; what is done by then is kept.
    """
    made = open_output(Path(output), kind, [Path(file) for file in files])
    job = _Job(made, [Path(file) for file in files], shard.count, job_settings(model, kind))
    with made.store.exclusively():
        finished = job.finished()
    if finished is not None:
        return ShardSummary(Summary(0, 0, {}), [], finished)
    with made.store.claim(str(shard)):
        made.join(job.settings)
        dealt = job.agree_on_shares()
        share = dealt[shard.number - 1]
        summary = embed_missing(made, model, share, Options(batch_size, on_progress, pipeline))
    return job.put_together(summary, dealt)


def shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Deal out files so that the shares are about equally large: the largest file first, each to the smallest share.

    Returns:
        ``count`` ascending lists of indices; every index is in exactly one.
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    smallest = [(0, 0, number) for number in range(count)]  # bytes, files: empty files are dealt out evenly, too
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size, files, number = heapq.heappop(smallest)
        dealt[number].append(index)
        heapq.heappush(smallest, (size + sizes[index], files + 1, number))
    return [sorted(indices) for indices in dealt]


def local_device(device: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The GPU of a process among several on a machine, ``cuda:LOCAL_RANK``; else, or if another was named, ``device``.

    With fewer GPUs to be seen than processes, as where each process sees only its own, they are taken in turn.
    """
    import torch

    rank = environ.get("LOCAL_RANK", "")
    if device not in (None, "cuda") or not rank.isdecimal() or not torch.cuda.is_available():
        return device
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


class _Job:
    """The whole job, as seen by one process."""

    def __init__(self, made: Output, files: list[Path], count: int, settings: dict[str, Any]):
        self.made = made
        self.store = made.store
        self.files = files
        self.count = count
        self.settings = settings

    def finished(self) -> Summary | None:
        """The summary of this very job if its output is there; ConfigError if the output is of another job."""
        output = self.made.output
        if not isinstance(self.made, FileOutput) or not output.exists():
            return None
        if self.store.any_at_work():  # a run that is to replace it
            return None
        self.made.tidy_finished()
        names, settings = names_in(output)
        compare_settings(output, {key: settings.get(key) for key in self.settings}, self.settings)
        # Names are compared by the files that they lead to, from the folder where that run was.
        held = {key_of(Path(settings.get("root", ""), name)) for name in names}
        wanted = {key_of(file): file for file in self.files}
        now = stamps_number((key, stamp_of(wanted[key])) for key in held & wanted.keys())
        if not held - wanted.keys() and settings.get("stamps", now) != now:
            raise ConfigError(f"{output} exists, and files have changed since; remove it to embed them anew.")
        if held - wanted.keys():
            raise ConfigError(
                f"{output} exists and holds other files, e.g. {min(held - wanted.keys())}; choose another name, or "
                "remove it."
            )
        lacking = {
            file: AudioError(f"{file}: not in {output}, which is finished; to embed anew, remove that.")
            for key, file in wanted.items()
            if key not in held
        }
        return Summary(0, len(names), lacking)

    def agree_on_shares(self) -> list[list[Path]]:
        """The files of every shard, by the plan of the process that came first; ConfigError if that planned otherwise.

        Sizes are those of the plan: a file that has changed since does not move to another shard.
        """
        keys = [key_of(file) for file in self.files]
        plan_file = self.store.folder / f"part-plan-of-{self.count}.plan"
        with self.store.exclusively():
            plan = _read_plan(plan_file)
            if plan is None:
                plan = {"files": keys, "sizes": [max(0, stamp_of(file)[0]) for file in self.files]}
                write_json(plan_file, plan)
        if plan["files"] != keys:
            other = set(plan["files"]).symmetric_difference(keys)
            what = f"other files ({len(other)}, e.g. {min(other)})" if other else "the same files in another order"
            raise ConfigError(
                f"{self.made.output}: processes of this job were given {what}; give all of them the same, or remove "
                f"{plan_file.parent} to begin anew."
            )
        return [[self.files[i] for i in share] for share in shares(plan["sizes"], self.count)]

    def put_together(self, share: Summary, dealt: Sequence[Sequence[Path]]) -> ShardSummary:
        """Make the output, unless a share is not done yet, or another process is still at work, and will do it."""
        with self.store.exclusively():
            if not self.store.is_begun:  # another process has done so meanwhile, and our lock made the folder again
                self.store.remove()
                return ShardSummary(share, [], None)
            self.store.check(known=self.store.refresh())  # hours may lie between the writing of a part and this
            missing = [number for number, files in enumerate(dealt, 1) if not self._is_done(files)]
            if missing or self.store.any_at_work():
                return ShardSummary(share, missing, None)
            errors = {file: self.store.error_of(key_of(file)) for file in self.files}
            failed = {file: AudioError(error) for file, error in errors.items() if error is not None}
            good = [file for file in self.files if file not in failed]
            self.made.finish(good)
            if self.store.is_begun:
                self.store.remove_unfinished()  # and what was agreed on
            return ShardSummary(share, [], Summary(0, len(good), failed))

    def _is_done(self, files: Sequence[Path]) -> bool:
        return all(self.store.attempted(key_of(file), stamp_of(file)) for file in files)


def _read_plan(file: Path) -> dict[str, Any] | None:
    """A plan; None if there is none, or it is damaged, and so to be made anew."""
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        whole = len(plan["files"]) == len(plan["sizes"]) and all(isinstance(size, int) for size in plan["sizes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return plan if whole else None
