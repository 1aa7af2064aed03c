"""The transformer for scikit-learn."""

import copy
import importlib
import pickle
import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from conftest import DATA, TINY, random_model

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import m2d_embed
from m2d_embed.adapters.sklearn import M2DFeatures
from m2d_embed.errors import AudioError, ConfigError, ModelNotFoundError, UnsupportedError

DIGITS = sorted((DATA / "digits").glob("*.opus"))
LABELS = [path.name[0] for path in DIGITS]

EXPECTED_FAILURES = {
    "check_estimators_dtypes": "it passes int64, which is refused: integer samples are scaled by their dtype, and no "
    "sound has that one",
}


@parametrize_with_checks([M2DFeatures(device="cpu")], expected_failed_checks=lambda estimator: EXPECTED_FAILURES)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.fixture
def saved(tmp_path):
    random_model(TINY).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_pipeline_on_paths():
    pipeline = make_pipeline(M2DFeatures(), LogisticRegression(max_iter=1000)).fit(DIGITS, LABELS)
    assert pipeline.predict([str(path) for path in DIGITS]).tolist() == LABELS


def test_grid_search_over_layers():
    pipeline = make_pipeline(M2DFeatures(), LogisticRegression())
    layers = [-1, 0, (3, 7)]
    search = GridSearchCV(pipeline, {"m2dfeatures__layers": layers}, cv=3, error_score="raise").fit(DIGITS, LABELS)
    assert search.best_params_["m2dfeatures__layers"] in layers
    assert len(set(search.predict_proba(DIGITS)[:, 0])) == len(DIGITS)


def test_embeddings_are_the_models(bundled):
    features = M2DFeatures().fit(DIGITS)
    embeddings = features.transform(DIGITS)
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, bundled.encode(DIGITS))
    assert len(features.get_feature_names_out()) == embeddings.shape[1] == 1920
    assert features.get_feature_names_out()[0] == "m2dfeatures0"


def test_kinds_of_input(bundled, noise):
    waves = noise(0.5, batch=3).numpy()
    expected = bundled.encode(list(waves))
    same = {
        "rows": waves,
        "list of arrays": list(waves),
        "tuple of tensors": tuple(torch.from_numpy(waves)),
        "lists of numbers": waves.tolist(),
        "float64": waves.astype(np.float64),
    }
    features = M2DFeatures().fit(waves)
    for kind, clips in same.items():
        np.testing.assert_allclose(features.transform(clips), expected, atol=1e-5, err_msg=kind)
    paths = {"str": [str(p) for p in DIGITS], "array of str": np.array([str(p) for p in DIGITS])}
    paths["array of objects"] = np.array(DIGITS, dtype=object)
    for kind, clips in paths.items():
        np.testing.assert_array_equal(features.transform(clips), bundled.encode(DIGITS), err_msg=kind)
    pcm = (waves * 32767).astype(np.int16)
    np.testing.assert_array_equal(features.transform(pcm), bundled.encode(list(pcm)))


def test_clips_of_any_length(bundled, noise):
    waves = [noise(seconds)[0].numpy() for seconds in (0.3, 4.0, 1.1)]
    features = M2DFeatures().fit(waves)
    np.testing.assert_array_equal(features.transform(waves), bundled.encode(waves))
    features.fit(waves[0][None])
    with pytest.raises(ValueError, match="features"):
        features.transform(waves[1][None])
    np.testing.assert_allclose(features.transform(list(waves[1][None])), bundled.encode([waves[1]]), atol=1e-5)
    assert features.fit(waves).transform(waves[1][None]).shape == (1, 1920)  # lists leave the length open


def test_parameters(saved, noise):
    clips = list(noise(1.0, batch=2).numpy())
    features = M2DFeatures(saved, layers=[0, 2], flat=True, batch_size=1, device="cpu", dtype="bf16")
    assert features.get_params()["layers"] == [0, 2]
    model = m2d_embed.load_model(str(saved), layers=[0, 2], flat=True, dtype="bf16")
    np.testing.assert_array_equal(features.fit_transform(clips), model.encode(clips, batch_size=1))
    for wrong, error in (({"layers": 3}, ConfigError), ({"model": "./nowhere"}, ModelNotFoundError)):
        with pytest.raises(error):
            clone(features).set_params(**wrong).fit(clips)
    with pytest.raises(ConfigError, match="batch_size"):
        M2DFeatures(saved, batch_size=0).fit(clips).transform(clips)


def test_the_model_is_loaded_once_and_never_copied(saved, noise, monkeypatch, tmp_path):
    loaded = []

    def load(*args, **options):
        loaded.append(args)
        return m2d_embed.load_model(*args, **options)

    monkeypatch.setattr("m2d_embed.adapters.sklearn.load_model", load)
    clips = list(noise(1.0).numpy())
    features = M2DFeatures(saved).fit(clips)
    expected = features.transform(clips)
    features.transform(clips)
    assert len(loaded) == 1
    joblib.dump(features, tmp_path / "features.joblib")
    copies = [pickle.loads(pickle.dumps(features)), copy.deepcopy(features), joblib.load(tmp_path / "features.joblib")]
    assert (tmp_path / "features.joblib").stat().st_size < 2_000
    assert len(loaded) == 1
    for number, again in enumerate(copies):
        np.testing.assert_array_equal(again.transform(clips), expected)
        again.transform(clips)
        assert len(loaded) == 2 + number
    with pytest.raises(NotFittedError):
        pickle.loads(pickle.dumps(M2DFeatures(saved))).transform(clips)
    with pytest.raises(NotFittedError):
        clone(features).transform(clips)


def test_bad_clips_are_named(tmp_path, noise):
    features = M2DFeatures().fit(DIGITS)
    (tmp_path / "text.wav").write_text("not audio")
    bad = noise(0.1, batch=2).numpy()
    bad[1, 5] = np.nan
    for clips, message in (
        ([*DIGITS, tmp_path / "text.wav"], "text.wav: not audio"),
        ([tmp_path / "gone.wav"], "gone.wav: no such file"),
        (list(bad), r"clips\[1\]: sample 5 is NaN"),
        (bad, r"X\[1\] has samples that are NaN"),
        ([DIGITS[0], 3], r"clips\[1\]: .* not int"),
        ([], "X is empty"),
        (str(DIGITS[0]), "X is a single path"),
        (np.array([[str(p)] for p in DIGITS]), r"table of paths, its shape is \(6, 1\)"),
    ):
        with pytest.raises(AudioError, match=message):
            features.transform(clips)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_data_frames(library):
    frames = pytest.importorskip(library, reason=f"{library} is not installed")
    features = M2DFeatures().set_output(transform=library)
    table = features.fit_transform(DIGITS)
    assert isinstance(table, frames.DataFrame)
    assert list(table.columns) == list(features.get_feature_names_out())
    paths = frames.Series([str(p) for p in DIGITS])
    np.testing.assert_array_equal(features.transform(paths).to_numpy(), table.to_numpy())


def test_without_scikit_learn(monkeypatch):
    monkeypatch.delitem(sys.modules, "m2d_embed.adapters.sklearn")
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(UnsupportedError, match=r"scikit-learn 1\.6 .*pip install 'm2d-embed\[eval\]'"):
        importlib.import_module("m2d_embed.adapters.sklearn")


def test_the_package_imports_no_adapter():
    code = "import m2d_embed, sys; print([m for m in sys.modules if m.split('.')[0] in ('sklearn', 'xares', 'evar')])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
