"""The kernels for 64-bit ARM where there is no such processor: cross compiled, and run by an emulator.

They are compared with the same in generic vectors, which test_native.py compares with the modules.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from generic_kernels import COMPILER

from m2d_embed.backends import native

CROSS = "aarch64-linux-gnu"
CROSS_COMPILER = f"{CROSS}-gcc"
EMULATOR = "qemu-aarch64"
MISSING = [tool for tool in (CROSS_COMPILER, EMULATOR) if shutil.which(tool) is None]
PROGRAM = Path(__file__).with_name("arm_kernels.c")
SOURCES = Path(native.__file__).parent
#: What the program calls the functions of each library by.
ARM = {"FLOAT": "neon_float", "LOG_MEL": "neon", "INT8": "neon_int8", "INT8_DOT": "neon_dot_int8"}
GENERIC = {"FLOAT": "generic_float", "LOG_MEL": "generic", "INT8": "generic_int8", "INT8_DOT": "generic_bytes_int8"}
#: How far results may be apart, as a share of their size: sums are rounded in another order, and a value that is then
#: rounded to another level of int8 changes more of them with every layer; levels are finer in 16 bits.
CLOSE = {"fp32": 1e-5, "bf16": 1e-5, "tokens": 1e-5, "log-mel": 1e-5, "int8": 1e-3, "int8 dot": 5e-3}

pytestmark = pytest.mark.skipif(
    bool(MISSING) or COMPILER is None, reason=f"needs {', '.join(MISSING) or 'a C compiler'} (cross compiler, emulator)"
)


@pytest.fixture(scope="module")
def arm_library(tmp_path_factory) -> Path:
    """As the build hook compiles it, without a warning."""
    root = tmp_path_factory.mktemp("arm")
    shutil.copytree(SOURCES, root / "m2d_embed/backends/native", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))
        import hatch_build

        patch.setenv("CC", f"{CROSS_COMPILER} -Wall -Wextra -Werror")
        target = hatch_build.compile_kernels(root)
        assert target == ("aarch64", "linux")
        assert hatch_build.platform_tag(root / hatch_build.LIBRARY, target) == "manylinux_2_17_aarch64"
        return root / hatch_build.LIBRARY


@pytest.fixture(scope="module")
def expected(generic_kernels, tmp_path_factory) -> Path:
    """The results of generic vectors."""
    folder, library = tmp_path_factory.mktemp("expected"), Path(generic_kernels.library._name)
    program = link(str(COMPILER), GENERIC, library, folder.with_suffix(".program"))
    run(["env", f"LD_LIBRARY_PATH={library.parent}", program, folder, "all"])
    return folder


def link(compiler: str, names: dict[str, str], library: Path, program: Path) -> Path:
    defined = [f"-D{name}={functions}" for name, functions in names.items()]
    usual = ["-std=gnu11", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    run([compiler, *usual, *defined, PROGRAM, library, "-lpthread", "-lm", "-o", program])
    return program


def run(command: list[str | os.PathLike]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(("processor", "which"), [("cortex-a53", "oldest"), ("max", "all")])
def test_arm_has_the_numbers_of_generic_vectors(arm_library, expected, tmp_path, processor, which):
    """On the oldest processors and those with dot products; the sums of the largest levels are exact.

    The program itself fails if a window depends on the others, or on the number of threads.
    """
    program = link(CROSS_COMPILER, ARM, arm_library, tmp_path / "program")
    found = tmp_path / "found"
    found.mkdir()
    emulator = [EMULATOR, "-cpu", processor, "-L", f"/usr/{CROSS}", "-E", f"LD_LIBRARY_PATH={arm_library.parent}"]
    run([*emulator, program, found, which])
    names = {file.name for file in expected.iterdir() if which == "all" or not file.name.startswith("int8 dot")}
    assert {file.name for file in found.iterdir()} == names and len(names) > 10
    for name in names:
        one, other = (np.fromfile(folder / name, np.float32) for folder in (expected, found))
        assert one.shape == other.shape and np.isfinite(other).all()
        if "largest" in name:
            np.testing.assert_array_equal(other, one)
        else:
            kernel = next(kernel for kernel in sorted(CLOSE, key=len, reverse=True) if name.startswith(kernel))
            assert np.linalg.norm(other - one) <= CLOSE[kernel] * np.linalg.norm(one), name
            assert np.abs(other - one).max() <= 2 * CLOSE[kernel] * np.abs(one).max(), name
