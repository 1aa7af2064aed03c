"""Threads: how many a process may use, by its affinity and its container's CPU quota, and what is left after a fork."""

from __future__ import annotations

import logging
import math
import os
from functools import cache
from pathlib import Path

import torch

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


@cache
def fit_threads_to_quota() -> None:
    """Once in a process: let torch have no more threads than the container's CPU quota, if nobody has chosen otherwise.

    Torch counts cores, and its threads wait for one another: those beyond the quota are what makes the system stop all
    of them for most of the time.
    """
    quota = cpu_quota()
    if quota is None or any(os.environ.get(name) for name in _CHOSEN_BY):
        return
    if usable_cores() < torch.get_num_threads() == _cores():
        log.info("this container's CPU quota is %.1f cores, so torch takes %d threads", quota, usable_cores())
        torch.set_num_threads(usable_cores())


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
