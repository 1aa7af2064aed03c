"""The documented loop works as it is, in a few lines, and its model is one that `tag` takes."""

import csv
import inspect

import pytest
import torch
from conftest import DATA
from typer.testing import CliRunner

import m2d_embed
from m2d_embed import cli
from m2d_embed.finetune import example


@pytest.fixture
def table(tmp_path):
    with (tmp_path / "digits.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "label", "split"])
        for file in sorted((DATA / "digits").glob("*.opus")):
            digit, speaker, _ = file.stem.split("_")
            writer.writerow([file, {"3": "three", "7": "seven"}[digit], "test" if speaker == "theo" else "train"])
    return tmp_path / "digits.csv"


def test_the_example_is_short():
    assert len(inspect.getsource(example).splitlines()) < 60


def test_it_learns_and_its_model_tags(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "EPOCHS", 6)
    monkeypatch.setattr(example, "SECONDS", 0.6)
    accuracy = example.main(table, tmp_path / "model")
    assert 0 <= accuracy <= 1
    losses = [float(line.rsplit(" ", 1)[1]) for line in capsys.readouterr().err.splitlines() if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    model = m2d_embed.M2D.from_pretrained(tmp_path / "model")
    assert model.config.head.labels == ("seven", "three")
    with torch.no_grad():
        before = m2d_embed.M2D.from_pretrained()
        assert not torch.equal(model.encoder.blocks[0].attn.qkv.weight, before.encoder.blocks[0].attn.qkv.weight)
    clip = DATA / "digits" / "3_jackson_0.opus"
    printed = CliRunner().invoke(cli.app, ["tag", str(clip), "--model", str(tmp_path / "model")])
    assert printed.exit_code == 0, printed.output
    assert printed.stdout.splitlines()[1].endswith("three")
    scores = [float(line.split()[0]) for line in printed.stdout.splitlines()[1:]]
    assert sum(scores) == pytest.approx(1, abs=1e-3)
