"""Threads: what a container grants, and what is left of them after a fork."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DATA
from typer.testing import CliRunner

import m2d_embed
from m2d_embed.backends import threads
from m2d_embed.cli import app
from m2d_embed.errors import ConfigError

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


@pytest.fixture
def torch_with(monkeypatch):
    """A torch whose number of threads a test may set, on a machine of 16 processors of which this process has 8."""
    for name in threads._CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    numbers = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(threads, "_cores", lambda: 8)
    monkeypatch.setattr(threads, "_defaults", lambda: {16, 8})
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    monkeypatch.setattr(threads, "fit_threads", threads.fit_threads.__wrapped__)
    monkeypatch.setattr(threads, "_Choice", type("_Choice", (threads._Choice,), {"number": 0, "reason": ""}))
    return numbers


@pytest.mark.parametrize(
    ("quota", "current", "variable", "expected"),
    [
        (2.0, 8, "", 2),
        (None, 8, "", None),
        (2.0, 4, "", None),  # somebody chose four
        (2.0, 8, "8", None),  # or eight
        (16.0, 8, "", None),
        (16.0, 16, "", 8),  # torch counted the cores of the machine, and not those of the process
        (None, 16, "", 8),
        (0.5, 16, "", 1),
    ],
)
def test_torch_takes_no_more_threads_than_cores(monkeypatch, torch_with, quota, current, variable, expected):
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    torch_with[:] = [current]
    threads.choose_threads(None)
    assert torch_with == ([current] if expected is None else [current, expected])


def test_who_names_a_number_gets_it(monkeypatch, torch_with):
    """More than there are cores, too, against variables, and for loads to come that name none."""
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    threads.choose_threads(16)
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.choose_threads(None)
    threads.choose_threads(np.int64(1))
    assert torch_with == [8, 16, 1] and type(torch_with[-1]) is int


@pytest.mark.parametrize("number", [0, -1, 1.0, "2", True])
def test_impossible_numbers_are_refused(torch_with, number):
    with pytest.raises(ConfigError, match=f"threads must be a whole number from 1 on, or None, not {number!r}"):
        m2d_embed.load_model(device="cpu", threads=number)
    assert torch_with == [8]


def test_threads_are_told_with_the_reason(monkeypatch, torch_with):
    assert threads.describe() == "8: one for each core that this process may use"
    torch_with.append(3)
    assert threads.describe() == "3: torch's own number, or one that was given to torch.set_num_threads"
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    assert threads.describe() == "3: MKL_NUM_THREADS=3"
    threads.choose_threads(5)
    assert threads.describe() == "5: as asked for"
    torch_with.append(3)
    assert threads.describe() == "3: MKL_NUM_THREADS=3"


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        (1.5, "2: this container's CPU quota is 1.5 cores"),
        (None, "8: this process may use no more cores"),
        (12.0, "8: this process may use no more cores"),
    ],
)
def test_fewer_threads_are_told_with_the_reason(monkeypatch, torch_with, quota, expected):
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    torch_with.append(16)
    threads.choose_threads(None)
    assert threads.describe() == expected


def test_processors_that_share_a_core_count_once(tmp_path):
    tree(
        tmp_path,
        {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 2},{n % 2 + 2}\n" for n in range(4)},
    )
    assert threads._cores_without_hyperthreads(tmp_path) == 2
    assert threads._cores_without_hyperthreads(tmp_path / "none") == os.cpu_count()


LOADED = """
import torch, m2d_embed

model = m2d_embed.load_model(device="cpu", threads=3)
assert torch.get_num_threads() == 3
m2d_embed.load_model(device="cpu")
assert torch.get_num_threads() == 3
torch.set_num_threads(1)
expected = model.encode(list(torch.rand(2, 48_000, generator=torch.Generator().manual_seed(0))))
model = m2d_embed.M2D.from_pretrained(device="cpu", threads=2)
assert torch.get_num_threads() == 2
found = model.encode(list(torch.rand(2, 48_000, generator=torch.Generator().manual_seed(0))))
print(abs(found - expected).max() < 1e-5)
"""


def test_a_model_is_loaded_with_a_number_of_threads():
    ended = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=300)
    assert ended.stdout == "True\n", ended.stderr


@pytest.mark.parametrize("command", ["embed", "tag", "zero-shot", "similar", "plot", "probe"])
def test_commands_take_a_number_of_threads(command):
    ended = CliRunner().invoke(app, [command, "--threads", "0"])
    assert ended.exit_code == 2 and "--threads" in ended.output


def test_embed_computes_with_as_many_threads(tmp_path):
    script = (
        "import sys, torch; from m2d_embed.cli import app; app(standalone_mode=False); print(torch.get_num_threads())"
    )
    command = [sys.executable, "-c", script, "embed", DATA / "sounds" / "alarm-clock-elapsed.oga"]
    ended = subprocess.run([*command, "--threads", "3", "-o", tmp_path / "x.npz"], capture_output=True, text=True)
    assert ended.stdout.endswith("\n3\n"), ended.stderr


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
