"""Labelled clips from folders and CSV files, their folds, and the two probes."""

import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, SHARED

from m2d_embed.errors import AudioError, ConfigError, UnsupportedError
from m2d_embed.evaluate import probes
from m2d_embed.evaluate.labelled import LabelledClips, read_labelled
from m2d_embed.evaluate.probes import embed_clips, knn_accuracy, linear_probe_accuracy

DIGITS = sorted((DATA / "digits").glob("*.opus"))


def write_csv(path: Path, header: str, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def empty_files(folder: Path, count: int) -> list[str]:
    """Probes look at files only when they embed them, so for folds any will do."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:03d}.wav" for i in range(count)]
    for name in names:
        (folder / name).touch()
    return names


def clusters(labels, folds, dim=32, spread=1.0, seed=0):
    """Clips whose embeddings lie around one point a label."""
    rng = np.random.default_rng(seed)
    labels, folds = np.array(labels), np.array(folds)
    centres = rng.normal(size=(labels.max() + 1, dim)) + 5
    embeddings = (centres[labels] + spread * rng.normal(size=(len(labels), dim))).astype(np.float32)
    names = tuple(f"label{i}" for i in range(labels.max() + 1))
    return embeddings, LabelledClips(tuple(Path(f"{i}.wav") for i in range(len(labels))), labels, names, folds)


def many_clusters(num_labels=5, each=20, **kwargs):
    labels = np.repeat(np.arange(num_labels), each)
    return clusters(labels, np.arange(len(labels)) % 5, **kwargs)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_folder_of_labels(tmp_path):
    for file in DIGITS:
        folder = tmp_path / file.name[0]
        folder.mkdir(exist_ok=True)
        shutil.copy(file, folder)
    (tmp_path / ".cache").mkdir()
    clips = read_labelled(tmp_path)
    assert clips.label_names == ("3", "7")
    assert [file.name for file in clips.files] == [file.name for file in DIGITS]
    assert clips.labels.tolist() == [0, 0, 0, 1, 1, 1] and clips.labels.dtype == np.int64
    assert sorted(clips.folds.tolist()) == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("where", ["", "audio/"])
def test_csv_beside_its_files_or_above_audio(tmp_path, where):
    names = empty_files(tmp_path / where, 4)
    rows = [f"{name},{label}" for name, label in zip(names, "baba", strict=True)]
    clips = read_labelled(write_csv(tmp_path / "list.csv", "file,label", *rows))
    assert clips.files == tuple(tmp_path / where / name for name in names)
    assert [clips.label_names[i] for i in clips.labels] == list("baba")
    assert len(set(clips.folds.tolist())) == 4


def test_split_words_and_fold_numbers(tmp_path):
    names = empty_files(tmp_path, 6)
    words = ["train", "train", "valid", "Train", "test", "TEST"]
    rows = [f"{n},{'ab'[i % 2]},{word}" for i, (n, word) in enumerate(zip(names, words, strict=True))]
    clips = read_labelled(write_csv(tmp_path / "words.csv", "file,label,split", *rows))
    assert clips.folds.tolist() == [-1, -1, -1, -1, 0, 0]
    ((train, test),) = clips.splits()
    assert (train.tolist(), test.tolist()) == ([0, 1, 2, 3], [4, 5])

    rows = [f"{i // 2 + 1},{n},{'ab'[i % 2]}" for i, n in enumerate(names)]
    clips = read_labelled(write_csv(tmp_path / "numbers.csv", "fold,file,label", *rows))
    assert clips.folds.tolist() == [1, 1, 2, 2, 3, 3]
    assert [test.tolist() for _, test in clips.splits()] == [[0, 1], [2, 3], [4, 5]]
    assert [train.tolist() for train, _ in clips.splits()][1] == [0, 1, 4, 5]


def test_drawn_folds_are_stratified_and_of_the_seed(tmp_path):
    names = empty_files(tmp_path, 60)
    table = write_csv(tmp_path / "x.csv", "file,label", *[f"{n},{'abc'[i % 3]}" for i, n in enumerate(names)])
    clips = read_labelled(table)
    counts = Counter(zip(clips.labels.tolist(), clips.folds.tolist(), strict=True))
    assert set(counts.values()) == {4} and len(counts) == 15
    assert np.array_equal(clips.folds, read_labelled(table).folds)
    assert not np.array_equal(clips.folds, read_labelled(table, seed=1).folds)


def test_limit_is_stratified_by_label_and_fold(tmp_path):
    names = empty_files(tmp_path, 400)
    rows = [f"{n},{i % 8},{i // 80 + 1}" for i, n in enumerate(names)]  # 8 labels, 5 folds, 10 clips of each
    table = write_csv(tmp_path / "x.csv", "file,label,fold", *rows)
    clips = read_labelled(table, limit=80)
    counts = Counter(zip(clips.labels.tolist(), clips.folds.tolist(), strict=True))
    assert set(counts.values()) == {2} and len(counts) == 40
    assert read_labelled(table, limit=80).files == clips.files != read_labelled(table, limit=80, seed=1).files
    assert len(read_labelled(table, limit=1000)) == len(read_labelled(table)) == 400
    known = dict(zip(names, rows, strict=True))  # what a clip is does not change
    for file, label, fold in zip(clips.files, clips.labels, clips.folds, strict=True):
        assert known[file.name] == f"{file.name},{clips.label_names[label]},{fold}"


@pytest.mark.parametrize("seed", range(5))
def test_limit_keeps_rare_labels_trainable(tmp_path, seed):
    names = empty_files(tmp_path, 123)
    common = [f"{n},common{i % 2},{'test' if i % 10 < 2 else 'train'}" for i, n in enumerate(names[:100])]
    rare = [f"{names[100]},rare,test", f"{names[101]},rare,train", f"{names[102]},only,train"]
    tested = [f"{n},tested,{'test' if i else 'train'}" for i, n in enumerate(names[103:])]
    clips = read_labelled(write_csv(tmp_path / "x.csv", "file,label,split", *common, *rare, *tested), 20, seed)
    assert len(clips) == 20
    ((train, test),) = clips.splits()
    assert set(clips.labels[test]) <= set(clips.labels[train]) and len(test) > 0
    assert Counter(clips.label_names[i] for i in clips.labels)["rare"] == 2


def test_what_is_wrong_with_a_csv_is_said(tmp_path):
    a, b, c, d = empty_files(tmp_path, 4)
    header = "file,label,split"

    def refused(message, *lines, error=ConfigError):
        with pytest.raises(error, match=message):
            read_labelled(write_csv(tmp_path / "x.csv", *lines))

    refused("column 'label' is missing; there are 'file', 'class'", "file,class", f"{a},x")
    refused("no rows", header)
    refused("line 3: the column 'label' is empty", header, f"{a},x,1", f"{b},,1")
    refused("line 2: the column 'split' is empty", header, f"{a},x")
    refused("line 2: more than 3 cells", header, f"{a},x,1,2")
    refused("1 of 2 files are missing: .*gone.wav", header, f"{a},x,1", "gone.wav,y,2", error=AudioError)
    refused("at least two labels are needed, but all clips are 'x'", header, f"{a},x,1", f"{b},x,2")
    refused(
        "all clips of 'y' are in the same test part",
        header, f"{a},x,1", f"{b},x,2", f"{c},y,2", f"{d},y,2",
    )  # fmt: skip
    refused("all clips of 'y' are in the same test part", "file,label", f"{a},x", f"{b},x", f"{c},y")
    refused("'a', 'b'", header, f"{a},x,a", f"{b},y,b")
    refused("two or more folds", header, f"{a},x,1", f"{b},y,1")
    refused("one row and one label, but .*000.wav' have several", "file,label", f"{a},x", f"{a},y")
    with pytest.raises(ConfigError, match="No such file"):
        read_labelled(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("file,label\né,x\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not a CSV file in UTF-8"):
        read_labelled(tmp_path / "latin.csv")


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no sub-folders"):
        read_labelled(tmp_path)
    empty_files(tmp_path / "a", 2)
    (tmp_path / "metadata.csv").touch()
    with pytest.raises(ConfigError, match=r"two labels are needed.*Did you mean .*metadata\.csv"):
        read_labelled(tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(AudioError, match="b: no audio files"):
        read_labelled(tmp_path)
    empty_files(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"'000.wav' lie outside"):
        read_labelled(tmp_path)


def test_limit_must_leave_two_of_each_label(tmp_path):
    names = empty_files(tmp_path, 30)
    table = write_csv(tmp_path / "x.csv", "file,label", *[f"{n},{i % 3}" for i, n in enumerate(names)])
    assert len(read_labelled(table, limit=6)) == 6
    with pytest.raises(ConfigError, match="5 clips of 3 labels are too few; take 6"):
        read_labelled(table, limit=5)


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    ("name", "labels", "tested"), [("esc50", 50, 500), ("emodb", 7, 500), ("fsdd", 10, 50)]
)  # of FSDD a tenth is the test part
def test_shared_sets(name, labels, tested):
    clips = read_labelled(SHARED / "data" / name / "metadata.csv", 500)
    assert (len(clips), len(clips.label_names), sum(len(test) for _, test in clips.splits())) == (500, labels, tested)


# --- probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe_accuracy])
def test_probes_tell_signal_from_noise(probe):
    embeddings, clips = many_clusters(spread=0.5)
    assert probe(embeddings, clips) >= 0.99
    middling = probe(many_clusters(spread=3.0)[0], clips)
    assert 0.3 < middling < 0.99
    noise = np.random.default_rng(1).normal(size=embeddings.shape).astype(np.float32)
    assert probe(noise, clips) < 0.4


@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe_accuracy])
def test_probes_do_not_depend_on_the_scale_of_a_feature(probe):
    embeddings, clips = many_clusters(spread=2.0)
    scaled = embeddings * np.logspace(-3, 3, embeddings.shape[1], dtype=np.float32) + 7
    assert probe(scaled, clips) == pytest.approx(probe(embeddings, clips), abs=0.03)


@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe_accuracy])
def test_probes_never_see_the_test_labels(probe):
    # Each label is two clusters; those of the test part are exchanged between the labels, so all answers are wrong.
    labels = np.repeat([0, 1, 1, 0], 20)
    folds = np.repeat([-1, -1, 0, 0], 20)
    points = np.repeat([0.0, 1.0, 0.0, 1.0], 20)[:, None]
    embeddings = (points + 0.01 * np.random.default_rng(0).normal(size=(80, 4))).astype(np.float32)
    clips = LabelledClips(tuple(Path(f"{i}") for i in range(80)), labels, ("a", "b"), folds)
    assert probe(embeddings, clips) == 0.0
    clips = LabelledClips(clips.files, np.repeat([0, 1, 0, 1], 20), ("a", "b"), folds)
    assert probe(embeddings, clips) == 1.0


@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe_accuracy])
def test_probes_take_collapsed_embeddings(probe):
    _, clips = many_clusters()
    assert probe(np.full((100, 8), 3.7, np.float32), clips) == pytest.approx(0.2, abs=0.1)
    half = np.zeros((100, 8), np.float32)
    half[np.arange(100), clips.labels] = 1  # three features are constant
    assert probe(half, clips) == 1.0
    clips = LabelledClips(clips.files, clips.labels, clips.label_names, np.arange(100) % 2 - 1)
    half[clips.folds == 0, 5] = 1e6  # constant in what is trained on, so nothing can be learnt of it
    assert probe(half, clips) == 1.0


def test_knn_on_a_small_case_by_hand():
    # Two features, already standardised over the four training rows.
    train = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)
    test = np.array([[0.9, 1.1], [1.0, -0.2]], np.float32)
    clips = LabelledClips(
        tuple(Path(str(i)) for i in range(6)),
        np.array([0, 1, 1, 1, 0, 1]),
        ("a", "b"),
        np.array([-1, -1, -1, -1, 0, 0]),
    )
    embeddings = np.concatenate([train, test])
    assert knn_accuracy(embeddings, clips, k=1) == 1.0
    # Similarity weighs: of the first one's neighbours one is near (a), the others at right angles (b).
    assert knn_accuracy(embeddings, clips, k=3) == 1.0
    assert knn_accuracy(embeddings, clips, k=1000) == 1.0
    swapped = LabelledClips(clips.files, np.array([1, 0, 1, 1, 0, 1]), ("a", "b"), clips.folds)
    assert knn_accuracy(embeddings, swapped, k=1) == 0.0


def test_knn_in_pieces_is_the_same(monkeypatch):
    embeddings, clips = many_clusters(spread=3.0)
    whole = knn_accuracy(embeddings, clips)
    monkeypatch.setattr(probes, "_ROWS_AT_A_TIME", 7)
    assert knn_accuracy(embeddings, clips) == whole


def test_linear_probe_in_the_basis_of_the_clips_is_the_same(monkeypatch):
    embeddings, clips = many_clusters(dim=150, spread=4.0)  # more features than training clips
    monkeypatch.setattr(probes, "_TOLERANCE", 1e-7)
    rotated = linear_probe_accuracy(embeddings, clips, [0.01])
    monkeypatch.setattr(probes, "_rotate", lambda train, test: (train, test))
    assert 0.3 < rotated < 1.0
    assert rotated == linear_probe_accuracy(embeddings, clips, [0.01])


def test_linear_probe_chooses_the_strength_on_held_out_clips():
    labels = np.repeat([0, 1], 40)
    noise = np.random.default_rng(3).normal(size=(80, 400)).astype(np.float32)  # could only be learnt by heart
    assert probes._choose_strength(noise, labels, [1e-5, 1e-2, 1e3]) == 1e-5
    assert probes._choose_strength(np.eye(2, dtype=np.float32)[labels], labels, [1e-5, 1e-2, 1e3]) == 1e3


def test_held_out_rows_are_a_fifth_and_leave_every_label():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 4 + [3])
    mask = probes._held_out(labels)
    assert 14 <= mask.sum() <= 17
    assert set(labels[~mask]) == {0, 1, 2, 3}
    assert mask[labels == 0].sum() == 10


def test_linear_probe_of_very_few_clips():
    embeddings, clips = clusters([0, 0, 1, 1], [0, 1, 0, 1], spread=0.1)
    assert linear_probe_accuracy(embeddings, clips) == 1.0


def test_what_is_wrong_with_the_embeddings_is_said():
    embeddings, clips = many_clusters()
    with pytest.raises(ConfigError, match=r"shape \(100, D\), not \(99, 32\)"):
        knn_accuracy(embeddings[1:], clips)
    embeddings[7, 3] = np.nan
    for probe in (knn_accuracy, linear_probe_accuracy):
        with pytest.raises(ConfigError, match=r"1 of 100 embeddings are not finite: '7.wav'"):
            probe(embeddings, clips)
    with pytest.raises(ConfigError, match="k must be"):
        knn_accuracy(embeddings, clips, k=0)
    with pytest.raises(ConfigError, match="strengths"):
        linear_probe_accuracy(embeddings, clips, [0.1, 0.0])


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    embeddings, clips = many_clusters()
    with pytest.raises(UnsupportedError, match=r"m2d-embed\[pretrain\]"):
        linear_probe_accuracy(embeddings, clips)
    assert knn_accuracy(embeddings, clips) > 0.9  # needs none


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
