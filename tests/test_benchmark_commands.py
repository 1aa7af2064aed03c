"""The commands that tables of results are signed with are those that made them."""

import json
from pathlib import Path

import pytest
from conftest import SHARED

from benchmarks import finetuning, quality
from benchmarks.quality import set_name, shown
from m2d_embed.labelled.clips import read_labelled


@pytest.mark.parametrize(
    "given, name, expected",
    [
        ("../shared/data/esc50/metadata.csv", "esc50", "DATA/esc50/metadata.csv"),
        ("sounds/birds.csv", "birds", "DATA/birds.csv"),
        ("sounds/by-label", "by-label", "DATA/by-label"),
    ],
)
def test_a_set_is_shown_as_it_was_given(given, name, expected):
    assert (set_name(Path(given)), shown(Path(given))) == (name, expected)


@pytest.mark.parametrize("file", [file for file in (quality.RESULT, finetuning.RESULT) if file.exists()])
@pytest.mark.skipif(not SHARED.exists(), reason="the labelled sets lie outside the project")
def test_the_labelled_sets_of_checked_in_commands_can_be_read(file):
    results = json.loads(file.read_text())
    commands = [
        part["command"] for part in [results, *results.values()] if isinstance(part, dict) and "command" in part
    ]
    sets = [word for command in commands for word in command.split() if word.startswith("DATA/")]
    assert sets
    for word in sets:
        assert len(read_labelled(SHARED / "data" / word.removeprefix("DATA/")).label_names) > 1
