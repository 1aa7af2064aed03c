"""Kernels tried in a child process before they are used, as a hypervisor or emulator may lie about the processor.

What is found is kept in ``kernels.json`` in the package's cache, for this library on this processor and system.
"""

from __future__ import annotations

import hashlib
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from m2d_embed.files import cache_folder, write_json

_SECONDS = 60
_MOST_MACHINES = 32  # in the cache, which they may share over a network
_WRONG = "gives wrong numbers"
#: Signals that are about what was run, and not about the child's surroundings.
_DEADLY = ("SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGTRAP", "SIGABRT")
#: Arguments: the library, then functions, each followed by its own. It says when it has begun, and what each returns.
_CHILD = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print("ready", flush=True)
if any("amx" in name for name in sys.argv[2::2]):
    library.m2d_request_amx()
for name, size in zip(sys.argv[2::2], sys.argv[3::2]):
    print(library[name](int(size)), flush=True)
"""


class Trial(NamedTuple):
    """A self-test of the library."""

    function: str
    value_bytes: int  # of a weight

    @property
    def name(self) -> str:
        """By which the cache knows it."""
        return f"{self.function} {self.value_bytes}"


class _Ended(NamedTuple):
    """What became of a child."""

    passed: list[bool]  # by the trials that it came to the end of
    how: str


def faults(library: Path, features: Collection[str], trials: Sequence[Trial]) -> dict[Trial, str]:
    """Which of some self-tests fail on this machine, and how, in words.

    What cannot be tried, since there is no child to be had, does not fail.

    Args:
        library: the file.
        features: what the processor says that it has.
        trials: of the library.
    """
    machine = _machine(library, features)
    known = _read_cache().get(machine, {})
    untried = [trial for trial in trials if trial.name not in known]
    if untried:
        found = _try_all(library, untried)
        known |= found
        _keep(machine, {name: fault for name, fault in known.items() if _is_lasting(fault)})
    return {trial: known[trial.name] for trial in trials if known.get(trial.name)}


def _try_all(library: Path, trials: Sequence[Trial]) -> dict[str, str]:
    """The fault of each trial by its name, "" if it has none; one child more for each that ends one."""
    found: dict[str, str] = {}
    left = list(trials)
    while left:
        ended = _run_child(library, left)
        if ended is None:
            break
        for trial, passed in zip(left, ended.passed, strict=False):
            found[trial.name] = "" if passed else _WRONG
        left = left[len(ended.passed) :]
        if left:
            found[left.pop(0).name] = ended.how
    return found


def _run_child(library: Path, trials: Sequence[Trial]) -> _Ended | None:
    """Run trials until one ends the child; None if the child did not come to the first."""
    python = _python()
    if not python:
        return None
    arguments = [str(part) for trial in trials for part in trial]
    command = [python, "-I", "-S", "-c", _CHILD, str(library), *arguments]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_SECONDS
        )
        output, how = ended.stdout, _in_words(ended.returncode)
    except subprocess.TimeoutExpired as error:
        output, how = error.stdout or b"", f"does not end within {_SECONDS} s"
    except OSError:
        return None
    lines = output.decode().splitlines()
    return _Ended([line == "1" for line in lines[1:]], how) if lines[:1] == ["ready"] else None


def _python() -> str:
    """A Python to run; "" in a program that has Python in it, which would be started once more itself."""
    program = sys.executable or ""
    is_python = Path(program).name.lower().startswith(("python", "pypy")) and not getattr(sys, "frozen", False)
    return program if is_python else ""


def _in_words(status: int) -> str:
    if status >= 0:
        return f"ends the process with status {status}"
    try:
        return f"ends the process by {signal.Signals(-status).name}"
    except ValueError:
        return f"ends the process by signal {-status}"


def _is_lasting(fault: str) -> bool:
    return fault in ("", _WRONG) or fault.endswith(_DEADLY)


# --- the cache --------------------------------------------------------------------------------------------------------


def _machine(library: Path, features: Collection[str]) -> str:
    """What results hold for: the library's content, the processor, and the system that lends it."""
    facts = [*sorted(features), platform.system(), platform.release(), platform.machine()]
    return hashlib.blake2b(library.read_bytes() + "\n".join(facts).encode(), digest_size=16).hexdigest()


def _read_cache() -> dict[str, dict[str, str]]:
    """For each machine the fault of each trial, "" if it has none; nothing if there is no file, or it is damaged."""
    try:
        content = json.loads((cache_folder() / "kernels.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    machines = content.items() if isinstance(content, dict) else ()
    return {machine: found for machine, found in machines if _is_result(found)}


def _is_result(found: object) -> bool:
    return isinstance(found, Mapping) and all(isinstance(fault, str) for fault in found.values())


def _keep(machine: str, found: Mapping[str, str]) -> None:
    """Write it into the cache, as the newest, if that can be written."""
    others = {other: faults for other, faults in _read_cache().items() if other != machine}
    newest = list((others | {machine: dict(found)}).items())[-_MOST_MACHINES:]
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_json(cache_folder() / "kernels.json", dict(newest))
    except (OSError, RuntimeError):
        return
