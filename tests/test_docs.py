"""The code in README and docs: Python runs, commands have the options they are shown with, links lead somewhere."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer.main
from conftest import DATA

from m2d_embed import M2D
from m2d_embed.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = typer.main.get_command(app)
#: Pages whose code takes long, or packages of its own.
EXTRAS = {"export.md": ("onnx", "onnxruntime"), "many-machines.md": ("ray",), "benchmarks.md": ("sklearn",)}
SLOW = {"many-machines.md", "benchmarks.md"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def lines_of(page: Path) -> list[str]:
    """The commands of a page, without comments."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            found += [" ".join(shlex.split(part, comments=True)) for part in re.split(r" && |; ", line)]
    return [line for line in found if line]


def with_code() -> list[object]:
    marks = {page: [pytest.mark.slow] if page.name in SLOW else [] for page in PAGES if blocks(page, "python")}
    return [pytest.param(page, id=page.name, marks=found) for page, found in marks.items()]


@pytest.mark.parametrize("page", with_code())
def test_python_runs(page, tmp_path, monkeypatch):
    for module in EXTRAS.get(page.name, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(M2D, "push_to_hub", lambda self, repository: repository)
    sounds = sorted((DATA / "sounds").glob("*.oga"))[:4]
    for folder in ("sounds", "sounds/bells"):
        Path(folder).mkdir()
    for file in sounds:
        shutil.copy(file, "sounds/bells")
    shutil.copy(sounds[0], "a.wav")  # what a file is, its first bytes say
    shutil.copy(sounds[1], "b.flac")
    if page.name == "export.md":
        COMMAND.main(["export", "--onnx", "model.onnx"], standalone_mode=False)
    names = {
        "audio": torch.zeros(2, 16_000),
        "waveform": torch.zeros(2, 16_000, device=M2D.from_pretrained().device),
        "paths": [*map(str, sounds)] * 5,
        "labels": ["bell", "alarm"] * 10,
    }
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)


def commands() -> list[object]:
    found = {line: page for page in PAGES for line in lines_of(page) if line.startswith("m2d-embed ")}
    return [pytest.param(line, id=line) for line in found]


@pytest.mark.parametrize("line", commands())
def test_commands_exist_with_their_options(line):
    name, *arguments = shlex.split(line)[1:]
    command = COMMAND.commands[name]
    command.make_context(name, arguments)  # raises UsageError for what it does not take


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_run_exist(page):
    for module in re.findall(r"python -m ((?:benchmarks|m2d_embed)[\w.]*)", page.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(module.rstrip(".")), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_what_a_user_reads_is_about_the_user():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert "../shared" not in text, page
        shares = [float(share) for share in re.findall(r"\| (\d+)% \|", text)]
        assert all(share <= 100 for share in shares), page
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200
