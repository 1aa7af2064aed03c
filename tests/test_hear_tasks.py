"""Tasks for hear-eval-kit, soundscapes for them, and the baseline HEAR modules."""

import csv
import importlib
import json
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
from conftest import DATA

from benchmarks.hear import __main__ as command
from benchmarks.hear import logmel_stats, random_weights
from benchmarks.hear.convert import TaskOptions, check_vocabulary, convert, read_task, safe_names
from benchmarks.hear.timestamps import SoundscapeOptions, find_sound, make_soundscapes
from m2d_embed import AudioError, ConfigError
from m2d_embed.audio.clips import load_audio
from m2d_embed.labelled.events import read_events

RATE = 16_000


def tone(seconds: float, frequency: float = 440.0, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.fixture
def make_csv(tmp_path):
    """``make_csv(rows)``: a CSV of the rows and a tone for every file in it, each of another frequency."""

    def make(rows, name="data.csv", seconds=0.2):
        for number, file in enumerate(dict.fromkeys(row["file"] for row in rows)):
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, tone(seconds, 200 + 10 * number), RATE, subtype="FLOAT")
        path = tmp_path / name
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path

    return make


def clips(parts, labels=("cat", "dog"), column="split", per_part=2):
    return [
        {"file": f"{part}-{label}-{i}.wav", "label": label, column: part}
        for part in parts
        for label in labels
        for i in range(per_part)
    ]


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_a_task_with_three_parts(make_csv, tmp_path):
    data = make_csv(clips(["train", "valid", "test"]))
    task = convert(read_task(data), tmp_path / "tasks", TaskOptions("animals", rates=(RATE, 32_000)))
    assert task.folder == tmp_path / "tasks" / "animals"
    assert task.splits == {"train": 4, "valid": 4, "test": 4}
    metadata = read(task.folder, "task_metadata.json")
    assert metadata["task_name"] == "animals"
    assert (metadata["embedding_type"], metadata["prediction_type"]) == ("scene", "multiclass")
    assert (metadata["split_mode"], metadata["splits"]) == ("trainvaltest", ["train", "valid", "test"])
    assert metadata["sample_duration"] is None
    assert metadata["evaluation"] == ["top1_acc", "d_prime", "aucroc", "mAP"]
    assert (task.folder / "labelvocabulary.csv").read_text().split() == ["idx,label", "0,cat", "1,dog"]
    assert read(task.folder, "test.json") == {f"test-{name}-{i}.wav": [name] for name in ("cat", "dog") for i in (0, 1)}
    for rate in (RATE, 32_000):
        written, found = soundfile.read(task.folder / str(rate) / "valid" / "valid-dog-1.wav", dtype="float32")
        assert found == rate
        assert np.array_equal(written, load_audio(tmp_path / "valid-dog-1.wav", rate))


def test_where_the_data_has_no_validation_part_some_clips_are_held_out(make_csv, tmp_path):
    data = make_csv(clips(["train", "test"], per_part=10))
    task = convert(read_task(data), tmp_path / "tasks", TaskOptions("animals"))
    assert task.splits == {"train": 16, "valid": 4, "test": 20}
    with pytest.raises(ConfigError, match="too few clips to hold any out"):
        read_task(make_csv(clips(["train", "test"], per_part=1), "few.csv"))


def test_folds(make_csv, tmp_path):
    data = make_csv(clips(["3", "1", "2"], column="fold"))
    task = convert(read_task(data), tmp_path / "tasks", TaskOptions("animals"))
    assert task.splits == {"fold00": 4, "fold01": 4, "fold02": 4}
    assert read(task.folder, "task_metadata.json")["split_mode"] == "presplit_kfold"
    assert list(read(task.folder, "fold00.json")) == [f"1-{name}-{i}.wav" for name in ("cat", "dog") for i in (0, 1)]
    with (task.folder / "sources.csv").open(newline="") as stream:
        sources = {row["file"]: row for row in csv.DictReader(stream)}
    assert sources["3-dog-0.wav"] == {"split": "fold02", "file": "3-dog-0.wav", "source": str(tmp_path / "3-dog-0.wav")}


def test_folds_that_hear_cannot_rotate(make_csv):
    with pytest.raises(ConfigError, match="needs three or more"):
        read_task(make_csv(clips(["0", "1"], column="fold")))
    with pytest.raises(ConfigError, match="have no place"):
        read_task(make_csv(clips(["-1", "0", "1", "2"], column="fold")))


