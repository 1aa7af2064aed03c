"""Which kernels are chosen: by what the processor says, what the system grants, and what a child process has tried."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m2d_embed.backends import native
from m2d_embed.backends.native import library, probe

AVX2 = "avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq"
BF16 = f"{AVX512} avx512_bf16 avx512_vnni"
AMX = f"{BF16} amx_tile amx_bf16 amx_int8"
EVERYTHING = f"{AMX} avx_vnni model_00000000 hypervisor"
DOT = "asimd asimddp bf16 i8mm"

ON_AVX2 = {"fp32": "avx2", "bf16": "avx2", "int8": "avx2"}
ON_AVX512 = {"fp32": "avx512", "bf16": "avx512", "int8": "avx512"}
ON_BF16 = {"fp32": "avx512", "bf16": "avx512_bf16", "int8": "avx512_bf16"}
ON_AMX = {"fp32": "avx512", "bf16": "amx", "int8": "amx"}

#: In place of the child's program: functions whose name has a word of its first line end it, or are wrong.
FAKE_CHILD = """
import os, signal, sys
DEADLY, WRONG = {deadly!r}, {wrong!r}
open({log!r}, "a").write(" ".join(sys.argv[2::2]) + "\\n")
print("ready", flush=True)
for name in sys.argv[2::2]:
    if any(word in name for word in DEADLY):
        os.kill(os.getpid(), signal.SIGILL)
    print(int(not any(word in name for word in WRONG)), flush=True)
