"""``m2d-embed probe`` and ``run_probe`` on real clips with a tiny model."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import DATA, SHARED, TINY, random_model
from test_cli import picture_size, run

from m2d_embed.errors import AudioError, ConfigError, UnsupportedError
from m2d_embed.evaluate import embedding_cache, mlp_probe
from m2d_embed.evaluate.probe_run import ProbeOptions, data_name, notes_on, run_probe
from m2d_embed.evaluate.report import format_report
from m2d_embed.evaluate.scores import score_predictions
from m2d_embed.jobs.settings import fingerprint
from m2d_embed.labelled.clips import read_labelled
from m2d_embed.m2d import M2D

DIGITS = sorted((DATA / "digits").glob("*.opus"))
SOUNDS = sorted((DATA / "sounds").glob("*.oga"))


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("M2D_EMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mlp_probe, "_HIDDEN", 32)
    monkeypatch.setattr(mlp_probe, "_MAX_EPOCHS", 6)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    random_model(TINY).save_pretrained(folder)
    return folder


def write_table(path: Path, header: str, rows) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


@pytest.fixture
def table(tmp_path) -> Path:
    """Six spoken digits, which are of three speakers, and six sounds, in three folds."""
    (tmp_path / "set" / "audio").mkdir(parents=True)
    for file in [*DIGITS, *SOUNDS[:6]]:
        shutil.copy(file, tmp_path / "set" / "audio")
    rows = [(f.name, "digit", (i + i // 3) % 3, f.stem.split("_")[1]) for i, f in enumerate(DIGITS)]
    rows += [(f.name, "sound", i % 3, "nobody") for i, f in enumerate(SOUNDS[:6])]
    return write_table(tmp_path / "set" / "metadata.csv", "file,label,fold,speaker", rows)


def several(tmp_path: Path) -> Path:
    """Real clips of two labels, one or none: what they are, and whether they are short."""
    clips = [*DIGITS, *SOUNDS[:6]]
    rows = []
    for i, file in enumerate(clips):
        kind = "speech" if file in DIGITS else "effect"
        rows.append((file, f"{kind};even" if i % 2 else kind if i != 4 else "", i // 2 % 3))
    return write_table(tmp_path / "tags.csv", "file,labels,fold", rows)


def test_the_command(table, model_folder, tmp_path):
    result = run("probe", table, "--model", model_folder)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "set: 12 clips with one label each, 2 labels; 12 clips tested in 3 folds"
    assert lines[1] == f"{TINY.name}: 160 values a clip"
    assert lines[3].split() == ["probe", "accuracy", "macro-F1", "mAP"]
    assert [line.split()[0] for line in lines[4:7]] == ["linear", "knn", "mlp"]
    folder = tmp_path / f"probe-set-{TINY.name}"
    files = ["confusion.png", "predictions.csv", "scores.npz", "results.json"]
    assert lines[-1] == f"-> {folder.name}: {', '.join(files)}"
    assert sorted(file.name for file in folder.iterdir()) == sorted(files)
    assert min(picture_size(folder / "confusion.png")) > 200

    results = json.loads((folder / "results.json").read_text())
    assert results["data"]["labels"] == {"digit": 6, "sound": 6}
    assert results["data"]["folds"] == {str(fold): {"train": 8, "held_out": 4, "test": 4} for fold in range(3)}
    assert results["model"]["name"] == TINY.name and results["model"]["embedding_size"] == 160
    assert results["model"]["hash"] == fingerprint(M2D.from_pretrained(model_folder), "scene")
    assert results["settings"]["versions"]["torch"] == torch.__version__
    assert set(results["seconds"]) == {"read and embed", "all"}
    for probe, row in zip(("linear", "knn", "mlp"), lines[4:7], strict=True):
        found = results["probes"][probe]
        score = found["scores"]["accuracy"]
        assert f" {100 * score['value']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]" in row
        assert set(score["by_fold"]) == set(found["settings"]) == {"0", "1", "2"}
        assert found["labels"]["digit"]["clips"] == 6 and 0 <= found["labels"]["digit"]["f1"] <= 1
    assert results["probes"]["knn"]["settings"]["0"] == {"k": 8}

    with (folder / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file"] for row in rows[:6]] == [f"audio/{file.name}" for file in DIGITS]
    assert [row["label"] for row in rows] == ["digit"] * 6 + ["sound"] * 6
    for probe in ("linear", "knn", "mlp"):
        right = np.mean([row["label"] == row[probe] for row in rows])
        assert right == pytest.approx(results["probes"][probe]["scores"]["accuracy"]["value"])
        assert all(0.5 <= float(row[f"{probe}_score"]) <= 1 for row in rows)
    with np.load(folder / "scores.npz") as scores:
        assert scores["labels"].tolist() == ["digit", "sound"]
        for probe in ("linear", "knn", "mlp"):
            assert scores[probe].shape == (12, 2)
            assert [["digit", "sound"][best] for best in scores[probe].argmax(axis=1)] == [row[probe] for row in rows]
            best = [float(row[f"{probe}_score"]) for row in rows]
            np.testing.assert_allclose(scores[probe].max(axis=1), best, atol=1e-6)


def test_options_of_the_command(table, model_folder, tmp_path):
    common = ["--model", model_folder, "--probe", "knn"]
    first = run("probe", table, *common, "--label-column", "speaker", "--flat", "--layers", "1,2", "--concat")
    assert first.returncode == 0, first.stderr
    assert "4 labels" in first.stdout and ": 64 values a clip" in first.stdout and "linear" not in first.stdout
    folder = tmp_path / f"probe-set-speaker-{TINY.name}"
    results = json.loads((folder / "results.json").read_text())
    assert list(results["probes"]) == ["knn"]
    assert results["model"]["features"]["layers"] == [1, 2] and results["model"]["features"]["flat"]
    limited = run("probe", table, *common, "--limit", 6, "-o", "here/there", "--dtype", "bf16")
    assert limited.returncode == 0, limited.stderr
    results = json.loads(Path("here/there/results.json").read_text())
    assert results["data"]["clips"] == 6 and results["settings"]["limit"] == 6
    assert results["model"]["dtype"] == "bfloat16"


def test_the_second_time_nothing_is_embedded(table, tiny, monkeypatch):
    first, _ = run_probe(tiny, table, None, ProbeOptions(("knn",)))
    monkeypatch.setattr(embedding_cache, "encode_scenes", None)
    second, files = run_probe(tiny, table, None, ProbeOptions(("knn",)))
    assert files == [] and np.array_equal(first.embeddings, second.embeddings)
    assert first.scores == second.scores
    with pytest.raises(TypeError):  # as there is nothing to embed with
        run_probe(tiny, table, None, ProbeOptions(("knn",), cache=Path("elsewhere")))


def test_report_as_the_functions_give_it(table, tiny):
    report, files = run_probe(tiny, table, Path("out"), ProbeOptions(("knn", "linear")))
    assert [file.name for file in files] == ["confusion.png", "predictions.csv", "scores.npz", "results.json"]
    assert [result.probe for result in report.results] == ["knn", "linear"]
    for result in report.results:
        assert report.scores[result.probe] == score_predictions(report.clips, result.scores)
    assert np.abs(report.embeddings - tiny.encode(report.clips.files)).max() <= 1e-5
    assert "knn" in format_report(report)


def test_several_labels(tmp_path, model_folder):
    table = several(tmp_path)
    result = run("probe", table, "--model", model_folder, "-o", "out")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "tags: 12 clips with any number of labels each, 3 labels; 12 clips tested in 3 folds"
    assert lines[3].split() == ["probe", "macro-F1", "mAP"]
    assert "note: 1 clips have no label." in lines
    assert not Path("out/confusion.png").exists()
    with Path("out/predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in rows[:6]] == ["speech", "even;speech", "speech", "even;speech", "", "even;speech"]
    for row in rows:
        assert len(row["knn"].split(";")) == len(row["knn_score"].split(";"))
        assert all(float(score) >= 0.5 for score in row["knn_score"].split(";") if score)


def test_an_earlier_report_is_replaced_whole(table, tiny, tmp_path):
    run_probe(tiny, table, Path("out"), ProbeOptions(("knn",)))
    Path("out/map.html").write_text("of another time")
    Path("out/mine.txt").write_text("kept")
    run_probe(tiny, several(tmp_path), Path("out"), ProbeOptions(("knn",)))
    assert sorted(file.name for file in Path("out").iterdir()) == [
        "mine.txt",
        "predictions.csv",
        "results.json",
        "scores.npz",
    ]


def test_map(table, tiny, monkeypatch):
    sound_map = pytest.importorskip("m2d_embed.evaluate.sound_map")
    calls = []
    monkeypatch.setattr(sound_map, "write_map", lambda *args: calls.append(args))
    report, files = run_probe(tiny, table, Path("out"), ProbeOptions(("knn",), draw_map=True))
    ((embeddings, paths, labels, output, title, sample_rate),) = calls
    assert embeddings is report.embeddings and paths == report.clips.files
    assert labels == ["digit"] * 6 + ["sound"] * 6
    assert output == files[-1] == Path("out/map.html") and sample_rate == 16_000
    assert "set" in title and TINY.name in title


def test_map_without_umap(table, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UnsupportedError, match=r"the map: umap is not installed: .*m2d-embed\[eval\]"):
        run_probe(tiny, table, Path("out"), ProbeOptions(draw_map=True))
    assert not Path("out").exists()


def test_bad_files_are_all_named(table, model_folder):
    files = sorted((table.parent / "audio").iterdir())
    files[0].write_text("text")
    files[3].write_bytes(b"")
    result = run("probe", table, "--model", model_folder)
    assert result.returncode == 2
    assert f"2 of 12 files cannot be embedded:\n  {files[0]}: not audio" in result.stderr
    assert f"{files[3]}: the file is empty" in result.stderr
    files[3].unlink()
    result = run("probe", table, "--model", model_folder)
    assert result.returncode == 2 and "1 of 12 files are missing" in result.stderr


def test_a_file_that_breaks_off(table, tiny):
    samples = np.zeros(16_000, np.float32)
    samples[9_000] = np.nan
    broken = table.parent / "audio" / DIGITS[2].name
    soundfile.write(broken, samples, 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(AudioError, match=r"1 of 12 files cannot be embedded:\n  .*: sample 9000 is NaN or infinite"):
        run_probe(tiny, table)


def test_the_same_content_in_two_parts(table, model_folder):
    first, second = (table.parent / "audio" / DIGITS[i].name for i in (0, 1))
    shutil.copy(first, second)
    result = run("probe", table, "--model", model_folder)
    assert result.returncode == 2
    assert f"'audio/{first.name} = audio/{second.name}'" in result.stderr
    assert not (table.parent.parent / "cache").exists()  # nothing was embedded before
    table.write_text(table.read_text().replace(f"{second.name},digit,1", f"{second.name},sound,0"))
    assert "clips of the same content have different labels" in run("probe", table, "--model", model_folder).stderr
    table.write_text(table.read_text().replace(f"{second.name},sound,0", f"{second.name},digit,0"))
    result = run("probe", table, "--model", model_folder, "--probe", "knn")
    assert result.returncode == 0 and "note: 1 clips are copies of others in the same part." in result.stdout


def test_what_is_refused(table, model_folder, tmp_path):
    events = write_table(tmp_path / "events.csv", "file,label,onset,offset", [(DIGITS[0], "x", 0, 0.2)])
    one = write_table(tmp_path / "one.csv", "file,label", [(file, "x") for file in DIGITS])
    (tmp_path / "plain").touch()
    for arguments, message in [
        ((events,), "a table of events (columns onset and offset)"),
        ((one,), "at least two labels are needed"),
        ((tmp_path / "none.csv",), "cannot be read (No such file or directory)"),
        ((tmp_path / "set",), "at least two labels"),
        ((table, "--label-column", "mood"), "column 'mood' is missing"),
        ((table, "--limit", 3), "3 clips of 2 labels are too few"),
        ((table, "-o", tmp_path / "plain"), "is a file"),
        ((table, "--layers", "99"), "layer 99 does not exist"),
        ((table, "--probe", "knn", "--probe", "knn"), "each once"),
    ]:
        result = run("probe", *arguments, "--model", model_folder)
        assert result.returncode == 2 and message in result.stderr, (arguments, result)
        assert "Traceback" not in result.stderr


def test_without_scikit_learn(table, model_folder, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = run("probe", table, "--model", model_folder)
    assert result.returncode == 2 and "pip install 'm2d-embed[eval]'" in result.stderr
    with pytest.raises(UnsupportedError, match=r"m2d-embed\[eval\]"):
        run_probe(tiny, table)


def test_notes(tmp_path):
    header = "file,label,split,group"
    rows = [(f, f.name[0], "train", f.stem.split("_")[1]) for f in DIGITS]
    rows += [(f, "sound" if i else "rare", "test" if i == 2 else "train", "") for i, f in enumerate(SOUNDS[:4])]
    rows[0] = (*rows[0][:2], "test", "theo")
    with pytest.raises(ConfigError, match="column 'group' is empty"):
        read_labelled(write_table(tmp_path / "x.csv", header, rows))
    rows = [(*row[:3], row[3] or "none") for row in rows]
    notes = notes_on(read_labelled(write_table(tmp_path / "x.csv", header, rows)), list("abcdefghij"))
    assert notes == [
        "2 groups are both in training and in test ('none', 'theo'), so the scores say little about clips of new "
        "groups.",
        "2 labels are only trained on, never tested: '7', 'rare'.",
    ]
    rows = [(f, f.name[0] if i else "sound", i % 2) for i, f in enumerate(DIGITS)]
    rows += [(f, "sound", 1) for f in SOUNDS[:2]]
    clips = read_labelled(write_table(tmp_path / "y.csv", "file,label,fold", rows))
    assert notes_on(clips, list("aacdefgh")) == ["1 clips are copies of others in the same part."]
    clips = read_labelled(write_table(tmp_path / "z.csv", "file,label,fold", [*rows, (SOUNDS[3], "7", 2)]))
    assert notes_on(clips, list("abcdefghi")) == [
        "fold 2 has no clip of '3', 'sound', left out of its macro-F1 and mAP."
    ]


def test_names_of_data(tmp_path, monkeypatch):
    (tmp_path / "birds").mkdir()
    assert data_name(tmp_path / "birds" / "metadata.csv") == "birds"
    assert data_name(tmp_path / "birds" / "calls.csv") == "calls"
    assert data_name(tmp_path / "birds", "species") == "birds-species"
    monkeypatch.chdir(tmp_path / "birds")
    assert data_name(Path()) == data_name(Path("metadata.csv")) == "birds"


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs ../shared/data")
def test_the_bundled_model_names_spoken_digits(bundled):
    report, _ = run_probe(
        bundled, SHARED / "data" / "fsdd" / "metadata.csv", None, ProbeOptions(("linear",), limit=200)
    )
    assert report.scores["linear"]["accuracy"].value > 0.5


def test_groups_that_are_the_labels_are_no_note(tmp_path):
    rows = [(f, s := f.stem.split("_")[1], "train" if f.name[0] == "3" else "test", s) for f in DIGITS]
    clips = read_labelled(write_table(tmp_path / "x.csv", "file,label,split,group", rows))
    assert clips.shared_groups(0) == list(clips.label_names)
    assert notes_on(clips, list("abcdef")) == []