def test_a_label_that_only_the_validation_fold_trains_is_named(make_csv, tmp_path):
    rows = clips(["0", "1", "2"], column="fold")
    rows += [{"file": f"{fold}-owl.wav", "label": "owl", "fold": fold} for fold in ("0", "1")]
    task = convert(read_task(make_csv(rows)), tmp_path / "tasks", TaskOptions("animals"))
    assert task.notes == ["fold00 tests 'owl', which nothing but its validation part holds"]


def test_several_labels(make_csv, tmp_path):
    rows = [
        {"file": f"{part}{i}.wav", "labels": labels, "split": part}
        for part in ("train", "valid", "test")
        for i, labels in enumerate(["cat;dog", "dog", ""])
    ]
    task = convert(read_task(make_csv(rows)), tmp_path / "tasks", TaskOptions("animals"))
    metadata = read(task.folder, "task_metadata.json")
    assert (metadata["prediction_type"], metadata["evaluation"][0]) == ("multilabel", "mAP")
    assert read(task.folder, "test.json") == {"test0.wav": ["cat", "dog"], "test1.wav": ["dog"], "test2.wav": []}


def events(part, rows, seconds=1.0):
    return [
        {"file": f"{part}.wav", "label": label, "onset": onset, "offset": offset, "split": part}
        for label, onset, offset in rows
    ]


EVENTS = [
    *events("train", [("cat", 0.1, 0.4), ("dog", 0.5, 0.9)]),
    *events("valid", [("dog", 0.0, 0.25)]),
    *events("test", [("dog", 0.7, 0.9), ("cat", 0.25, 0.75)]),
]


def test_events_are_written_in_milliseconds(make_csv, tmp_path):
    task = convert(read_task(make_csv(EVENTS, seconds=1.0)), tmp_path / "tasks", TaskOptions("animals"))
    metadata = read(task.folder, "task_metadata.json")
    assert (metadata["embedding_type"], metadata["prediction_type"]) == ("event", "multilabel")
    assert metadata["evaluation"] == ["event_onset_200ms_fms", "segment_1s_er"]
    assert metadata["evaluation_params"] == {"task_specific_param_grid": {"check_val_every_n_epoch": [10]}}
    assert read(task.folder, "test.json") == {
        "test.wav": [
            {"label": "cat", "start": 250.0, "end": 750.0},
            {"label": "dog", "start": 700.0, "end": 900.0},
        ]
    }
    assert (task.events_cut, task.events_dropped) == (0, 0)


def test_a_grid_of_its_own(make_csv, tmp_path):
    data = read_task(make_csv(EVENTS, seconds=1.0))
    task = convert(data, tmp_path / "tasks", TaskOptions("animals", grid={"max_epochs": [50]}))
    grid = read(task.folder, "task_metadata.json")["evaluation_params"]["task_specific_param_grid"]
    assert grid == {"check_val_every_n_epoch": [10], "max_epochs": [50]}


def test_events_are_cut_with_their_clip(make_csv, tmp_path):
    options = TaskOptions("animals", duration=0.6)
    task = convert(read_task(make_csv(EVENTS, seconds=1.0)), tmp_path / "tasks", options)
    assert read(task.folder, "test.json") == {"test.wav": [{"label": "cat", "start": 250.0, "end": 600.0}]}
    assert (task.events_cut, task.events_dropped, task.trimmed) == (2, 1, 3)
    assert "events after the end of their clip: 1 left out, 2 cut short" in task.describe(options)


def test_an_event_after_the_end_of_its_clip(make_csv, tmp_path):
    data = make_csv([*EVENTS, *events("test", [("cat", 1.5, 1.6)])], seconds=1.0)
    with pytest.raises(ConfigError, match=r"test.wav: an event begins at 1.5 s, but the clip ends at 1 s"):
        convert(read_task(data), tmp_path / "tasks", TaskOptions("animals"))


def test_duration(make_csv, tmp_path):
    data = make_csv(clips(["train", "valid", "test"]))
    soundfile.write(tmp_path / "train-cat-0.wav", tone(0.5, 100), RATE)
    options = TaskOptions("animals", duration=0.3)
    task = convert(read_task(data), tmp_path / "tasks", options)
    assert (task.trimmed, task.padded) == (1, 11)
    assert "1 clips trimmed and 11 padded to 0.3 s" in task.describe(options)
    assert read(task.folder, "task_metadata.json")["sample_duration"] == 0.3
    files = list(task.folder.glob("16000/*/*.wav"))
    assert {soundfile.info(file).frames for file in files} == {4800}
    padded, _ = soundfile.read(task.folder / "16000" / "train" / "train-cat-1.wav")
    assert padded[:3200].std() > 0.1
    assert not padded[3200:].any()