"""


class Machine:
    """A library on a processor that is not here, and children that do not run it."""

    def __init__(self, monkeypatch, folder: Path):
        self._monkeypatch, self._log = monkeypatch, folder / "children"
        (folder / "kernels.so").write_text("a library")
        self.kernels = library.Kernels(None, None, folder / "kernels.so")
        self.cache = folder / "cache" / "kernels.json"
        monkeypatch.setenv("M2D_EMBED_CACHE", str(folder / "cache"))
        monkeypatch.delenv("M2D_EMBED_ISA", raising=False)
        monkeypatch.setattr(library, "kernels", lambda: self.kernels)
        self.has(EVERYTHING)
        self.children_fail()

    def has(self, features: str, grants_amx: bool = True) -> None:
        self._monkeypatch.setattr(self.kernels, "features", lambda: set(features.split()), raising=False)
        self._monkeypatch.setattr(self.kernels, "request_amx", lambda: grants_amx, raising=False)

    def children_fail(self, deadly=(), wrong=()) -> None:
        self._monkeypatch.setattr(probe, "_CHILD", FAKE_CHILD.format(deadly=deadly, wrong=wrong, log=str(self._log)))

    def children(self) -> list[list[str]]:
        """What each child so far was told to try."""
        return [line.split() for line in self._log.read_text().splitlines()] if self._log.exists() else []

    def available(self):
        return dict(library.available.__wrapped__())


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


# --- what the processor says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "granted", "expected"),
    [
        ("", False, {}),
        ("avx2", False, {}),
        ("fma", False, {}),
        (AVX2, False, ON_AVX2),
        (f"{AVX2} avx_vnni", False, ON_AVX2 | {"int8": "avx_vnni"}),
        ("avx512f avx512bw avx512vl avx512dq", False, {}),
        (AVX512, False, ON_AVX512 | {"int8": "avx2"}),
        (f"{AVX512} avx_vnni", False, ON_AVX512 | {"int8": "avx_vnni"}),
        (f"{AVX512} avx512_vnni", False, ON_AVX512),
        (f"{AVX512} avx512_bf16", False, ON_BF16 | {"int8": "avx2"}),
        (BF16, False, ON_BF16),
        (AMX, True, ON_AMX),
        (AMX, False, ON_BF16),
        (AMX.replace("amx_int8", ""), True, ON_AMX | {"int8": "avx512_bf16"}),
        (AMX.replace("avx512_vnni", ""), False, ON_BF16 | {"int8": "avx2"}),
        ("asimd", False, {"fp32": "neon", "bf16": "neon", "int8": "neon"}),
        (DOT, False, {"fp32": "neon", "bf16": "neon", "int8": "neon_dot"}),
    ],
)
def test_what_computes_on_which_processor(machine, features, granted, expected):
    """The system may not grant the use of the matrix unit."""
    machine.has(features, granted)
    assert machine.available() == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("", ON_AMX),
        ("amx", ON_AMX),
        ("avx512_bf16", ON_BF16),
        ("avx512_vnni", ON_AVX512),
        ("AVX512", ON_AVX512 | {"int8": "avx2"}),
        ("avx_vnni", ON_AVX2 | {"int8": "avx_vnni"}),
        (" avx2 ", ON_AVX2),
        ("neon", {}),
        ("off", {}),
    ],
)
def test_a_variable_limits_what_is_used_of_the_processor(machine, monkeypatch, limit, expected):
    """And what is tried: nothing beyond it."""
    monkeypatch.setenv("M2D_EMBED_ISA", limit)
    assert machine.available() == expected
    names = [f"m2d_{library.functions_of(kind, unit)}_probe" for kind, unit in expected.items()]
    assert machine.children() == ([names] if expected else [])


@pytest.mark.parametrize("limit", ["neon", "neon_dot"])
def test_the_variable_on_arm(machine, monkeypatch, limit):
    machine.has(DOT)
    monkeypatch.setenv("M2D_EMBED_ISA", limit)
    assert machine.available() == {"fp32": "neon", "bf16": "neon", "int8": limit}


def test_the_matrix_unit_is_not_asked_for_beyond_the_limit(machine, monkeypatch):
    monkeypatch.setenv("M2D_EMBED_ISA", "avx512_bf16")
    monkeypatch.setattr(machine.kernels, "request_amx", lambda: pytest.fail("asked"))
    assert machine.available() == ON_BF16


@pytest.mark.skipif(native.kernels() is None, reason="no kernels were built")
def test_the_processor_says_what_the_system_says():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = {"flags", "Features"}
    listed = next((set(line.partition(":")[2].split()) for line in lines if line.split(":")[0].strip() in names), None)
    if listed is None:
        pytest.skip("no /proc/cpuinfo")
    known = set().union(*library._LIMITS.values())
    assert native.kernels().features() & known == listed & known
    assert ("hypervisor" in native.kernels().features()) == ("hypervisor" in listed)


@pytest.mark.skipif(native.kernels() is None, reason="no kernels were built")
def test_names_beyond_the_room_for_them_are_left_out():
    names = ctypes.create_string_buffer(b"?" * 64, 64)
    for size in (1, 4, 12, 20):
        native.kernels().library.m2d_processor(names, ctypes.c_int64(size))
        assert len(names.value) < size and set(names.value.decode().split()) <= native.kernels().features()
        assert names.raw[size:].strip(b"?") == b""


# --- what is tried ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deadly", "expected", "children"),
    [
        (["avx512_tiles"], ON_AMX, 1),
        (["amx"], ON_BF16, 4),  # two that it kills, what was left, then what takes its place
        (["avx512_float"], ON_AMX | {"fp32": "avx2"}, 3),
        (["amx", "avx512"], ON_AVX2 | {"int8": "avx_vnni"}, None),
        (["amx", "avx"], {}, None),
    ],
)
def test_units_that_kill_a_process_are_not_used(machine, caplog, deadly, expected, children):
    machine.children_fail(deadly=deadly)
    assert machine.available() == expected
    assert children is None or len(machine.children()) <= children
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (expected != ON_AMX)
    if warned:
        assert "M2D_EMBED_ISA" in warned[0] and "by SIGILL" in warned[0]
        for kind in expected.keys() | ON_AMX.keys():
            assert (f"{kind} {ON_AMX[kind]} ends" in warned[0]) == (expected.get(kind) != ON_AMX[kind])


def test_units_that_give_wrong_numbers_are_not_used(machine, caplog):
    machine.children_fail(wrong=["amx"])
    assert machine.available() == ON_BF16
    assert len(machine.children()) == 2
    assert "not used: bf16 amx gives wrong numbers; int8 amx gives wrong numbers." in caplog.text


def test_nothing_is_tried_twice_on_a_machine(machine, caplog):
    machine.children_fail(deadly=["avx512_float"])
    expected = machine.available()
    before = len(machine.children())
    assert machine.available() == expected and len(machine.children()) == before
    assert caplog.text.count("fp32 avx512 ends the process by SIGILL") == 2  # by each process


@pytest.mark.parametrize("changed", ["library", "processor", "system"])
def test_another_machine_or_library_is_tried_anew(machine, monkeypatch, changed):
    machine.available()
    if changed == "library":
        machine.kernels.file.write_text("another")
    elif changed == "processor":
        machine.has(EVERYTHING.replace("model_00000000", "model_00000001"))
    else:
        monkeypatch.setattr(probe.platform, "release", lambda: "another")
    assert machine.available() == ON_AMX and len(machine.children()) == 2
    assert machine.available() == ON_AMX and len(machine.children()) == 2
    assert len(json.loads(machine.cache.read_text())) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"a": 1}', b'{"a": {"b": 1}}', b"null"])
def test_a_damaged_cache_is_made_anew(machine, content):
    machine.cache.parent.mkdir()
    machine.cache.write_bytes(content)
    for _ in range(2):
        assert machine.available() == ON_AMX and len(machine.children()) == 1


def test_results_of_another_type_for_this_machine(machine):
    machine.available()
    (key,) = json.loads(machine.cache.read_text())
    machine.cache.write_text(json.dumps({key: dict.fromkeys(machine.children()[0])}))
    assert machine.available() == ON_AMX and len(machine.children()) == 2


def test_a_cache_that_cannot_be_written(machine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M2D_EMBED_CACHE", str(tmp_path / "file" / "folder"))
    for count in (1, 2):
        assert machine.available() == ON_AMX and len(machine.children()) == count


def test_the_cache_does_not_grow_for_ever(machine):
    for number in range(40):
        machine.has(f"{AVX2} model_{number}")
        probe._keep(probe._machine(machine.kernels.file, machine.kernels.features()), {})
    assert len(json.loads(machine.cache.read_text())) == probe._MOST_MACHINES


@pytest.mark.parametrize(
    "program",
    ["", None, "/usr/bin/an-editor-with-python-in-it", "/no/such/folder/python3", "python-that-says-nothing"],
)
def test_without_a_child_the_processor_is_believed(machine, monkeypatch, tmp_path, caplog, program):
    if program == "python-that-says-nothing":
        (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "python").chmod(0o755)
        program = str(tmp_path / "python")
    monkeypatch.setattr(sys, "executable", program)
    assert machine.available() == ON_AMX
    assert machine.children() == [] and not caplog.records
    assert not machine.cache.exists() or machine.available() == ON_AMX


def test_a_child_that_does_not_end(machine, monkeypatch, caplog):
    monkeypatch.setattr(probe, "_CHILD", "import time\nprint('ready', 1, sep='\\n', flush=True)\ntime.sleep(600)")
    monkeypatch.setattr(probe, "_SECONDS", 1)
    trials = [probe.Trial("first", 4), probe.Trial("second", 4)]
    found = probe.faults(machine.kernels.file, [], trials)
    assert found == {trials[1]: "does not end within 1 s"}
    (kept,) = json.loads(machine.cache.read_text()).values()
    assert kept == {"first 4": ""}  # the machine may have been busy


@pytest.mark.skipif(native.kernels() is None, reason="no kernels were built")
@pytest.mark.parametrize(
    ("kind", "unit"), [(kind, unit) for kind, units in library._FEATURES.items() for unit in units]
)
def test_a_real_child_tells_what_the_processor_cannot_do(monkeypatch, tmp_path, kind, unit):
    """Each unit by its own self-test: right numbers where it can run, and else it ends the child alone."""
    compiled = native.kernels()
    name = f"m2d_{library.functions_of(kind, unit)}_probe"
    if not hasattr(compiled.library, name):
        pytest.skip("not of this kind of processor")
    monkeypatch.setenv("M2D_EMBED_CACHE", str(tmp_path))
    can_run = library._FEATURES[kind][unit] <= compiled.features() and (unit != "amx" or compiled.request_amx())
    found = compiled.faults({kind: unit})
    assert found == {} if can_run else "ends the process by SIG" in found[kind]


LIAR = """
import m2d_embed, torch
from m2d_embed.backends.native import library
compiled = library.kernels()
features = compiled.features() | library._AMX | {"amx_int8", "avx512_vnni", "avx_vnni"}
compiled.features, compiled.request_amx = lambda: features, lambda: True
print(*m2d_embed.load_model(device="cpu").encode([torch.ones(8000)]).shape, dict(library.available()))
"""


@pytest.mark.skipif(native.kernels() is None or "avx2" not in native.available().values(), reason="needs AVX2 at most")
def test_a_processor_that_lies_costs_a_warning(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "M2D_EMBED_ISA"}
    ended = subprocess.run(
        [sys.executable, "-c", LIAR],
        env=environment | {"M2D_EMBED_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"1 1920 {ON_AVX2}\n"
    assert ended.stderr.count("M2D_EMBED_ISA") == 1 and "bf16 amx ends the process by SIGILL" in ended.stderr
