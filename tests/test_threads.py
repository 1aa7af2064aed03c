"""Threads: what a container grants, and what is left of them after a fork."""

import os
import subprocess
import sys

import pytest
import torch

from m2d_embed import threads

V2 = "0::/user.slice/job\n"
V1 = "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n"


def tree(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user.slice/job/cpu.max": "50000 100000\n"}, 0.5),
        # the least of a group and those above it
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000\n",
                "sys/fs/cgroup/user.slice/cpu.max": "300000 100000\n",
            },
            3.0,
        ),
        # in a container the path is the host's, and the mount the group itself
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
    ],
)
def test_quotas(tmp_path, files, expected):
    tree(tmp_path, files)
    assert threads.cpu_quota(tmp_path) == expected


@pytest.mark.parametrize(
    ("quota", "cores", "expected"), [(None, 8, 8), (2.0, 8, 2), (1.5, 8, 2), (0.2, 8, 1), (16.0, 8, 8)]
)
def test_usable_cores(monkeypatch, quota, cores, expected):
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "_cores", lambda: cores)
    assert threads.usable_cores() == expected


@pytest.mark.parametrize(
    ("quota", "current", "variable", "expected"),
    [
        (2.0, 8, "", 2),
        (None, 8, "", None),
        (2.0, 4, "", None),  # somebody chose four
        (2.0, 8, "8", None),  # or eight
        (16.0, 8, "", None),
    ],
)
def test_torch_takes_no_more_threads_than_the_quota(monkeypatch, quota, current, variable, expected):
    for name in threads._CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: current)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    threads.fit_threads_to_quota.__wrapped__()
    assert chosen == ([] if expected is None else [expected])


FORKED = """
import multiprocessing, torch, m2d_embed

torch.set_num_threads(2)
model = m2d_embed.load_model(device="cpu")
audio = list(torch.rand(4, 48_000))
expected = model.encode(audio, output="torch")  # starts torch's threads, which a fork does not copy


def embed(_):
    return float((model.encode(audio, output="torch") - expected).abs().max()), torch.get_num_threads()


with multiprocessing.get_context("fork").Pool(2) as pool:
    for difference, threads in pool.map(embed, range(4)):
        assert difference < 1e-5 and threads == 1
assert torch.get_num_threads() == 2 and (model.encode(audio, output="torch") - expected).abs().max() < 1e-5
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_a_forked_process_computes():
    ended = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=300)
    assert ended.stdout == "done\n", ended.stderr
