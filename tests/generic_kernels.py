"""The kernels in the compiler's own vectors (``native/vec_generic.h``), which run on any processor.

Two are units of their own, which the package never chooses: "generic", with levels of int8 in 16 bits, as on AVX2 and
NEON, and "generic_bytes", in 8 bits, as for NEON's dot products. Others stand for AVX-512, whose levels have an offset,
and the matrix unit: their instructions are emulated (``native/generic.h``).

python tests/generic_kernels.py    # compile them with sanitizers, and run all of them on small and odd shapes
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from m2d_embed.backends import native, selection
from m2d_embed.backends.native import Arithmetic, NativeBlocks, NativeLogMel, Unit, library, make_tokens
from m2d_embed.backends.native.library import Kernels
from m2d_embed.backends.selection import Capabilities
from m2d_embed.config import ModelConfig
from m2d_embed.model.encoder import Block, Encoder
from m2d_embed.model.frontend import LogMel

COMPILER = next(filter(shutil.which, ("gcc", "cc", "clang")), None)
SOURCES = Path(native.__file__).parent
EMULATED_AMX = Path(__file__).with_name("amx_emulation.h")
SANITIZE = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
_EMULATED_AVX512 = (
    "-UM2D_GENERIC",
    "-D__AVX512F__",
    "-D__AVX512VNNI__",
    f"-I{Path(__file__).with_name('avx512_emulation')}",
)
#: What is compiled: a source, and what it is told.
_FILES = (
    ("abi.c",),
    ("processor.c",),
    ("blocks.c", "-DM2D_NAME=generic_float"),
    ("blocks.c", "-DM2D_NAME=generic_int8", "-DM2D_INT8"),
    ("blocks.c", "-DM2D_NAME=generic_bytes_int8", "-DM2D_INT8", "-DM2D_BYTES"),
    ("blocks.c", "-DM2D_NAME=avx512_float", *_EMULATED_AVX512),
    ("blocks.c", "-DM2D_NAME=avx512_int8", "-DM2D_INT8", *_EMULATED_AVX512),
    ("log_mel.c", "-DM2D_NAME=generic"),
    ("log_mel.c", "-DM2D_NAME=avx512", *_EMULATED_AVX512),
    ("avx512.c",),
    ("amx.c", "-include", str(EMULATED_AMX)),
)
#: The units that the library has for each kind.
GENERIC = {
    "fp32": ("generic", "avx512"),
    "bf16": ("generic", "avx512", "amx", "avx512_bf16"),
    "int8": ("generic", "generic_bytes", "avx512", "amx", "avx512_bf16"),
}


def compile_generic(folder: Path, *flags: str, sources: Path = SOURCES, compiler: str | None = COMPILER) -> Path:
    """Compile all kernels, the matrix unit emulated; what ``folder`` has of the same sources and flags is not redone.

    -O1 takes half a minute; more takes minutes, as a vector is several registers here.
    """
    assert compiler is not None
    # How such vectors are handed over differs between compilers' settings, but these files are all compiled alike.
    usual = ["-std=gnu11", "-O1", "-fPIC", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi", "-DM2D_GENERIC"]
    if platform.machine() == "x86_64":
        usual += ["-mavx2", "-mfma"] if _has_avx2() else []
    command = [compiler, *usual, *flags, f"-I{sources}"]
    texts = [
        file.read_bytes()
        for file in sorted([*sources.glob("*.[ch]"), *Path(__file__).parent.rglob("*emulation*/*.h"), EMULATED_AMX])
    ]
    library = folder / f"{hashlib.sha256(b''.join([*texts, repr(command).encode()])).hexdigest()[:16]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as place:

        def compile_one(file: tuple[str, ...]) -> str:
            source, *told = file
            target = str(Path(place) / f"{_FILES.index(file)}.o")
            subprocess.run([*command, *told, "-c", str(sources / source), "-o", target], check=True)
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, _FILES))
        linked = Path(place) / "kernels.so"
        subprocess.run([compiler, *flags, "-shared", *objects, "-o", str(linked)], check=True)
        linked.replace(library)
    return library


def use(monkeypatch: pytest.MonkeyPatch, units: Mapping[Arithmetic, Unit], kernels: Kernels) -> None:
    """Have the package take these kernels, of these kinds and units, for all that there are on this machine."""
    for module in (native.blocks, native.log_mel, native.tokens):
        monkeypatch.setattr(module, "kernels", lambda: kernels)
        monkeypatch.setattr(module, "available", lambda: units)
    here = selection.capabilities()
    monkeypatch.setattr(selection, "capabilities", lambda: Capabilities(units, here.onednn, here.modules))


def units_here() -> dict[Arithmetic, list[Unit]]:
    """All units of this machine that there are compiled kernels for, and not only the fastest."""
    compiled = native.kernels()
    flags = compiled.features() if compiled else set()
    if compiled and not (flags >= library._AMX and compiled.request_amx()):
        flags = flags - {"amx_tile"}
    return {
        kind: [unit for unit, features in units.items() if flags and features <= flags]
        for kind, units in library._FEATURES.items()
    }


def _has_avx2() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and {"avx2", "fma"} <= set(cpuinfo.read_text().split())


# --- under sanitizers -------------------------------------------------------------------------------------------------

_SMALL = ModelConfig(embed_dim=64, depth=2, num_heads=2, input_size=(80, 112), patch_size=(16, 16))


def run_sanitized(folder: Path) -> subprocess.CompletedProcess[str]:
    """This file as a program, with the sanitizers' runtime loaded before all else."""
    assert COMPILER is not None
    library = compile_generic(folder, *SANITIZE)
    ask = [COMPILER, "-print-file-name=libasan.so"]
    runtime = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    settings = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(
        [sys.executable, __file__, str(library)],
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )


