"""The real hear-eval-kit, unmodified, over tasks of ours: where it is installed (benchmarks/hear/requirements.txt)."""

import csv
import importlib.util
import json
import sys

import numpy as np
import pytest
import soundfile
import torch

from benchmarks.hear import __main__ as command
from benchmarks.hear.convert import TaskOptions, check_vocabulary, convert, read_task
from m2d_embed import ConfigError

if importlib.util.find_spec("heareval") is None:
    pytest.skip("hear-eval-kit is not installed (benchmarks/hear/requirements.txt)", allow_module_level=True)

from benchmarks.hear import report
from benchmarks.hear.compat import checkpoints_readable, load_heareval
from benchmarks.hear.run import RunOptions, find_tasks, run
from m2d_embed.evaluate.scores import score_predictions

RATE = 16_000
SECONDS = 2.0
PITCH = {"low": 400, "high": 3000}
LOGMEL = RunOptions("benchmarks.hear.logmel_stats", grid_points=2)
#: A task may set the grid: this one is quick. Small batches, as a network that predicts no event when it is first
#: validated has no F-measure, and hear-eval-kit stops its training.
GRID = {"hidden_layers": [1], "hidden_dim": [64], "lr": [3.2e-3], "max_epochs": [30], "batch_size": [64]}

pytestmark = pytest.mark.filterwarnings("ignore")  # of many libraries, none of them ours


def sound(label, onset, offset, seed):
    rng = np.random.default_rng(seed)
    times = np.arange(round(SECONDS * RATE)) / RATE
    tone = 0.3 * np.sin(2 * np.pi * (PITCH[label] + 10 * (seed % 7)) * times) * ((times >= onset) & (times < offset))
    return (tone + 0.003 * rng.standard_normal(len(times))).astype(np.float32)


