"""Scenes made of the clips of a corpus."""

import csv
import json

import numpy as np
import pytest
import soundfile

from benchmarks.pretraining import scenes
from benchmarks.pretraining.targets import read_rows

RATE = scenes.RATE
HOURS = 24 * scenes.SECONDS / 3600


@pytest.fixture
def corpus(tmp_path):
    """A manifest of short and long clips of two kinds."""
    rng, rows = np.random.default_rng(0), []
    for number, (kind, seconds) in enumerate([("effects", 0.3), ("effects", 7.0), ("speech", 1.0), ("speech", 3.0)]):
        file = f"audio/{kind}-{number}.flac"
        (tmp_path / "audio").mkdir(exist_ok=True)
        soundfile.write(tmp_path / file, 0.1 * rng.standard_normal(round(seconds * RATE)), RATE)
        rows.append({"file": file, "seconds": f"{seconds}", "kind": kind, "package": f"p{number}", "version": "1"})
        rows[-1] |= {"member": f"m{number}", "licence": f"licence {number % 2}"}
    manifest = tmp_path / "manifest.csv"
    with manifest.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return manifest


def read(manifest):
    return {row["file"]: soundfile.read(manifest.parent / row["file"])[0] for row in read_rows(manifest)}


def test_scenes_join_the_clips(corpus, tmp_path):
    scenes.main(corpus, tmp_path / "both.csv", hours=HOURS, workers=1)
    rows = read_rows(tmp_path / "both.csv")
    clips, made = rows[:4], rows[4:]
    assert clips == read_rows(corpus)
    assert len(made) == 24
    assert {row["kind"] for row in made} == {"effects", "speech"}
    by_file = {row["file"]: row for row in clips}
    for row in made:
        audio, rate = soundfile.read(tmp_path / row["file"])
        assert (rate, len(audio)) == (RATE, scenes.SECONDS * RATE)
        assert float(row["seconds"]) == scenes.SECONDS
        assert 0.01 < np.abs(audio).max() < 0.95  # -25 to -1 dB
        sources = row["member"].split("; ")
        assert by_file[sources[0]]["kind"] == row["kind"]
        assert set(row["licence"].split(" and ")) == {by_file[source]["licence"] for source in sources}
    sounds = [audio.tobytes() for audio in read(tmp_path / "both.csv").values()]
    assert len(set(sounds)) == len(sounds)


def test_a_scene_depends_on_seed_and_number_alone(corpus, tmp_path):
    scenes.main(corpus, tmp_path / "few.csv", hours=HOURS / 4, workers=1)
    scenes.main(corpus, tmp_path / "many.csv", hours=HOURS / 2, workers=2)
    scenes.main(corpus, tmp_path / "other.csv", hours=HOURS / 4, seed=1, workers=1)
    few, many, other = (list(read(tmp_path / f"{name}.csv").values())[4:] for name in ("few", "many", "other"))
    assert (len(few), len(many), len(other)) == (6, 12, 6)
    for number in range(6):
        np.testing.assert_array_equal(few[number], many[number])
        assert not np.array_equal(few[number], other[number])


def test_what_is_there_is_kept(corpus, tmp_path):
    scenes.main(corpus, tmp_path / "both.csv", hours=HOURS / 4, workers=1)
    first, second = sorted((tmp_path / "both").rglob("*.flac"))[:2]
    before, text = first.stat().st_mtime_ns, (tmp_path / "both.csv").read_text()
    second.unlink()
    scenes.main(corpus, tmp_path / "both.csv", hours=HOURS / 4, workers=1)
    assert first.stat().st_mtime_ns == before
    assert second.exists()
    assert (tmp_path / "both.csv").read_text() == text


def test_overlapping_clips_are_in_no_scene(corpus, tmp_path):
    unwanted = "audio/effects-1.flac"
    overlaps = {"corpus": str(tmp_path / unwanted), "labelled": "x"}
    (tmp_path / "overlap.json").write_text(json.dumps({"same name": [], "same sound": [overlaps]}))
    scenes.main(corpus, tmp_path / "both.csv", hours=HOURS, without=tmp_path / "overlap.json", workers=1)
    rows = read_rows(tmp_path / "both.csv")
    assert len(rows) == 3 + 24
    assert not any(unwanted in row["file"] or unwanted in row["member"] for row in rows)


def test_manifest_of_another_folder_is_refused(corpus, tmp_path):
    with pytest.raises(SystemExit, match="must be in the folder"):
        scenes.main(corpus, tmp_path / "elsewhere" / "both.csv")


def test_clips_of_another_rate_are_named(corpus, tmp_path):
    soundfile.write(tmp_path / "audio" / "effects-0.flac", np.ones(4000) / 2, 8000)
    rows = scenes.by_kind_and_package(read_rows(corpus))
    with pytest.raises(SystemExit, match=r"effects-0\.flac: 8000 Hz"):
        scenes.Corpus(tmp_path, rows).read(np.random.default_rng(0), rows["effects"]["p0"][0])


def test_tilt_and_room():
    rng = np.random.default_rng(0)
    tone = np.sin(2 * np.pi * 2000 * np.arange(RATE) / RATE).astype(np.float32)
    louder = scenes.tilted(tone, 6.0)  # an octave above 1 kHz
    assert 20 * np.log10(louder.std() / tone.std()) == pytest.approx(6.0, abs=0.05)
    click = np.zeros(RATE // 10, np.float32)
    click[0] = 1
    echo = scenes.in_room(rng, click)
    assert len(echo) > len(click)
    assert echo[0] > 0.5
    energy = np.add.reduceat(echo[1:] ** 2, np.arange(0, len(echo) - 1, RATE // 50))
    assert energy[0] > energy[len(energy) // 2] > 0