def main(file: Path) -> None:
    """Run every kernel of a library on shapes that leave rests of all kinds, with several threads."""
    compiled = library.load(file)
    for module in (native.blocks, native.log_mel, native.tokens):
        module.kernels = lambda: compiled
    with torch.no_grad():
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for unit in GENERIC["fp32"]:
                run_front(unit)
            for kind, units in GENERIC.items():
                for unit in units:
                    run_blocks(kind, unit)


def run_front(unit: Unit) -> None:
    """The log-mel and tokens."""
    for module in (native.log_mel, native.tokens):
        module.available = lambda: {"fp32": unit}
    encoder, front_end = Encoder(_SMALL), LogMel(_SMALL)
    log_mel_of = NativeLogMel(front_end.window, front_end.filterbank, 160, 1e-7, (0.0, 1.0))
    for frames in (1, 17):
        found = log_mel_of(torch.randn(2, 400 + (frames - 1) * 160).unfold(-1, 400, 160))
        assert found.isfinite().all()
    projection, class_token = encoder.patch_embed.proj, encoder.cls_token
    assert make_tokens(torch.randn(3, 1, 80, 64), projection, class_token, encoder.pos_embed, 7).isfinite().all()


def run_blocks(kind: Arithmetic, unit: Unit) -> None:
    """Several of them, and one whose MLP is computed in parts."""
    native.blocks.available = lambda: {kind: unit}
    encoder = Encoder(_SMALL)
    for layer in filter(lambda module: isinstance(module, torch.nn.Linear), encoder.blocks.modules()):
        layer.to(torch.float32 if kind == "fp32" else torch.bfloat16)
    run = NativeBlocks(list(encoder.blocks), encoder.norm, kind)
    for windows, count in ((1, 1), (3, 21), (2, 36)):
        assert run(torch.randn(windows, count, 64), range(2)).isfinite().all()
    assert all(f.isfinite().all() for f in run.features(torch.randn(3, 36, 64), [0, 1], 5))
    in_parts = NativeBlocks([Block(64, 2, 1792, 1e-6)], None, kind)
    assert in_parts(torch.randn(2, 5, 64), range(1)).isfinite().all()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            ended = run_sanitized(Path(scratch))
        print(ended.stdout, ended.stderr, sep="")
        sys.exit(ended.returncode)