def test_peaks_above_full_scale_are_kept(make_csv, tmp_path):
    data = make_csv(clips(["train", "valid", "test"]))
    soundfile.write(tmp_path / "test-cat-0.wav", tone(0.2, 100, level=1.5), RATE, subtype="FLOAT")
    task = convert(read_task(data), tmp_path / "tasks", TaskOptions("animals"))
    assert soundfile.read(task.folder / "16000" / "test" / "test-cat-0.wav")[0].max() > 1.4


def test_a_task_is_written_whole_or_not_at_all(make_csv, tmp_path):
    data = make_csv(clips(["train", "valid", "test"]))
    (tmp_path / "train-dog-1.wav").write_bytes(b"not audio")
    with pytest.raises(AudioError, match=r"1 clips cannot be read.*train-dog-1.wav"):
        convert(read_task(data), tmp_path / "tasks", TaskOptions("animals"))
    assert list((tmp_path / "tasks").iterdir()) == []


def test_an_existing_task_is_refused(make_csv, tmp_path):
    data = make_csv(clips(["train", "valid", "test"]))
    first = convert(read_task(data), tmp_path / "tasks", TaskOptions("animals"))
    with pytest.raises(ConfigError, match="animals exists already"):
        convert(read_task(data), tmp_path / "tasks", TaskOptions("animals"))
    assert first.folder.is_dir()


def test_the_version_is_of_what_was_written(make_csv, tmp_path):
    def version(name):
        task = convert(read_task(data), tmp_path / name, TaskOptions("animals"))
        return read(task.folder, "task_metadata.json")["version"]

    data = make_csv(clips(["train", "valid", "test"]))
    before = version("a")
    assert version("b") == before
    soundfile.write(tmp_path / "train-dog-1.wav", tone(0.2, 3000), RATE, subtype="FLOAT")
    assert version("c") != before


def test_the_same_content_in_two_parts_is_named(make_csv, tmp_path):
    data = make_csv(clips(["train", "valid", "test"]))
    (tmp_path / "test-cat-0.wav").write_bytes((tmp_path / "train-cat-0.wav").read_bytes())
    with pytest.raises(ConfigError, match=r"train-cat-0\.wav = test-cat-0\.wav"):
        read_task(data)


def test_safe_names(tmp_path):
    files = [tmp_path / name for name in ("a/x.wav", "b/x.flac", "b/X.wav", "c d/ü,1.5.wav", "x-2.wav", "?.wav")]
    assert safe_names(files) == ["x.wav", "x-2.wav", "X-3.wav", "_1_5.wav", "x-2-2.wav", "_.wav"]


@pytest.mark.parametrize(
    "labels",
    [["01", "dog"], ["0", "1", "10"], ["1.5", "2.5"], ["cat", "True"], ["True", "False"], ["1_0", "2"]],
)
def test_labels_that_survive(labels):
    check_vocabulary(labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["01", "2"], "'01' would change"),
        (["1", "2.5"], "'1' would change"),
        (["1e3", "2"], "'1e3', '2' would change"),
        (["NA", "dog"], "'NA' as a missing value"),
        (["TRUE", "False"], "truth values, so 'TRUE' would change"),
    ],
)
def test_labels_that_would_change(labels, message):
    with pytest.raises(ConfigError, match=message):
        check_vocabulary(labels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a/b"}, "name='a/b'"),
        ({"rates": ()}, "rates"),
        ({"duration": 0.0}, "duration=0"),
        ({"grid": {"max_epochs": 100}}, "'max_epochs' needs a list"),
    ],
)
def test_impossible_options(fields, message):
    with pytest.raises(ConfigError, match=message):
        TaskOptions(**({"name": "animals"} | fields))


def test_the_command_says_what_is_wrong(make_csv, tmp_path, monkeypatch, capsys):
    data = make_csv(clips(["0", "1"], column="fold"))
    monkeypatch.setattr(sys, "argv", ["hear", "convert", str(data), str(tmp_path / "tasks"), "--name", "animals"])
    with pytest.raises(SystemExit) as raised:
        command.main()
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {data}: HEAR trains")


# --- soundscapes ------------------------------------------------------------------------------------------------------


