"""Threads: how many a process computes with and may use, by its affinity and its container's CPU quota; and forks.

``choose_threads`` decides for a model on the CPU; ``describe`` says what was chosen, and why.
"""

from __future__ import annotations

import logging
import math
import os
from functools import cache
from pathlib import Path

import torch

from m2d_embed.config import is_whole
from m2d_embed.errors import ConfigError

log = logging.getLogger("m2d_embed")

_ROOT = Path("/")
#: Whoever sets one of these has chosen the number of threads.
_CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")


def usable_cores() -> int:
    """Cores that this process may use: of its affinity, no more than its container's CPU quota, and at least one."""
    quota = cpu_quota()
    return _cores() if quota is None else max(1, min(_cores(), math.ceil(quota)))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Cores' worth of time that this process's cgroup, version 1 or 2, grants it; None if it sets no limit.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version_2 = controllers == ""
        if not version_2 and "cpu" not in controllers.split(","):
            continue
        mounts = ["sys/fs/cgroup"] if version_2 else [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"]
        inside = Path(path.lstrip("/"))
        # Every group above counts, too. In a container the path may be the host's, and the mount the group itself.
        for mount in mounts:
            groups = {root / mount / group for group in (inside, *inside.parents, Path())}
            quotas += [_quota_2(group) if version_2 else _quota_1(group) for group in groups]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_1(group: Path) -> float | None:
    try:
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 and period > 0 else None
    except (OSError, ValueError):
        return None


class _Choice:
    """What this module has set torch's number of threads to, and who wanted it so."""

    number = 0
    reason = ""

    @classmethod
    def make(cls, number: int, reason: str) -> None:
        """Set it."""
        torch.set_num_threads(number)
        cls.number, cls.reason = number, reason


def choose_threads(number: int | None) -> None:
    """Let torch, and with it the kernels, compute with so many threads on the CPU; None leaves it to ``fit_threads``.

    The number is the whole process's, until it is set again; only threads of Python that have computed before keep
    theirs.

    Raises:
        ConfigError: if it is no whole number from 1 on.
    """
    if number is None:
        fit_threads()
        return
    if not is_whole(number) or number < 1:
        raise ConfigError(f"threads must be a whole number from 1 on, or None, not {number!r}.")
    _Choice.make(int(number), "as asked for")


@cache
def fit_threads() -> None:
    """Once in a process: let torch have no more threads than it has cores, if nobody has chosen otherwise.

    Torch may count the machine's cores, and its threads wait for one another: those beyond the cores of this process,
    or beyond its container's CPU quota, are what makes the system stop all of them for most of the time. Whoever sets
    ``OMP_NUM_THREADS`` or the like has chosen, and so has who called ``torch.set_num_threads`` with another number than
    those that torch begins with.
    """
    if _Choice.number or _variable():
        return
    usable, quota = usable_cores(), cpu_quota()
    if usable < torch.get_num_threads() and torch.get_num_threads() in _defaults():
        is_quota = quota is not None and usable < _cores()
        why = f"this container's CPU quota is {quota:.1f} cores" if is_quota else "this process may use no more cores"
        log.info("%s, so torch takes %d threads", why, usable)
        _Choice.make(usable, why)


def describe() -> str:
    """How many threads compute on the CPU in this process, and why, in words."""
    number, variable = torch.get_num_threads(), _variable()
    if number == _Choice.number:
        why = _Choice.reason
    elif variable:
        why = f"{variable}={os.environ[variable]}"
    elif number == usable_cores():
        why = "one for each core that this process may use"
    else:
        why = "torch's own number, or one that was given to torch.set_num_threads"
    return f"{number}: {why}"


def _variable() -> str:
    """The first variable that chooses a number of threads, or ""."""
    return next((name for name in _CHOSEN_BY if os.environ.get(name)), "")


def _defaults() -> set[int]:
    """Numbers that torch may begin with: cores of the machine or of the process, each of them or its hyperthreads."""
    return {os.cpu_count() or 1, _cores(), _cores_without_hyperthreads()}


def _cores_without_hyperthreads(root: Path = _ROOT) -> int:
    """Cores of the machine, as far as the system tells which of its processors share one."""
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return len({file.read_text() for file in files}) or os.cpu_count() or 1


@cache
def survive_forks() -> None:
    """Once in a process that computes: let processes that are forked from it compute with one thread each.

    Of a process with threads a fork copies only the one that forks. OpenMP's runtime would wait for the others for
    ever. A child may set another number of threads, and hangs, unless it was started by ``spawn`` or ``forkserver``.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_use_one_thread)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
