"""One commit of a public repository: fetched, and its files read as streams; nothing is ever checked out.

A commit's hash is that of all it holds, and git checks what it fetches against it. As there is no work tree, none of a
repository's hooks, filters or paths take effect.
"""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.corpus.containers import Entries
from benchmarks.corpus.errors import CorpusError


def fetch_commit(url: str, commit: str, folder: Path) -> None:
    """Fetch a commit alone into a git folder, unless it is there.

    Raises:
        CorpusError: if git cannot fetch it.
    """
    if folder.is_dir() and _run(folder, "cat-file", "-e", f"{commit}^{{tree}}").returncode == 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for arguments in (("init", "--quiet", "--bare"), ("fetch", "--quiet", "--depth", "1", url, commit)):
        result = _run(folder, *arguments)
        if result.returncode:
            raise CorpusError(f"git could not fetch {commit} of {url}: {_complaint(result)}.")


def list_paths(folder: Path, commit: str) -> list[str]:
    """Paths of the regular files of a commit, in the order of git; no symbolic links, no submodules.

    Raises:
        CorpusError: if git cannot read it.
    """
    listed = _read(folder, "ls-tree", "-r", "-z", "--full-tree", commit)
    paths = []
    for line in listed.split(b"\0")[:-1]:
        attributes, _, path = line.partition(b"\t")
        if attributes.startswith(b"100"):
            paths.append(path.decode("utf-8", "surrogateescape"))
    return paths


def read_files(folder: Path, commit: str, paths: Sequence[str]) -> Entries:
    """Files of a commit in a git folder.

    Raises:
        CorpusError: if git cannot read one.
    """
    for path in paths:
        yield path, io.BytesIO(_read(folder, "cat-file", "blob", f"{commit}:{path}"))


def _read(folder: Path, *arguments: str) -> bytes:
    result = _run(folder, *arguments)
    if result.returncode:
        raise CorpusError(f"{folder}: git cannot read {arguments[-1]!r}: {_complaint(result)}.")
    return result.stdout


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "GIT_TERMINAL_PROMPT": "0"}  # an error rather than a question
    command = [os.fsencode(word) for word in ("git", "--git-dir", str(folder), *arguments)]
    return subprocess.run(command, env=environment, capture_output=True, check=False)


def _complaint(result: subprocess.CompletedProcess[bytes]) -> str:
    said = result.stderr.decode(errors="replace").strip() or f"status {result.returncode} and no message"
    return said.splitlines()[-1].rstrip(".")