def test_find_sound():
    silence = np.zeros(RATE // 2, np.float32)
    quiet = tone(0.5, level=0.001)
    samples = np.concatenate([quiet, tone(0.1), silence[:2400], tone(0.2), quiet, tone(0.1, level=0.2), silence])
    start, stop = find_sound(samples, RATE)  # over the gap of 150 ms, not that of 500 ms
    assert start == pytest.approx(8_000, abs=160)
    assert stop == pytest.approx(8_000 + 1_600 + 2_400 + 3_200, abs=160)
    assert find_sound(silence, RATE) == (0, len(silence))
    assert find_sound(tone(0.003), RATE) == (0, 48)


@pytest.fixture
def beeps(make_csv, tmp_path):
    """Clips of three labels: 0.3 s of a tone, after 0.1 s of nothing and before 0.6 s of it."""
    data = make_csv(clips(["train", "valid", "test"], labels=("low", "mid", "high"), per_part=3))
    for number, file in enumerate(sorted(tmp_path.glob("*.wav"))):
        sound = tone(0.3, (400 if "low" in file.name else 3000) + number)
        soundfile.write(file, np.pad(sound, (1600, 9600)), RATE, subtype="FLOAT")
    return data


def test_soundscapes(beeps, tmp_path):
    options = SoundscapeOptions(
        labels=("low", "high"), counts=(3, 2, 2), seconds=4.0, events=(3, 5), snr_db=(20.0, 30.0)
    )
    found = make_soundscapes(beeps, tmp_path / "made", options)
    made = read_events(tmp_path / "made" / "events.csv")
    assert len(made) == 7
    assert sum(found.values()) == sum(map(len, made.events)) >= 3 * 7 - 3
    assert made.clips.label_names == ("high", "low")
    for file, placed in zip(made.clips.files, made.events, strict=True):
        samples, rate = soundfile.read(file)
        assert (rate, len(samples)) == (RATE, 4 * RATE)
        times = np.arange(len(samples)) / RATE
        inside = np.any([(times >= event.onset) & (times < event.offset) for event in placed], axis=0)
        assert samples[inside].std() > 5 * samples[~inside].std()
        for event in placed:
            assert event.offset - event.onset == pytest.approx(0.3, abs=0.02)
            assert samples[round((event.onset + 0.02) * RATE) :][: RATE // 10].std() > 5 * samples[~inside].std()


def test_soundscapes_of_different_parts_are_made_of_different_clips(beeps, tmp_path):
    make_soundscapes(beeps, tmp_path / "made", SoundscapeOptions(counts=(2, 2, 2), seconds=3.0, longest=1.0))
    with (tmp_path / "made" / "events.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["source"].split("-")[0] == row["split"] for row in rows} == {True}


def test_no_more_than_two_sounds_at_once_and_none_beside_its_like(beeps, tmp_path):
    options = SoundscapeOptions(counts=(4, 1, 1), seconds=2.0, events=(16, 16), longest=0.5)
    make_soundscapes(beeps, tmp_path / "made", options)
    for placed in read_events(tmp_path / "made" / "events.csv").events:
        assert len(placed) < 16  # there is no room for so many
        for event in placed:
            assert sum(e.onset <= event.onset < e.offset for e in placed) <= 2
            like = [e for e in placed if e is not event and e.label == event.label]
            assert all(e.onset >= event.offset + 0.249 or event.onset >= e.offset + 0.249 for e in like)


def test_soundscapes_are_seeded(beeps, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_soundscapes(beeps, tmp_path / name, SoundscapeOptions(counts=(1, 1, 1), seconds=2.0, seed=seed))
    a, b, c = (soundfile.read(tmp_path / name / "audio" / "train-000.wav")[0] for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_background_of_clips(beeps, tmp_path):
    options = SoundscapeOptions(("high",), background=("low",), counts=(1, 1, 1), seconds=3.0, events=(1, 1))
    make_soundscapes(beeps, tmp_path / "made", options)
    made = read_events(tmp_path / "made" / "events.csv")
    assert made.clips.label_names == ("high",)
    samples, _ = soundfile.read(made.clips.files[0])
    (event,) = made.events[0]
    before = samples[: round(event.onset * RATE)] if event.onset > 1 else samples[round(event.offset * RATE) :]
    spectrum = np.abs(np.fft.rfft(before))
    assert np.fft.rfftfreq(len(before), 1 / RATE)[spectrum.argmax()] == pytest.approx(400, abs=20)


def test_impossible_soundscapes(beeps, tmp_path):
    with pytest.raises(ConfigError, match="no label 'medium'"):
        make_soundscapes(beeps, tmp_path / "made", SoundscapeOptions(labels=("medium",)))
    assert not (tmp_path / "made").exists()
    with pytest.raises(ConfigError, match="cannot be both"):
        SoundscapeOptions(labels=("low",), background=("low",))
    with pytest.raises(ConfigError, match="longest=20 s"):
        SoundscapeOptions(longest=20.0)
    make_soundscapes(beeps, tmp_path / "made", SoundscapeOptions(counts=(1, 1, 1), seconds=2.0))
    with pytest.raises(ConfigError, match="exists already"):
        make_soundscapes(beeps, tmp_path / "made", SoundscapeOptions())


# --- baseline modules -------------------------------------------------------------------------------------------------


def test_log_mel_statistics(noise):
    model = logmel_stats.load_model()
    audio = noise(1.0, batch=2)
    scene = logmel_stats.get_scene_embeddings(audio, model)
    log_mel = model(audio)
    assert scene.shape == (2, model.scene_embedding_size) == (2, 160)
    torch.testing.assert_close(scene[:, :80], log_mel.mean(2))
    torch.testing.assert_close(scene[:, 80:], log_mel.std(2, correction=0))
    embeddings, timestamps = logmel_stats.get_timestamp_embeddings(audio, model)
    assert embeddings.shape == (2, timestamps.shape[1], 160)
    assert timestamps[1].tolist() == list(range(0, 1001, 50))
    torch.testing.assert_close(embeddings[:, 2, :80], log_mel[:, :, 2:19].mean(2))
    torch.testing.assert_close(embeddings[:, 2, 80:], log_mel[:, :, 2:19].std(2, correction=0))
    with pytest.raises(ConfigError, match="no weights"):
        logmel_stats.load_model("weights.pt")


def test_log_mel_statistics_of_very_short_sounds():
    model = logmel_stats.load_model()
    embeddings, timestamps = logmel_stats.get_timestamp_embeddings(torch.zeros(1, 100), model)
    assert embeddings.shape == (1, 1, 160)
    assert timestamps.tolist() == [[0.0]]
    assert logmel_stats.get_scene_embeddings(torch.zeros(1, 100), model).isfinite().all()


def test_random_weights(bundled, noise):
    model = random_weights.load_model(hop_ms=40)
    assert model.config == bundled.config
    audio = noise(1.0)
    first = random_weights.get_scene_embeddings(audio, model)
    assert torch.equal(first, random_weights.get_scene_embeddings(audio, random_weights.load_model()))
    assert not torch.allclose(first, random_weights.get_scene_embeddings(audio, random_weights.load_model(seed=1)))
    assert not torch.allclose(first, bundled.scene(audio))
    assert random_weights.get_timestamp_embeddings(audio, model)[1][0, :2].diff().item() == pytest.approx(40)
    with pytest.raises(ConfigError, match="drawn, not loaded"):
        random_weights.load_model("weights.pt")


@pytest.mark.filterwarnings("ignore:.*(IMPORTANT|Your timestamps|We suggest|interval between)")
@pytest.mark.parametrize("name", ["benchmarks.hear.logmel_stats", "benchmarks.hear.random_weights"])
def test_hearvalidator_on_the_baselines(name, monkeypatch, capsys):
    tensorflow = types.ModuleType("tensorflow")  # which the validator imports for isinstance checks alone
    tensorflow.Module = type("Module", (), {})
    tensorflow.Tensor = type("Tensor", (), {})
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    pytest.importorskip("hearvalidator.validate", reason="pip install --no-deps --ignore-requires-python hearvalidator")
    importlib.import_module("hearvalidator.validate").ValidateModel(name, "", device="cpu")()
    assert "Received embedding of shape" in capsys.readouterr().out


def test_models_hear_from_a_task_what_they_hear_from_the_files(tmp_path):
    path = tmp_path / "real.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "label", "split"])
        for part, speaker in (("train", "nicolas"), ("valid", "theo"), ("test", "jackson")):
            writer.writerows((DATA / "digits" / f"{digit}_{speaker}_0.opus", f"digit {digit}", part) for digit in "37")
    task = convert(read_task(path), tmp_path / "tasks", TaskOptions("real"))
    with (task.folder / "sources.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6
    for row in rows:
        written, _ = soundfile.read(task.folder / "16000" / row["split"] / row["file"], dtype="float32")
        assert np.array_equal(written, load_audio(row["source"], RATE))
