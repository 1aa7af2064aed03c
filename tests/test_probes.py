"""The linear, the nearest-neighbour and the MLP probe."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA

from m2d_embed.errors import ConfigError, UnsupportedError
from m2d_embed.evaluate import linear_probe, mlp_probe, probes
from m2d_embed.evaluate.linear_probe import choose_strength, fit_layer, linear_predictions
from m2d_embed.evaluate.mlp_probe import GRID, MlpSettings, mlp_predictions, num_trainings
from m2d_embed.evaluate.probes import (
    PROBES,
    embed_clips,
    knn_accuracy,
    knn_predictions,
    linear_probe_accuracy,
    probe_embeddings,
)
from m2d_embed.evaluate.scores import mean_average_precision, score_predictions
from m2d_embed.labelled.clips import LabelledClips

DIGITS = sorted((DATA / "digits").glob("*.opus"))


@pytest.fixture(autouse=True)
def small_mlp(monkeypatch):
    monkeypatch.setattr(mlp_probe, "_HIDDEN", 32)
    monkeypatch.setattr(mlp_probe, "_MAX_EPOCHS", 45)
    monkeypatch.setattr(mlp_probe, "_GRID_POINTS", 3)


def paths(count):
    return tuple(Path(f"{i}.wav") for i in range(count))


def clusters(labels, folds, dim=32, spread=1.0, seed=0):
    """Clips whose embeddings lie around one point a label."""
    rng = np.random.default_rng(seed)
    labels, folds = np.array(labels), np.array(folds)
    centres = rng.normal(size=(labels.max() + 1, dim)) + 5
    embeddings = (centres[labels] + spread * rng.normal(size=(len(labels), dim))).astype(np.float32)
    names = tuple(f"label{i}" for i in range(labels.max() + 1))
    return embeddings, LabelledClips(paths(len(labels)), labels, names, folds)


def many_clusters(num_labels=5, each=20, **kwargs):
    labels = np.repeat(np.arange(num_labels), each)
    return clusters(labels, np.arange(len(labels)) % 5, **kwargs)


def mixtures(count=200, dim=24, spread=0.3, seed=0):
    """Clips of any number of labels; an embedding is the sum of a direction for each."""
    rng = np.random.default_rng(seed)
    targets = rng.random((count, 4)) < [0.5, 0.3, 0.3, 0.2]
    directions = rng.normal(size=(4, dim))
    embeddings = (targets @ directions + spread * rng.normal(size=(count, dim))).astype(np.float32)
    return embeddings, LabelledClips(paths(count), targets, ("a", "b", "c", "d"), np.arange(count) % 4)


def accuracy(probe, embeddings, clips):
    (result,) = probe_embeddings(embeddings, clips, [probe])
    tested = clips.folds >= 0
    return float((result.scores[tested].argmax(axis=1) == clips.labels[tested]).mean())


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", PROBES)
def test_probes_tell_signal_from_noise(probe):
    embeddings, clips = many_clusters(spread=0.5)
    assert accuracy(probe, embeddings, clips) >= (0.9 if probe == "mlp" else 0.99)  # trained for a few epochs here
    middling = accuracy(probe, many_clusters(spread=1.5 if probe == "mlp" else 3.0)[0], clips)
    assert 0.3 < middling < 0.99
    noise = np.random.default_rng(1).normal(size=embeddings.shape).astype(np.float32)
    assert accuracy(probe, noise, clips) < 0.4


@pytest.mark.parametrize("probe", PROBES)
def test_probes_tell_signal_from_noise_in_several_labels(probe):
    embeddings, clips = mixtures()
    (result,) = probe_embeddings(embeddings, clips, [probe])
    assert result.scores.min() >= 0 and result.scores.max() <= 1
    assert mean_average_precision(clips.targets, result.scores) > (0.85 if probe == "knn" else 0.97)
    noise = np.random.default_rng(1).normal(size=embeddings.shape).astype(np.float32)
    (result,) = probe_embeddings(noise, clips, [probe])
    assert mean_average_precision(clips.targets, result.scores) < 0.55


@pytest.mark.parametrize("probe", PROBES)
def test_probes_never_see_the_test_labels(probe):
    # Each label is two clusters; those of the test part are exchanged between the labels, so all answers are wrong.
    labels = np.repeat([0, 1, 1, 0], 20)
    folds = np.repeat([-1, -1, 0, 0], 20)
    points = np.repeat([0.0, 1.0, 0.0, 1.0], 20)[:, None]
    embeddings = (points + 0.01 * np.random.default_rng(0).normal(size=(80, 4))).astype(np.float32)
    clips = LabelledClips(paths(80), labels, ("a", "b"), folds)
    assert accuracy(probe, embeddings, clips) == 0.0
    assert accuracy(probe, embeddings, replace(clips, labels=np.repeat([0, 1, 0, 1], 20))) == 1.0


@pytest.mark.parametrize("probe", PROBES)
def test_each_fold_is_judged_by_what_saw_only_the_others(probe):
    embeddings, clips = many_clusters(spread=3.0)
    (whole,) = probe_embeddings(embeddings, clips, [probe])
    assert list(whole.settings) == [0, 1, 2, 3, 4] and whole.seconds > 0
    # What the clips of fold 2 are makes no difference to how they are scored; to others it does.
    rng = np.random.default_rng(1)
    labels = clips.labels.copy()
    labels[clips.folds == 2] = rng.permutation(labels[clips.folds == 2])
    (other,) = probe_embeddings(embeddings, replace(clips, labels=labels), [probe])
    chosen_alike = probe != "mlp" or whole.settings[2]["epoch"] == other.settings[2]["epoch"]
    if chosen_alike:
        assert np.array_equal(whole.scores[clips.folds == 2], other.scores[clips.folds == 2])
    assert not np.array_equal(whole.scores[clips.folds == 1], other.scores[clips.folds == 1])


@pytest.mark.parametrize("probe", PROBES)
def test_clips_that_are_not_tested_have_no_scores(probe):
    embeddings, clips = many_clusters(spread=0.1)
    clips = replace(clips, folds=np.array([-1, -1, -1, -2, 0])[clips.folds])
    (result,) = probe_embeddings(embeddings, clips, [probe])
    assert np.isnan(result.scores[clips.folds != 0]).all()
    assert np.isfinite(result.scores[clips.folds == 0]).all()
    assert np.allclose(result.scores[clips.folds == 0].sum(axis=1), 1)
    assert score_predictions(clips, result.scores)["accuracy"].value >= 0.95


@pytest.mark.parametrize("probe", PROBES)
def test_probes_give_the_same_twice_and_leave_other_draws_alone(probe):
    embeddings, clips = many_clusters(spread=3.0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (probe_embeddings(embeddings, clips, [probe])[0].scores for _ in range(2))
    assert np.array_equal(first, second)
    assert torch.equal(torch.rand(3), expected)


def test_what_is_wrong_with_the_embeddings_is_said():
    embeddings, clips = many_clusters()
    with pytest.raises(ConfigError, match=r"shape \(100, D\), not \(99, 32\)"):
        knn_accuracy(embeddings[1:], clips)
    embeddings[7, 3] = np.nan
    for probe in PROBES:
        with pytest.raises(ConfigError, match=r"1 of 100 embeddings are not finite: '7.wav'"):
            probe_embeddings(embeddings, clips, [probe])
    with pytest.raises(ConfigError, match="k must be"):
        knn_accuracy(embeddings, clips, k=0)
    for strengths in ([0.1, 0.0], [], [1.0, 0.1]):
        with pytest.raises(ConfigError, match="strengths"):
            linear_probe_accuracy(embeddings, clips, strengths)
    for wrong in (["svm"], [], ["knn", "knn"]):
        with pytest.raises(ConfigError, match="probes are one or more of linear, knn, mlp, each once, not"):
            probe_embeddings(embeddings, clips, wrong)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    embeddings, clips = many_clusters()
    with pytest.raises(UnsupportedError, match=r"m2d-embed\[eval\]"):
        linear_probe_accuracy(embeddings, clips)
    with pytest.raises(UnsupportedError, match=r"m2d-embed\[eval\]"):
        probe_embeddings(embeddings, clips, ["knn"])
    assert knn_accuracy(embeddings, clips) > 0.9  # needs none


def test_accuracy_of_several_labels_is_refused():
    embeddings, clips = mixtures()
    for probe in (knn_accuracy, linear_probe_accuracy):
        with pytest.raises(ConfigError, match="accuracy is defined where each clip has one label"):
            probe(embeddings, clips)


@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe_accuracy])
def test_accuracies_are_those_of_the_probes(probe):
    embeddings, clips = many_clusters(spread=3.0)
    name = "knn" if probe is knn_accuracy else "linear"
    assert probe(embeddings, clips) == accuracy(name, embeddings, clips)


@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe_accuracy])
def test_probes_do_not_depend_on_the_scale_of_a_feature(probe):
    embeddings, clips = many_clusters(spread=2.0)
    scaled = embeddings * np.logspace(-3, 3, embeddings.shape[1], dtype=np.float32) + 7
    assert probe(scaled, clips) == pytest.approx(probe(embeddings, clips), abs=0.03)


@pytest.mark.parametrize("probe", PROBES)
def test_probes_take_collapsed_embeddings(probe):
    _, clips = many_clusters()
    assert accuracy(probe, np.full((100, 8), 3.7, np.float32), clips) == pytest.approx(0.2, abs=0.1)
    half = np.zeros((100, 8), np.float32)
    half[np.arange(100), clips.labels] = 1  # three features are constant
    assert accuracy(probe, half, clips) == 1.0
    if probe != "mlp":  # which takes features as they are
        clips = replace(clips, folds=np.arange(100) % 2 - 1)
        half[clips.folds == 0, 5] = 1e6  # constant in what is trained on, so nothing can be learnt of it
        assert accuracy(probe, half, clips) == 1.0


# --- nearest neighbours -----------------------------------------------------------------------------------------------


def test_knn_on_a_small_case_by_hand():
    # Two features, already standardised over the four training rows.
    train = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)
    test = np.array([[0.9, 1.1], [1.0, -0.2]], np.float32)
    clips = LabelledClips(paths(6), np.array([0, 1, 1, 1, 0, 1]), ("a", "b"), np.array([-1, -1, -1, -1, 0, 0]))
    embeddings = np.concatenate([train, test])
    assert knn_accuracy(embeddings, clips, k=1) == 1.0
    # Similarity weighs: of the first one's neighbours one is near (a), the others at right angles (b).
    assert knn_accuracy(embeddings, clips, k=3) == 1.0
    assert knn_accuracy(embeddings, clips, k=1000) == 1.0
    swapped = replace(clips, labels=np.array([1, 0, 1, 1, 0, 1]))
    assert knn_accuracy(embeddings, swapped, k=1) == 0.0
    (predicted,) = knn_predictions(embeddings, clips, k=2)
    near, far = 2.0 / np.sqrt(2 * 2.02), 0.2 / np.sqrt(2 * 2.02)
    assert predicted.scores[0] == pytest.approx([near / (near + far), far / (near + far)], abs=1e-6)


def test_each_label_of_a_neighbour_has_its_votes():
    embeddings = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1], [1, 0]], np.float32)
    targets = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0]], bool)
    clips = LabelledClips(paths(5), targets, ("a", "b", "c"), np.array([-1, -1, -1, -1, 0]))
    (predicted,) = knn_predictions(embeddings, clips, k=2)
    assert predicted.scores.tolist() == [[0.5, 1.0, 0.0]]
    assert predicted.settings == {"k": 2}


def test_knn_in_pieces_is_the_same(monkeypatch):
    embeddings, clips = many_clusters(spread=3.0)
    whole = knn_accuracy(embeddings, clips)
    monkeypatch.setattr(probes, "_ROWS_AT_A_TIME", 7)
    assert knn_accuracy(embeddings, clips) == whole


# --- linear -----------------------------------------------------------------------------------------------------------


def test_linear_probe_in_the_basis_of_the_clips_is_the_same(monkeypatch):
    embeddings, clips = many_clusters(dim=150, spread=4.0)  # more features than training clips
    monkeypatch.setattr(linear_probe, "_TOLERANCE", 1e-7)
    rotated = linear_probe_accuracy(embeddings, clips, [0.01])
    monkeypatch.setattr(linear_probe, "rotate", lambda train, test: (train, test))
    assert 0.3 < rotated < 1.0
    assert rotated == linear_probe_accuracy(embeddings, clips, [0.01])


@pytest.mark.parametrize("width", [5, 80])
@pytest.mark.parametrize("labels_known", [(0, 1, 2), (0, 2), (1,)])
def test_a_linear_layer_says_what_the_regression_says(width, labels_known):
    rng = np.random.default_rng(0)
    labels = rng.choice(labels_known, size=40).astype(np.int64)
    x = (rng.standard_normal((40, width)) + labels[:, None]).astype(np.float32)
    weight, bias = fit_layer(x, labels, 0.1, 3)
    assert weight.shape == (3, width)
    found = torch.from_numpy(x @ weight.T + bias).softmax(-1).numpy()
    [expected] = linear_probe._fitted_scores(x, labels, x, [0.1], 3)
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert (weight[[label for label in range(3) if label not in labels_known]] == 0).all()


def test_a_linear_layer_of_several_labels_says_what_the_regressions_say():
    rng = np.random.default_rng(0)
    labels = rng.random((40, 4)) < np.array([0.5, 0.3, 1.0, 0.0])
    x = (rng.standard_normal((40, 6)) + labels @ rng.standard_normal((4, 6))).astype(np.float32)
    weight, bias = fit_layer(x, labels, 1.0, 4)
    [expected] = linear_probe._fitted_scores(x, labels, x, [1.0], 4)
    np.testing.assert_allclose(torch.from_numpy(x @ weight.T + bias).sigmoid().numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("several", [False, True])
def test_linear_probe_chooses_the_strength_on_held_out_clips(several):
    labels = np.repeat([0, 1], 200)
    held_out = np.arange(400) % 5 == 0
    signal = np.eye(2, dtype=np.float32)[labels]
    labels = signal.astype(bool) if several else labels
    noise = np.random.default_rng(3).normal(size=(400, 400)).astype(np.float32)  # could only be learnt by heart
    assert choose_strength(noise, labels, held_out, [1e-5, 1e-2, 1e3], 2) == 1e-5
    assert choose_strength(signal, labels, held_out, [1e-5, 1e-2, 1e3], 2) == 1e3
    nothing = np.zeros(400, dtype=bool)
    assert choose_strength(signal, labels, nothing, [1e-5, 1e3], 2) == 1e-5


def test_linear_probe_holds_out_as_the_data_says(monkeypatch):
    embeddings, clips = many_clusters()
    seen = []
    monkeypatch.setattr(linear_probe, "choose_strength", lambda x, labels, held_out, *rest: seen.append(held_out) or 1)
    predictions = list(linear_predictions(embeddings, clips))
    for predicted, mask in zip(predictions, seen, strict=True):
        train, _ = clips.split(predicted.fold)
        assert train[mask].tolist() == clips.hold_out(predicted.fold)[1].tolist()
        assert predicted.settings == {"C": 1}


def test_linear_probe_is_fitted_again_to_all_training_clips():
    # Label 2 is known from the validation part alone.
    labels, folds = np.array([0, 1, 0, 1, 2, 2, 0, 1, 0, 1, 2]), np.array([-1] * 4 + [-2] * 4 + [0] * 3)
    embeddings, clips = clusters(labels, folds, spread=0.01)
    assert linear_probe_accuracy(embeddings, clips, [0.1, 1.0]) == 1.0


def test_linear_probe_of_labels_that_all_or_no_training_clips_have():
    targets = np.zeros((40, 4), bool)
    targets[:, 0] = np.arange(40) % 2
    targets[:20, 1] = True  # all clips of the training part, none of the others
    targets[20:, 2] = True
    embeddings = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    embeddings[:, 0] = targets[:, 0]
    clips = LabelledClips(paths(40), targets, ("a", "b", "c", "d"), np.repeat([-1, 0], 20))
    (predicted,) = linear_predictions(embeddings, clips)
    assert (predicted.scores[:, 1] == 1).all() and (predicted.scores[:, 2:] == 0).all()
    assert ((predicted.scores[:, 0] > 0.5) == targets[20:, 0]).mean() > 0.9


def test_linear_probe_of_many_labels_with_few_clips_does_not_warn(recwarn):
    embeddings, clips = clusters(np.repeat(np.arange(24), 2), np.arange(48) % 2, spread=0.1)
    assert len(list(linear_probe.linear_predictions(embeddings, clips))) == 2
    assert not [warning for warning in recwarn if "classes" in str(warning.message)]


def test_linear_probe_of_very_few_clips():
    embeddings, clips = clusters([0, 0, 1, 1], [0, 1, 0, 1], spread=0.1)
    assert linear_probe_accuracy(embeddings, clips) == 1.0
    # One label alone is left where settings are chosen.
    embeddings, clips = clusters([0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 2, 2], spread=0.1)
    assert len(list(linear_predictions(embeddings, clips))) == 3


# --- MLP --------------------------------------------------------------------------------------------------------------


def test_the_settings_are_those_of_hear(monkeypatch):
    monkeypatch.undo()
    assert len(GRID) == 16 and {s.hidden_layers for s in GRID} == {1, 2}
    assert {s.learning_rate for s in GRID} == {3.2e-3, 1e-3, 3.2e-4, 1e-4}
    network = mlp_probe._network(20, 7, MlpSettings(2, 1e-3, "xavier_normal"))
    kinds = [type(layer).__name__ for layer in network]
    assert kinds == ["Linear", "BatchNorm1d", "Dropout", "ReLU"] * 2 + ["Linear"]
    assert [layer.weight.shape for layer in network if isinstance(layer, torch.nn.Linear)] == [
        (1024, 20), (1024, 1024), (7, 1024),
    ]  # fmt: skip
    assert network[2].p == 0.1
    # Xavier: variance 2 / (inputs + outputs), times 2 behind a ReLU.
    assert float(network[0].weight.detach().std()) == pytest.approx((2 / 1044) ** 0.5, rel=0.02)
    assert float(network[4].weight.detach().std()) == pytest.approx((2 * 2 / 2048) ** 0.5, rel=0.02)
    uniform = mlp_probe._network(20, 7, MlpSettings(1, 1e-3, "xavier_uniform"))[0].weight.detach()
    assert float(uniform.abs().max()) == pytest.approx((6 / 1044) ** 0.5, rel=0.01)
    assert (mlp_probe._BATCH, mlp_probe._MAX_EPOCHS, mlp_probe._VALIDATE_EVERY) == (1024, 500, 3)
    assert (mlp_probe._PATIENCE, mlp_probe._GRID_POINTS) == (20, 8)


def test_mlp_tries_eight_settings_on_the_first_fold_and_the_best_on_the_others(monkeypatch):
    monkeypatch.setattr(mlp_probe, "_GRID_POINTS", 8)
    embeddings, clips = many_clusters(spread=3.0)
    calls = []
    train = mlp_probe._train

    def spy(part, held_out, num_labels, settings, seed):
        trained = train(part, held_out, num_labels, settings, seed)
        calls.append((settings, len(part.x), len(held_out.x), trained.score))
        return trained

    monkeypatch.setattr(mlp_probe, "_train", spy)
    done = []
    predictions = list(mlp_predictions(embeddings, clips, on_trained=lambda: done.append(1)))
    assert len(calls) == len(done) == num_trainings(clips) == 12
    assert all((trained_on, held_out) == (60, 20) for _, trained_on, held_out, _ in calls)
    tried = [settings for settings, *_ in calls[:8]]
    assert len(set(tried)) == 8
    scores = [score for *_, score in calls[:8]]
    best = tried[scores.index(max(scores))]
    assert [settings for settings, *_ in calls[8:]] == [best] * 4
    for predicted in predictions:
        assert predicted.settings["hidden_layers"] == best.hidden_layers
        assert predicted.settings["learning_rate"] == best.learning_rate
        assert predicted.settings["epoch"] % 3 == 0
    assert predictions[0].settings["validation_score"] == max(scores)


def test_mlp_keeps_the_weights_of_the_best_epoch(monkeypatch):
    embeddings, clips = many_clusters(spread=3.0)
    part, held_out = (mlp_probe._part(embeddings, clips, i, torch.device("cpu")) for i in clips.hold_out(0))
    scores = iter([0.1, 0.5, 0.4, 0.5, 0.3, 0.2, 0.1, 0.1, 0.1])
    weights = []

    def validate(network, _):
        weights.append(mlp_probe._copy(network))
        return next(scores)

    monkeypatch.setattr(mlp_probe, "_validate", validate)
    monkeypatch.setattr(mlp_probe, "_PATIENCE", 4)
    trained = mlp_probe._train(part, held_out, 5, GRID[0], seed=0)
    assert (trained.score, trained.epoch) == (0.5, 6)  # the first of equals
    assert len(weights) == 6  # then four in a row were not better
    kept = trained.network.state_dict()
    assert all(torch.equal(kept[name], weights[1][name]) for name in kept)
    assert not torch.equal(kept["0.weight"], weights[2]["0.weight"])


def test_mlp_is_validated_by_accuracy_or_map():
    embeddings, clips = mixtures()
    held_out = mlp_probe._part(embeddings, clips, np.arange(50), torch.device("cpu"))
    network = mlp_probe._network(24, 4, GRID[0]).eval()
    with torch.no_grad():
        scores = network(held_out.x).sigmoid().numpy()
    expected = mean_average_precision(clips.targets[:50], scores)
    assert mlp_probe._validate(network, held_out) == pytest.approx(expected)
    one = mlp_probe._Part(held_out.x, torch.arange(50) % 4)
    assert mlp_probe._validate(network, one) == pytest.approx((scores.argmax(axis=1) == np.arange(50) % 4).mean())


def test_batches_of_the_mlp():
    assert mlp_probe._batches(5) == [slice(0, 5)]
    assert mlp_probe._batches(1024) == [slice(0, 1024)]
    assert mlp_probe._batches(1025) == [slice(0, 1025)]  # batch norm cannot do one clip
    assert mlp_probe._batches(2050) == [slice(0, 1024), slice(1024, 2048), slice(2048, 2050)]


def test_mlp_of_another_seed_is_another():
    embeddings, clips = many_clusters(spread=3.0)
    first, second = (next(mlp_predictions(embeddings, clips, seed)).scores for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_mlp_needs_clips_to_validate_on():
    embeddings, clips = clusters([0, 0, 1, 1], [0, 1, 0, 1], spread=0.1)
    with pytest.raises(ConfigError, match="fold 0 has too few training clips to hold any out"):
        mlp_predictions(embeddings, clips)


def test_mlp_needs_labels_to_validate_on():
    several = np.array([[1, 0], [0, 1], [0, 0], [0, 0], [1, 1], [0, 1]], bool)
    embeddings, clips = clusters([0] * 6, [-1, -1, -2, -2, 0, 0], spread=0.1)
    with pytest.raises(ConfigError, match="no clip held out for validation of fold 0 has a label"):
        mlp_predictions(embeddings, replace(clips, labels=several, label_names=("a", "b")))


# --- real clips -------------------------------------------------------------------------------------------------------


def test_embedding_real_clips(tiny):
    labels = np.array([int(file.name[0] == "7") for file in DIGITS])
    clips = LabelledClips(tuple(DIGITS), labels, ("3", "7"), np.arange(len(DIGITS)) % 3)
    tiny.train()
    tiny.encoder.norm.eval()
    modes, window_frames = [], tiny.window_frames
    tiny.window_frames = lambda *args: (modes.append(tiny.encoder.training), window_frames(*args))[1]
    embeddings = embed_clips(tiny, clips, batch_size=2)
    assert modes and not any(modes)
    assert tiny.training and tiny.encoder.blocks.training and not tiny.encoder.norm.training
    assert embeddings.shape == (6, tiny.scene_embedding_size) and embeddings.dtype == np.float32
    assert np.abs(embeddings - tiny.encode(DIGITS)).max() <= 1e-5
    assert 0 <= knn_accuracy(embeddings, clips, 3) <= 1
