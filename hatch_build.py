"""Compiles the kernels of ``m2d_embed/native`` into the wheel, where there is a C compiler for Linux on x86.

Without one the wheel is pure Python, and the package computes the same through oneDNN. ``CC`` names the compiler.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "m2d_embed/native/kernels.so"
_OLDEST_GLIBC = 17  # 2.17, of manylinux2014: older than what current wheels of torch ask for
_COMMON = (
    "-std=gnu11 -O3 -fPIC -fno-math-errno -mprefer-vector-width=512 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq"
)
_FLAGS = {
    "abi.c": "-std=gnu11 -O3 -fPIC",
    "fp32.c": _COMMON,
    "log_mel.c": _COMMON,
    "avx512.c": f"{_COMMON} -mavx512bf16 -mavx512vnni",
    "amx.c": f"{_COMMON} -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8",
}


class KernelsBuildHook(BuildHookInterface):
    """Adds the library to a wheel, editable or not, and names the platform in the wheel's tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, if it is a wheel and can be."""
        if self.target_name != "wheel" or sys.platform != "linux" or platform.machine() != "x86_64":
            return
        if not compile_kernels(Path(self.root)):
            return
        build_data["artifacts"].append(f"/{LIBRARY}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag(Path(self.root) / LIBRARY)}"


def platform_tag(library: Path) -> str:
    """Which systems it runs on (PEP 600): those whose C library has the symbols that it was linked to."""
    needed = [int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)", library.read_bytes())]
    if needed:
        return f"manylinux_2_{max(_OLDEST_GLIBC, *needed)}_x86_64"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def compile_kernels(root: Path) -> bool:
    """Write the library beside its sources; False, with the reason on stderr, if that is impossible."""
    (root / LIBRARY).unlink(missing_ok=True)  # an old one must not stand for these sources
    compiler = shlex.split(os.environ.get("CC", "")) or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
    if not compiler:
        print("m2d-embed: no C compiler, so no kernels; oneDNN takes their place", file=sys.stderr)
        return False
    with tempfile.TemporaryDirectory() as folder:
        objects = {source: str(Path(folder) / f"{source}.o") for source in _FLAGS}
        commands = [
            [*compiler, *flags.split(), "-c", str(root / "m2d_embed/native" / source), "-o", objects[source]]
            for source, flags in _FLAGS.items()
        ]
        library = str(Path(folder) / "kernels.so")
        commands.append([*compiler, "-shared", *objects.values(), "-o", library])
        try:
            for command in commands:
                subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            print(f"m2d-embed: the kernels do not compile, oneDNN takes their place:\n{reason}", file=sys.stderr)
            return False
        shutil.move(library, root / LIBRARY)
    return True