def write_table(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks of tones in noise: clips in parts, clips in folds, and events."""
    folder = tmp_path_factory.mktemp("hear")
    events, seed = [], 0
    for part, count in (("train", 16), ("valid", 6), ("test", 8)):
        for i in range(count):
            label, onset = list(PITCH)[i % 2], 0.3 + 0.05 * (i % 8)
            seed += 1
            soundfile.write(folder / f"{part}{i}.wav", sound(label, onset, onset + 0.8, seed), RATE)
            events.append(
                {"file": f"{part}{i}.wav", "label": label, "onset": onset, "offset": onset + 0.8, "split": part}
            )
    clips = [{"file": event["file"], "label": event["label"], "split": event["split"]} for event in events]
    folds = [{"file": clip["file"], "label": clip["label"], "fold": i % 3} for i, clip in enumerate(clips)]
    for name, rows in (
        ("parts", clips),
        ("folds", [{**f, "fold": (i // 2) % 3} for i, f in enumerate(folds)]),
        ("events", events),
    ):
        write_table(folder / f"{name}.csv", rows)
        convert(read_task(folder / f"{name}.csv"), folder / "tasks", TaskOptions(name, duration=SECONDS))
        metadata = folder / "tasks" / name / "task_metadata.json"
        content = json.loads(metadata.read_text()) | {"evaluation_params": {"task_specific_param_grid": GRID}}
        metadata.write_text(json.dumps(content))
    return folder / "tasks"


@pytest.fixture(scope="module")
def output(tasks, tmp_path_factory):
    """What log-mel statistics found on all of them."""
    output = tmp_path_factory.mktemp("output")
    run(LOGMEL, find_tasks(tasks), output)
    return output


@pytest.fixture
def finished(output):
    return {found.folder.name: found for found in report.find_finished(output)}


def test_tones_are_told_apart(finished):
    """A task that anything solves: labels, folds and times have come through."""
    scores = {
        name: json.loads((found.folder / "test.predicted-scores.json").read_text()) for name, found in finished.items()
    }
    assert set(scores) == {"parts", "folds", "events"}
    assert scores["parts"]["test"]["test_top1_acc"] > 0.8
    assert scores["folds"]["aggregated_scores"]["test_top1_acc_mean"] > 0.9
    assert scores["events"]["test"]["test_event_onset_200ms_fms"] > 0.9
    assert scores["events"]["test"]["test_segment_1s_er"] < 0.1


def test_the_kept_predictions_give_the_scores_stated(finished):
    for name in ("parts", "folds"):
        clips, predictions = report.tested_clips(finished[name])
        stated = report.stated_score(
            json.loads((finished[name].folder / "test.predicted-scores.json").read_text()), "top1_acc"
        )
        assert score_predictions(clips, predictions, 10)["accuracy"].value == pytest.approx(stated["value"], abs=1e-6)
        assert len(clips) == {"parts": 8, "folds": 30}[name]


def test_the_counts_of_events_give_the_scores_stated(finished):
    folder = finished["events"].folder
    part = json.loads((folder / "test.events.json").read_text())
    found = json.loads((folder / "test.predicted-scores.json").read_text())["test"]
    for score in ("event_onset_200ms_fms", "segment_1s_er"):
        hits, size = report.event_counts(part, score, ["high", "low"])
        assert len(hits) == 8
        assert hits.sum() / size.sum() == pytest.approx(found[f"test_{score}"], abs=1e-6)


def test_the_best_epoch_decides_the_postprocessing(tasks, tmp_path, monkeypatch):
    """hear-eval-kit sets the trainer's epoch before a test; were it not passed on, another epoch's would be taken."""
    load_heareval()
    module = sys.modules["heareval.predictions.task_predictions"]
    asked, kept = [], {}
    original = module.EventPredictionModel.epoch_best_postprocessing_or_default

    def recorded(self, epoch):
        if self.trainer.testing:
            asked.append(epoch)
            kept.update(self.epoch_best_postprocessing)
        return original(self, epoch)

    monkeypatch.setattr(module.EventPredictionModel, "epoch_best_postprocessing_or_default", recorded)
    (folder,) = run(RunOptions(LOGMEL.module, grid_points=1), find_tasks(tasks, ["events"]), tmp_path)
    found = json.loads((folder / "test.predicted-scores.json").read_text())
    assert asked == [found["test"]["epoch"]]
    assert asked[0] in kept
    assert len(kept) > 1  # there was something to choose


def test_finished_work_is_not_done_again(tasks, output, finished, monkeypatch):
    module = sys.modules["heareval.predictions.runner"]
    monkeypatch.setattr(module, "task_predictions", lambda **_: pytest.fail("trained again"))
    monkeypatch.setattr(
        sys.modules["heareval.embeddings.runner"], "task_embeddings", lambda *_: pytest.fail("embedded")
    )
    folders = run(LOGMEL, find_tasks(tasks), output)
    assert sorted(folders) == sorted(found.folder.resolve() for found in finished.values())
    other = RunOptions(LOGMEL.module, grid_points=3)
    assert other.folder(output) != LOGMEL.folder(output)


def test_another_task_of_the_same_name_is_refused(tasks, output, tmp_path):
    other = tmp_path / "tasks"
    convert(read_task(tasks.parent / "parts.csv"), other, TaskOptions("parts", duration=1.0))
    with pytest.raises(ConfigError, match="results of another task named parts"):
        run(LOGMEL, find_tasks(other), output)


def test_m2d_with_options(tasks, tmp_path):
    options = RunOptions("m2d_embed", model_options={"hop_ms": 40}, grid_points=1)
    (folder,) = run(options, find_tasks(tasks, ["parts"]), tmp_path)
    assert np.load(next((folder / "test").glob("*.npy"))).shape == (1920,)
    assert len((tmp_path / options.folder(tmp_path).name / "log.txt").read_text()) > 100


def test_checkpoints_are_read_without_running_them(output):
    (checkpoint, *_) = sorted(output.glob("**/*.ckpt"))
    with pytest.raises(Exception, match="weights_only"):
        torch.load(checkpoint, weights_only=True)
    with checkpoints_readable():
        assert "epoch" in torch.load(checkpoint, weights_only=True)
    with pytest.raises(Exception, match="weights_only"):
        torch.load(checkpoint, weights_only=True)


def test_report(output, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hear", "report", str(output), str(tmp_path / "report.json")])
    with pytest.raises(SystemExit) as raised:
        command.main()
    assert raised.value.code == 0
    collected = json.loads((tmp_path / "report.json").read_text())
    by_task = {result["task"]: result for result in collected["results"]}
    assert by_task["parts"]["scores"]["top1_acc"]["value"] > 0.8
    low, high = by_task["folds"]["scores"]["top1_acc"]["95 % interval"]
    assert low <= by_task["folds"]["scores"]["top1_acc"]["value"] <= high
    assert list(by_task["folds"]["scores"]["top1_acc"]["folds"]) == ["fold00", "fold01", "fold02"]
    assert by_task["events"]["test clips"] == 8
    assert "| log-mel mean and std | 160 | " in capsys.readouterr().out
    assert report.intervals(finished["parts"], 50).keys() == {"top1_acc", "mAP"}
    assert any(line.startswith("events, 8 test clips") for line in report.tables(report.collect(output)))


def test_our_probe_is_set_beside(output, tmp_path, capsys, monkeypatch):
    scores = {"log-mel mean and std": {"folds": {"mlp": {"accuracy": [90.0, 80.04, 95.0]}}, "events": {}}}
    (tmp_path / "quality.json").write_text(json.dumps({"scores in % with 95 % intervals": scores}))
    arguments = ["report", str(output), str(tmp_path / "report.json"), "--quality", str(tmp_path / "quality.json")]
    monkeypatch.setattr(sys, "argv", ["hear", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("| 90.0 (80.0 to 95.0) |")]
    assert len(rows) == 1
    assert rows[0].startswith("| folds | log-mel mean and std | ")


def test_what_does_not_exist_is_named(tasks, tmp_path):
    with pytest.raises(ConfigError, match="no task 'music'"):
        find_tasks(tasks, ["music"])
    with pytest.raises(ConfigError, match="no tasks here"):
        find_tasks(tmp_path)
    with pytest.raises(ConfigError, match="no such file or folder"):
        run(RunOptions("m2d_embed", model="org/name"), find_tasks(tasks), tmp_path)
    with pytest.raises(ConfigError, match="no_such_module"):
        run(RunOptions("no_such_module"), find_tasks(tasks), tmp_path)
    lacking = tmp_path / "tasks"
    convert(read_task(tasks.parent / "parts.csv"), lacking, TaskOptions("parts", rates=(8_000,), duration=SECONDS))
    with pytest.raises(ConfigError, match="16000/train is not a directory"):
        run(LOGMEL, find_tasks(lacking), tmp_path)
    with pytest.raises(ConfigError, match="no finished results"):
        report.collect(tmp_path)


def test_scores_that_json_cannot_hold():
    found = {"test": {"test_d_prime": float("inf"), "test_mAP": float("nan"), "test_top1_acc": 0.5}}
    assert [report.stated_score(found, name)["value"] for name in ("d_prime", "mAP", "top1_acc")] == [None, None, 0.5]


@pytest.mark.parametrize(
    "labels",
    [["01", "02"], ["1", "2"], ["1", "2.5"], ["1.5", "2.5"], ["1e3", "2"], ["nan", "a"], ["NA", "1"], ["None", "b"],
     ["true", "false"], ["True", "False"], ["True", "x"], ["01", "x"], ["1_000", "2"], ["inf", "2"], ["+1", "2"],
     ["0x10", "1"], ["1,5", "2"], ['say "a"', "b"], ["-0", "1"], ["١", "2"]],
)  # fmt: skip
def test_labels_are_refused_where_hear_eval_kit_would_change_them(labels, tmp_path):
    pandas = importlib.import_module("pandas")
    load_heareval()
    with (tmp_path / "labelvocabulary.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["idx", "label"], *enumerate(labels)])
    frame = pandas.read_csv(tmp_path / "labelvocabulary.csv")
    read = sys.modules["heareval.score"].label_vocab_as_dict(frame, key="label", value="idx")
    if list(read) == labels:
        check_vocabulary(labels)
    else:
        with pytest.raises(ConfigError, match="hear-eval-kit reads"):
            check_vocabulary(labels)
