"""Fingerprints: a labelled clip is found inside another file, and nothing else is."""

import json

import numpy as np
import pytest
import soundfile

from benchmarks.pretraining import overlap

RATE = 16_000


def melody(seed, seconds=4.0):
    """Tones that begin and end at random, in a little noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    sound = 0.001 * rng.standard_normal(len(time))
    for start in np.arange(0, seconds, 0.1):
        shape = np.exp(-20 * (time - start)) * (time >= start)
        sound += 0.2 * shape * np.sin(2 * np.pi * rng.uniform(200, 6000) * time)
    return sound.astype(np.float32)


@pytest.fixture
def labelled(tmp_path):
    folder = tmp_path / "data" / "set"
    (folder / "audio").mkdir(parents=True)
    rows = ["file,label"]
    for seed in range(5):
        soundfile.write(folder / "audio" / f"clip-{seed}.wav", melody(seed), RATE)
        rows.append(f"audio/clip-{seed}.wav,{'xy'[seed % 2]}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    return folder


def test_finds_a_part_of_a_clip_elsewhere_quieter_and_after_a_lossy_codec(labelled, tmp_path):
    index = overlap.Index(overlap.labelled_files(labelled.parent))
    rng = np.random.default_rng(9)
    sound = 0.002 * rng.standard_normal(8 * RATE).astype(np.float32)
    sound[2 * RATE + 77 : 5 * RATE + 77] += 0.3 * melody(3)[RATE:]
    soundfile.write(tmp_path / "other.ogg", sound, RATE)
    [found] = index.search(tmp_path / "other.ogg")
    assert found.labelled.endswith("clip-3.wav")
    assert found.seconds == pytest.approx(1.0, abs=0.05)


def test_finds_nothing_in_other_sounds(labelled, tmp_path):
    index = overlap.Index(overlap.labelled_files(labelled.parent))
    for seed in range(10, 30):
        soundfile.write(tmp_path / "other.wav", melody(seed, 8.0), RATE)
        assert index.search(tmp_path / "other.wav") == []
    for sound in (np.zeros(3 * RATE), np.zeros(10), np.ones(100)):
        soundfile.write(tmp_path / "other.wav", sound, RATE)
        assert index.search(tmp_path / "other.wav") == []


def test_a_loop_that_fits_itself_anywhere_is_no_find(tmp_path):
    for name, times in (("a", 12), ("b", 20)):
        soundfile.write(tmp_path / f"{name}.wav", np.tile(melody(1, 0.512), times), RATE)
    assert overlap.Index([tmp_path / "a.wav"]).search(tmp_path / "b.wav") == []


def test_the_report_names_both_files(labelled, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    soundfile.write(corpus / "a.wav", melody(50), RATE)
    soundfile.write(corpus / "b.flac", melody(2), RATE)
    soundfile.write(corpus / "Clip-1.wav", melody(51), RATE)
    (corpus / "manifest.csv").write_text("file\na.wav\nb.flac\nClip-1.wav\n")
    overlap.main(corpus / "manifest.csv", labelled.parent, processes=1)
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == 3
    assert report["labelled clips"] == 5
    assert report["same name"] == [str(corpus / "Clip-1.wav")]
    [found] = report["same sound"]
    assert found["corpus"] == str(corpus / "b.flac")
    assert found["labelled"].endswith("clip-2.wav")
    assert found["share"] > 0.9
