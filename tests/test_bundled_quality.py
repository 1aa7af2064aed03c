"""Are the bundled weights as good as the README says? A damaged file might load, and be worth nothing."""

import json

import numpy as np
import pytest
from conftest import DATA, SHARED

from benchmarks.quality import RESULT, SCORES
from m2d_embed import M2D
from m2d_embed.evaluate.probes import linear_probe_accuracy
from m2d_embed.labelled.clips import read_labelled

CLOSE = 1.0  # percent: other processors round otherwise, and a clip or two go over to another label


def published(name):
    scores = json.loads(RESULT.read_text())[SCORES]
    return {row: sets[name]["linear"]["accuracy"][0] for row, sets in scores.items()}


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    "name", ["emodb", pytest.param("fsdd", marks=pytest.mark.slow), pytest.param("esc50", marks=pytest.mark.slow)]
)
def test_a_linear_probe_has_the_accuracy_that_is_published(name):
    clips = read_labelled(SHARED / "data" / name / "metadata.csv")
    model = M2D.from_pretrained()
    scenes = np.asarray(model.encode(clips.files))
    accuracy, said = 100 * linear_probe_accuracy(scenes, clips), published(name)
    assert accuracy == pytest.approx(said["m2d-embed, bundled"], abs=CLOSE)
    assert accuracy > said["log-mel mean and std"] + CLOSE
    assert accuracy > said["random weights"] + CLOSE
    assert accuracy > said["../shared/seed-weights"] + CLOSE


def test_speech_is_nearer_to_speech_than_to_other_sounds():
    model = M2D.from_pretrained()
    files = sorted((DATA / "digits").glob("*.opus")) + sorted((DATA / "sounds").glob("*.oga"))
    scenes = np.asarray(model.encode(files))
    unit = (scenes - scenes.mean(0)) / np.linalg.norm(scenes - scenes.mean(0), axis=1, keepdims=True)
    is_speech = np.array([file.parent.name == "digits" for file in files])
    similar = unit @ unit.T
    np.fill_diagonal(similar, -1)
    assert (is_speech[similar.argmax(1)] == is_speech).all()
