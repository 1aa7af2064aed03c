"""Compiles the kernels of ``m2d_embed/backends/native`` into the wheel.

For Linux on x86-64 and 64-bit ARM, and macOS on ARM. ``CC`` names the compiler, which may be one for another of these
systems. Without one the wheel is pure Python, and the package computes the same through PyTorch.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "m2d_embed/backends/native/kernels.so"
_OLDEST_GLIBC = 17  # 2.17, of manylinux2014: older than what current wheels of torch ask for
_OLDEST_MACOS = 11  # the first one on ARM
_ALL = "-std=gnu11 -O3 -fPIC -fno-math-errno -ffp-contract=off"
_AVX2 = f"{_ALL} -mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mprefer-vector-width=512 -mavx512f -mavx512bw -mavx512vl -mavx512dq"
_NEON = f"{_ALL} -march=armv8-a"  # and no more, which compilers for macOS take for granted


class Unit(NamedTuple):
    """A source, compiled for an instruction set."""

    source: str
    flags: str
    name: str = ""  # in its functions' names
    int8: bool = False

    def command(self) -> list[str]:
        """What a compiler is given, without paths."""
        return [*self.flags.split(), *([f"-DM2D_NAME={self.name}"] if self.name else []), *["-DM2D_INT8"] * self.int8]


class Target(NamedTuple):
    """What a compiler compiles for."""

    machine: str
    system: str


TARGETS = (Target("x86_64", "linux"), Target("aarch64", "linux"), Target("aarch64", "darwin"))
#: What is compiled, by machine.
UNITS = {
    "x86_64": (
        Unit("abi.c", _ALL),
        Unit("processor.c", _ALL),
        Unit("blocks.c", _AVX2, "avx2_float"),
        Unit("blocks.c", _AVX2, "avx2_int8", int8=True),
        Unit("blocks.c", f"{_AVX2} -mavxvnni", "avx_vnni_int8", int8=True),
        Unit("blocks.c", _AVX512, "avx512_float"),
        Unit("blocks.c", f"{_AVX512} -mavx512vnni", "avx512_int8", int8=True),
        Unit("log_mel.c", _AVX2, "avx2"),
        Unit("log_mel.c", _AVX512, "avx512"),
        Unit("avx512.c", f"{_AVX512} -mavx512bf16 -mavx512vnni"),
        Unit("amx.c", f"{_AVX512} -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8"),
    ),
    "aarch64": (
        Unit("abi.c", _ALL),
        Unit("processor.c", _ALL),
        Unit("blocks.c", _NEON, "neon_float"),
        Unit("blocks.c", _NEON, "neon_int8", int8=True),
        Unit("blocks.c", f"{_ALL} -march=armv8.2-a+dotprod", "neon_dot_int8", int8=True),
        Unit("log_mel.c", _NEON, "neon"),
    ),
}


class KernelsBuildHook(BuildHookInterface):
    """Adds the library to a wheel, editable or not, and names the platform in the wheel's tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, if it is a wheel and can be."""
        if self.target_name != "wheel":
            return
        target = compile_kernels(Path(self.root))
        if target is None:
            return
        build_data["artifacts"].append(f"/{LIBRARY}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag(Path(self.root) / LIBRARY, target)}"


def platform_tag(library: Path, target: Target) -> str:
    """Which systems it runs on; on Linux (PEP 600) those whose C library has the symbols that it was linked to."""
    if target.system == "darwin":
        return f"macosx_{_OLDEST_MACOS}_0_arm64"
    needed = [int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)", library.read_bytes())]
    if needed:
        return f"manylinux_2_{max(_OLDEST_GLIBC, *needed)}_{target.machine}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def target_of(compiler: list[str]) -> Target | None:
    """What a compiler compiles for, or None if there are no kernels for that."""
    asked = subprocess.run([*compiler, "-dumpmachine"], check=True, capture_output=True, text=True)
    machine, _, rest = asked.stdout.strip().partition("-")
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return next((target for target in TARGETS if target.machine == machine and target.system in rest), None)


def compile_kernels(root: Path) -> Target | None:
    """Write the library beside its sources, and say what for; None, with the reason on stderr, where that cannot be."""
    (root / LIBRARY).unlink(missing_ok=True)  # an old one must not stand for these sources
    compiler = shlex.split(os.environ.get("CC", "")) or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
    if not compiler:
        print("m2d-embed: no C compiler, so no kernels; PyTorch takes their place", file=sys.stderr)
        return None
    try:
        target = target_of(compiler)
        if target is None:
            print(
                "m2d-embed: no kernels for what this compiler compiles for; PyTorch takes their place", file=sys.stderr
            )
            return None
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "kernels.so"
            for command in commands(compiler, target, root, library):
                subprocess.run(command, check=True, capture_output=True, text=True)
            shutil.move(library, root / LIBRARY)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        print(f"m2d-embed: the kernels do not compile, PyTorch takes their place:\n{reason}", file=sys.stderr)
        return None
    return target


def commands(compiler: list[str], target: Target, root: Path, library: Path) -> list[list[str]]:
    """What compiles and links them, with objects beside the library."""
    compiler = [*compiler, *([f"-mmacosx-version-min={_OLDEST_MACOS}.0"] if target.system == "darwin" else [])]
    units = UNITS[target.machine]
    objects = [str(library.with_name(f"{number}.o")) for number in range(len(units))]
    compiled = [
        [*compiler, *unit.command(), "-c", str(root / "m2d_embed/backends/native" / unit.source), "-o", to]
        for unit, to in zip(units, objects, strict=True)
    ]
    return [*compiled, [*compiler, "-shared", *objects, "-o", str(library)]]
