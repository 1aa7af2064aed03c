"""Imports go one way: from the rooms at the end of this list to those before them."""

import ast
from pathlib import Path

import pytest

import m2d_embed

PACKAGE = Path(m2d_embed.__file__).parent
#: A room imports itself and what stands before it.
ROOMS = (
    ("errors",),
    ("config", "files", "extras"),
    ("audio", "backends"),
    ("model",),
    ("runtime", "checkpoints"),
    ("m2d",),
    ("hear", "labelled", "jobs", "export", "plots"),
    ("evaluate", "training", "adapters"),
    ("finetune", "pretrain"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST) -> list[str]:
    """The rooms that a module imports, anywhere in it."""
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names += [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module == "m2d_embed"
    ]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return [name.split(".")[1] for name in names if name.startswith("m2d_embed.")]


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    room = room_of(file)
    for other in imported(ast.parse(file.read_text(encoding="utf-8"))):
        if other in LEVEL:  # else a name of the package itself
            assert other == room or LEVEL[other] < LEVEL[room], f"{room} imports {other}"
