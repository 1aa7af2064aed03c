"""``benchmarks.quality`` on a few real clips: what is measured again, and what is kept."""

import json
import shutil

import pytest
from conftest import DATA

from benchmarks import quality
from benchmarks.quality import MACHINES, SCORES
from benchmarks.render import quality_table
from m2d_embed.errors import ConfigError

BUNDLED = "m2d-embed, bundled"
ROWS = [BUNDLED, f"{BUNDLED}, mean alone", *quality.BASELINES]


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    """Six digits and six sounds in three folds."""
    monkeypatch.setenv("M2D_EMBED_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "some"
    folder.mkdir()
    digits, sounds = sorted((DATA / "digits").glob("*.opus")), sorted((DATA / "sounds").glob("*.oga"))[:6]
    for file in [*digits, *sounds]:
        shutil.copy(file, folder)
    rows = [f"{f.name},{label},{i % 3}" for files, label in ((digits, "d"), (sounds, "s")) for i, f in enumerate(files)]
    (folder / "metadata.csv").write_text("\n".join(["file,label,fold", *rows]) + "\n")
    return folder / "metadata.csv"


@pytest.fixture
def measured(labelled, tmp_path):
    output = tmp_path / "quality.json"
    quality.main([labelled], probe=["knn"], output=output)
    return output


def test_all_rows_and_one_of_them_again(labelled, measured, tmp_path):
    first = json.loads(measured.read_text())
    assert list(first[SCORES]) == list(first[MACHINES]) == ROWS
    assert first["sets"] == {"some": {"clips": 12, "labels": 2, "test folds": 3}}
    assert first["command"] == "python -m benchmarks.quality DATA/some/metadata.csv --probe knn"
    for row, values in zip(ROWS, (1920, 960, 160, 1920), strict=True):
        found = first[SCORES][row]["some"]
        assert found["dimensions"] == values
        value, low, high = found["knn"]["accuracy"]
        assert 0 <= low <= value <= high <= 100 and value > 50
    assert f"| {BUNDLED} | 1920 |" in quality_table(first)

    changed = json.loads(measured.read_text())
    changed[SCORES][BUNDLED]["some"]["knn"]["accuracy"] = [0.0, 0.0, 0.0]
    changed[SCORES]["random weights"]["some"]["knn"]["accuracy"] = [1.0, 1.0, 1.0]
    del changed[MACHINES]["log-mel mean and std"]
    changed[MACHINES]["random weights"] = {"cpu": "another"}
    changed["note"] = "by hand"
    measured.write_text(json.dumps(changed))
    quality.main([labelled], probe=["knn"], again=[BUNDLED], output=measured)
    second = json.loads(measured.read_text())
    assert list(second[SCORES]) == ROWS and second["note"] == "by hand"
    assert second[SCORES][BUNDLED] == first[SCORES][BUNDLED]
    assert second[SCORES]["random weights"] == changed[SCORES]["random weights"]
    assert second[MACHINES]["random weights"] == {"cpu": "another"} != second[MACHINES][BUNDLED]
    assert "log-mel mean and std" not in second[MACHINES]
    assert sorted(file.name for file in tmp_path.glob("quality*")) == ["quality.json"]


def test_rows_done_before_an_interruption_are_there(labelled, tmp_path, monkeypatch):
    output = tmp_path / "quality.json"
    with monkeypatch.context() as patch:
        patch.setitem(quality.BASELINES, "random weights", "no.such.module")
        with pytest.raises(ModuleNotFoundError):
            quality.main([labelled], probe=["knn"], output=output)
    assert list(json.loads(output.read_text())[SCORES]) == ROWS[:-1]
    quality.main([labelled], probe=["knn"], again=["random weights"], output=output)
    assert list(json.loads(output.read_text())[SCORES]) == ROWS


def test_what_cannot_be_measured_again(labelled, measured):
    before = measured.read_text()
    with pytest.raises(ConfigError, match=r"--again 'bundled': the rows are 'm2d-embed, bundled'"):
        quality.main([labelled], again=["bundled"], output=measured)
    with pytest.raises(ConfigError, match=r"nothing was measured yet of x"):
        quality.main([labelled], model=["x"], again=[BUNDLED], output=measured)
    with pytest.raises(ConfigError, match=r"nothing was measured yet of m2d-embed, bundled, mean alone, log-mel"):
        quality.main([labelled], again=[BUNDLED], output=measured.with_name("absent.json"))
    with pytest.raises(ConfigError, match=r"'m2d-embed, bundled, mean alone' has knn of some; .*, not linear, knn,"):
        quality.main([labelled], probe=["linear", "knn"], again=[BUNDLED], output=measured)
    labelled.write_text("".join(labelled.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match=r"measure all rows"):
        quality.main([labelled], again=[BUNDLED], output=measured)
    assert measured.read_text() == before
