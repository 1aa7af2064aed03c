"""Labelled clips from folders and CSV files, and the parts they are trained, validated and tested in."""

import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, SHARED

from m2d_embed.errors import AudioError, ConfigError, UnsupportedError
from m2d_embed.labelled.clips import (
    TRAIN_ONLY,
    VALIDATION,
    LabelledClips,
    check_contents,
    check_duplicates,
    read_labelled,
)

DIGITS = sorted((DATA / "digits").glob("*.opus"))


def write_csv(path: Path, header: str, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def empty_files(folder: Path, count: int) -> list[str]:
    """Nobody looks into the files here, so any will do."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:03d}.wav" for i in range(count)]
    for name in names:
        (folder / name).touch()
    return names


def made_up(labels, folds, groups=None) -> LabelledClips:
    labels = np.array(labels)
    count = labels.shape[1] if labels.ndim == 2 else labels.max() + 1
    files = tuple(Path(f"{i}.wav") for i in range(len(labels)))
    return LabelledClips(files, labels, tuple("abcdefgh"[:count]), np.array(folds), groups)


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
    assert clips.folds.tolist() == [-1, -1, -2, -1, 0, 0]
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
    refused("cells are separated by ';'; save it with commas", "file;label;split", f"{a};x;1")
    refused(r"cells are separated by '\\t'", "file\tlabel", f"{a}\tx")
    refused("line 3: the column 'label' is empty", header, f"{a},x,1", f"{b},,1")
    refused("line 2: the column 'split' is empty", header, f"{a},x")
    refused("line 2: more than 3 cells", header, f"{a},x,1,2")
    refused("the column 'label' is there 2 times", "file,label,label", f"{a},x,y", f"{b},y,x")
    refused("1 of 2 files are missing: .*gone.wav", header, f"{a},x,1", "gone.wav,y,2", error=AudioError)
    refused("at least two labels are needed, but all clips are 'x'", header, f"{a},x,1", f"{b},x,2")
    refused(
        "all clips of 'y' are in the same test part",
        header, f"{a},x,1", f"{b},x,2", f"{c},y,2", f"{d},y,2",
    )  # fmt: skip
    refused("all clips of 'y' are in the same test part", "file,label", f"{a},x", f"{b},x", f"{c},y")
    refused("'a', 'b'", header, f"{a},x,a", f"{b},y,b")
    refused("two or more folds", header, f"{a},x,1", f"{b},y,1")
    refused("folds are whole numbers, .*'1.5'", header, f"{a},x,1.5", f"{b},y,2")
    refused("'dev'", header, f"{a},x,train", f"{b},y,dev", f"{c},x,test")
    refused("a train and a test part are needed", header, f"{a},x,train", f"{b},y,valid")
    refused("000.wav' have several. Several labels of one clip are written .* ';'", "file,label", f"{a},x", f"{a},y")
    refused("a clip has one row, but .*000.wav' have several[.]$", "file,labels", f"{a},x;y", f"{a},y")
    refused("at least two labels are needed, but no clip has any", "file,labels", f"{a},", f"{b},")
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


# --- several labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["label", "labels"])
def test_several_labels_in_a_cell(tmp_path, column):
    names = empty_files(tmp_path, 4)
    cells = ["dog; rain", "rain", "", "dog;;dog"]
    rows = [f"{n},{cell},{i % 2}" for i, (n, cell) in enumerate(zip(names, cells, strict=True))]
    clips = read_labelled(write_csv(tmp_path / "x.csv", f"file,{column},fold", *rows))
    assert clips.multi_label and clips.label_names == ("dog", "rain")
    assert clips.labels.tolist() == [[True, True], [False, True], [False, False], [True, False]]
    assert clips.labels.dtype == bool and np.array_equal(clips.targets, clips.labels)


def test_labels_means_several_even_if_none_has_two(tmp_path):
    names = empty_files(tmp_path, 4)
    rows = [f"{n},{'ab'[i % 2]}" for i, n in enumerate(names)]
    clips = read_labelled(write_csv(tmp_path / "x.csv", "file,labels", *rows))
    assert clips.multi_label and clips.labels.sum() == 4
    single = read_labelled(write_csv(tmp_path / "y.csv", "file,label", *rows))
    assert not single.multi_label and np.array_equal(single.targets, clips.labels)


def test_another_column_of_labels(tmp_path):
    names = empty_files(tmp_path, 4)
    rows = [f"{n},same,{'xy'[i % 2]},u;v" for i, n in enumerate(names)]
    table = write_csv(tmp_path / "x.csv", "file,label,speaker,tags", *rows)
    assert read_labelled(table, label_column="speaker").label_names == ("x", "y")
    assert read_labelled(table, label_column="tags").multi_label
    with pytest.raises(ConfigError, match="column 'mood' is missing"):
        read_labelled(table, label_column="mood")
    with pytest.raises(ConfigError, match="a folder has no column 'speaker'"):
        read_labelled(tmp_path, label_column="speaker")


def test_limit_of_clips_with_several_labels(tmp_path):
    names = empty_files(tmp_path, 60)
    rows = [f"{n},{'rare;' if i < 6 else ''}common{i % 2},{i % 3}" for i, n in enumerate(names)]
    table = write_csv(tmp_path / "x.csv", "file,labels,fold", *rows)
    clips = read_labelled(table, limit=20)
    assert len(clips) == 20 and clips.targets[:, clips.label_names.index("rare")].sum() >= 2


def test_limit_that_leaves_nothing_to_test(tmp_path):
    parts = ["train", "valid", "test"]
    rows = [f"{name},{'xy'[i % 2]},{parts[i // 2]}" for i, name in enumerate(empty_files(tmp_path, 6))]
    path = write_csv(tmp_path / "x.csv", "file,label,split", *rows)
    refused = 0
    for seed in range(60):
        try:
            assert read_labelled(path, limit=4, seed=seed).test_folds() == [0]
        except ConfigError as error:
            assert "of 4 clips none would be left to test" in str(error)
            refused += 1
    assert 0 < refused < 60


def test_limit_that_leaves_a_label_only_in_test(tmp_path):
    names = empty_files(tmp_path, 18)
    # Only one clip of fold 1 is "b", and it is drawn as one of the rarer "d".
    cells = ["b;d,1", *["d,1"] * 5, *["d,2"] * 2, *["b,2"] * 10]
    table = write_csv(tmp_path / "x.csv", "file,labels,fold", *map(",".join, zip(names, cells, strict=True)))
    assert len(read_labelled(table)) == 18
    refused = 0
    for seed in range(30):
        try:
            clips = read_labelled(table, 6, seed)
        except ConfigError as error:
            assert "of 6 clips none of 'b' would be left to train on" in str(error)
            refused += 1
        else:
            assert names[0] in [file.name for file in clips.files]
    assert 0 < refused < 30


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["{}", "{}.0", "fold{}", "Fold 0{}", "fold_{}"])
def test_ways_to_write_a_fold(tmp_path, written):
    names = empty_files(tmp_path, 6)
    rows = [f"{name},{'xy'[i % 2]},{written.format(i // 2)}" for i, name in enumerate(names)]
    clips = read_labelled(write_csv(tmp_path / "x.csv", "file,label,fold", *rows))
    assert clips.folds.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("word", ["valid", "validation", "val", "VALID"])
def test_words_for_the_validation_part(tmp_path, word):
    names = empty_files(tmp_path, 6)
    parts = ["training", "train", word, word, "testing", "test"]
    rows = [f"{n},{'ab'[i % 2]},{part}" for i, (n, part) in enumerate(zip(names, parts, strict=True))]
    clips = read_labelled(write_csv(tmp_path / "x.csv", "file,label,split", *rows))
    assert clips.folds.tolist() == [TRAIN_ONLY, TRAIN_ONLY, VALIDATION, VALIDATION, 0, 0]
    train, held_out = clips.hold_out(0)
    assert (train.tolist(), held_out.tolist()) == ([0, 1], [2, 3])
    assert clips.split(0)[0].tolist() == [0, 1, 2, 3]


def test_hold_out_is_the_next_of_three_or_more_folds():
    clips = made_up([0, 1] * 6, [1, 1, 3, 3, 7, 7, -1, -1, 1, 1, 3, 7])
    assert [clips.hold_out(fold)[1].tolist() for fold in (1, 3, 7)] == [[2, 3, 10], [4, 5, 11], [0, 1, 8, 9]]
    for fold in (1, 3, 7):
        parts = [*clips.hold_out(fold), clips.split(fold)[1]]
        assert sorted(np.concatenate(parts).tolist()) == list(range(12))
    with pytest.raises(ConfigError, match="fold 2 does not exist; there are '1', '3', '7'"):
        clips.hold_out(2)


def test_hold_out_of_two_folds_is_a_fifth_of_each_label():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 4 + [3] + [0, 1, 2, 3])
    clips = made_up(labels, [0] * 85 + [1] * 4)
    train, held_out = clips.hold_out(1)
    assert 14 <= len(held_out) <= 17
    assert set(labels[train]) == {0, 1, 2, 3}
    assert (labels[held_out] == 0).sum() == 10
    assert sorted([*train, *held_out]) == list(range(85))
    few = made_up([0, 0, 1, 1], [0, 1, 0, 1])
    assert len(few.hold_out(0)[1]) == 0 and few.hold_out(0)[0].tolist() == [1, 3]


def test_hold_out_keeps_groups_whole_where_the_test_part_does():
    labels = np.arange(60) % 2
    groups = [f"g{i // 6}" for i in range(60)]
    clips = made_up(labels, [-1] * 48 + [0] * 12, tuple(groups))
    train, held_out = clips.hold_out(0)
    assert 0 < len(held_out) < 24
    assert not {groups[i] for i in train} & {groups[i] for i in held_out}
    mixed = made_up(labels, [-1, 0] * 30, tuple(groups))
    train, held_out = mixed.hold_out(0)
    assert {groups[i] for i in train} & {groups[i] for i in held_out}
    one = made_up([0, 1, 0, 1, 0, 1], [-1, -1, -1, -1, 0, 0], ("a",) * 4 + ("b",) * 2)
    assert len(one.hold_out(0)[1]) == 0


def test_shared_groups():
    clips = made_up([0, 1, 0, 1], [-1, -2, 0, 0], ("a", "b", "b", "c"))
    assert clips.shared_groups(0) == ["b"]
    assert made_up([0, 1], [0, 1]).shared_groups(0) == []


def test_drawn_folds_keep_groups_whole(tmp_path):
    names = empty_files(tmp_path, 60)
    rows = [f"{n},{i % 2},speaker{i // 5}" for i, n in enumerate(names)]
    clips = read_labelled(write_csv(tmp_path / "x.csv", "file,label,group", *rows))
    assert len(clips.test_folds()) == 5
    folds_of = {group: set(clips.folds[[g == group for g in clips.groups]]) for group in set(clips.groups)}
    assert len(folds_of) == 12 and all(len(folds) == 1 for folds in folds_of.values())
    assert all(clips.shared_groups(fold) == [] for fold in clips.test_folds())
    three = [f"{n},{i % 2},{i % 3}" for i, n in enumerate(names)]
    assert len(read_labelled(write_csv(tmp_path / "y.csv", "file,label,group", *three)).test_folds()) == 3


def test_one_group_cannot_be_tested(tmp_path):
    names = empty_files(tmp_path, 6)
    rows = [f"{n},{i % 2},me" for i, n in enumerate(names)]
    with pytest.raises(ConfigError, match=r"all clips are of one group.*or a column fold"):
        read_labelled(write_csv(tmp_path / "x.csv", "file,label,group", *rows))
    stated = [f"{row},{i // 2}" for i, row in enumerate(rows)]
    clips = read_labelled(write_csv(tmp_path / "y.csv", "file,label,group,fold", *stated))
    assert clips.shared_groups(0) == ["me"]


def test_groups_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    names = empty_files(tmp_path, 6)
    rows = [f"{n},{i % 2},{i // 2}" for i, n in enumerate(names)]
    with pytest.raises(UnsupportedError, match=r"folds of whole groups: .*m2d-embed\[eval\]"):
        read_labelled(write_csv(tmp_path / "x.csv", "file,label,group", *rows))
    assert len(read_labelled(write_csv(tmp_path / "y.csv", "file,label", *[row[:-2] for row in rows]))) == 6


def test_a_label_that_is_only_tested_is_named(tmp_path):
    names = empty_files(tmp_path, 4)
    parts = [("a", "train"), ("b", "train"), ("a;c", "test"), ("b", "test")]
    rows = [f"{n},{label},{part}" for n, (label, part) in zip(names, parts, strict=True)]
    with pytest.raises(ConfigError, match="all clips of 'c' are in the same test part"):
        read_labelled(write_csv(tmp_path / "x.csv", "file,labels,split", *rows))


def test_select():
    clips = made_up([0, 1, 0, 1], [-1, -2, 0, 0], ("a", "b", "b", "c")).select(np.array([3, 0]))
    assert [file.name for file in clips.files] == ["3.wav", "0.wav"]
    assert (clips.labels.tolist(), clips.folds.tolist(), clips.groups) == ([1, 0], [0, -1], ("c", "a"))
    assert clips.label_names == ("a", "b")


# --- the same content twice -------------------------------------------------------------------------------------------


def test_content_in_two_parts_is_refused():
    clips = made_up([0, 1, 0, 1, 0], [-1, -2, 0, 0, -1])
    check_duplicates(clips.files, clips.folds, list("abcde"), Path("x.csv"))
    check_duplicates(clips.files, clips.folds, list("abccd"), Path("x.csv"))
    with pytest.raises(ConfigError, match=r"x.csv: 1 clips lie in more than one part .*'0.wav = 3.wav = 4.wav'"):
        check_duplicates(clips.files, clips.folds, list("abdaa"), Path("x.csv"))
    with pytest.raises(ConfigError, match=r"2 clips lie in .*'0.wav = 1.wav', '2.wav = 4.wav'"):
        check_contents(clips, list("aabcb"), Path("x.csv"))


def test_copies_are_named_as_in_the_data(tmp_path):
    clips = made_up([0, 1], [0, 1])
    files = (tmp_path / "dog" / "1.wav", tmp_path / "cat" / "1.wav")
    with pytest.raises(ConfigError, match=r"'dog/1.wav = cat/1.wav'"):
        check_duplicates(files, clips.folds, list("aa"), tmp_path)
    with pytest.raises(ConfigError, match=r"'dog/1.wav = cat/1.wav'"):
        check_duplicates(files, clips.folds, list("aa"), tmp_path / "metadata.csv")
    with pytest.raises(ConfigError, match=re.escape(f"'{files[0]} = {files[1]}'")):
        check_duplicates(files, clips.folds, list("aa"), tmp_path / "elsewhere" / "metadata.csv")


def test_content_with_two_labels_is_refused():
    clips = made_up([0, 1, 0, 1, 0], [0, 0, 0, 1, 1])
    check_contents(clips, list("abacd"), Path("x.csv"))
    with pytest.raises(ConfigError, match=r"x.csv: clips of the same content have different labels: '0.wav = 1.wav'"):
        check_contents(clips, list("aabcd"), Path("x.csv"))
    several = made_up(np.array([[1, 1], [1, 0], [0, 1], [1, 1]], bool), [0, 0, 1, 1])
    with pytest.raises(ConfigError, match=r"'0.wav = 1.wav'"):
        check_contents(several, list("aabc"), Path("x.csv"))
