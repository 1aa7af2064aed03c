"""Fine-tuning from a recipe to an exported classifier: what is learned, left alone, resumed, refused."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import TINY, random_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import BatchNorm1d
from typer.testing import CliRunner

import m2d_embed
from m2d_embed import cli
from m2d_embed.config import HeadConfig
from m2d_embed.errors import AudioError, ConfigError, TrainingError
from m2d_embed.evaluate.linear_probe import linear_predictions
from m2d_embed.finetune import evaluate
from m2d_embed.finetune.augment import kept_patches
from m2d_embed.finetune.crops import TrainingClips, num_columns
from m2d_embed.finetune.loop import finetune
from m2d_embed.finetune.network import build_classifier
from m2d_embed.finetune.optim import layer_groups, loss_per_row
from m2d_embed.finetune.recipe import DataSection, FinetuneRecipe, StartSection, load_recipe
from m2d_embed.labelled.clips import read_labelled
from m2d_embed.model.encoder import attend, sincos_positions
from m2d_embed.training import run_state
from m2d_embed.training.average import Average, scaled_decay
from m2d_embed.training.monitor import RunLog
from m2d_embed.training.run_state import RunState
from m2d_embed.training.trainer import Trainer

RATE = 16_000
QUICK = (
    "training.precision=fp32",
    "training.batch_size=8",
    "training.lr=0.01",
    "training.log_every=1",
    "training.epochs=2",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model with random weights."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    random_model(dataclasses.replace(TINY, name="tiny", license="CC0-1.0")).save_pretrained(folder)
    return folder


def tone(file, hertz, seconds, seed, onset=0.0):
    rng = np.random.default_rng(seed)
    t = np.arange(round(RATE * seconds)) / RATE
    sound = 0.02 * rng.standard_normal(len(t)) + 0.4 * np.sin(2 * np.pi * hertz * t) * (t >= onset)
    soundfile.write(file, sound.astype(np.float32), RATE)


def write_table(file, rows):
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Twenty-four clips, shorter and longer than the tiny model's window of 0.64 s, in three folds: low and high."""
    folder = tmp_path_factory.mktemp("tones")
    rows = []
    for i in range(24):
        high = i % 2
        tone(folder / f"{i:02d}.wav", (2500 if high else 300) + 20 * i, 0.3 + 0.025 * i, i)
        rows.append({"file": f"{i:02d}.wav", "label": ["low", "high"][high], "fold": i // 2 % 3})
    write_table(folder / "tones.csv", rows)
    write_table(folder / "several.csv", [{**row, "label": f"{row['label']};any"} for row in rows])
    words = ["train", "valid", "test"]
    write_table(
        folder / "split.csv", [{**{k: r[k] for k in ("file", "label")}, "split": words[r["fold"]]} for r in rows]
    )
    return folder


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Nine clips of 1.2 s in which a tone begins in the middle."""
    folder = tmp_path_factory.mktemp("events")
    rows = []
    for i in range(9):
        high, onset = i % 2, 0.3 + 0.05 * i
        tone(folder / f"{i}.wav", (2500 if high else 300) + 20 * i, 1.2, i, onset)
        rows.append({"file": f"{i}.wav", "label": ["low", "high"][high], "onset": onset, "offset": 1.2, "fold": i % 3})
    return write_table(folder / "events.csv", rows)


@pytest.fixture
def recipe(tmp_path, tones, base):
    """``recipe("training.steps=3", ...)``: a quick run with overrides."""

    def make(*overrides, data=None, output="run", model=base, **fields):
        given = [f"data.source={data or tones / 'tones.csv'}", f"start.model={model}", f"output={tmp_path / output}"]
        return load_recipe("", [*QUICK, *overrides, *given, *(f"data.{key}={value}" for key, value in fields.items())])

    return make


def losses(folder):
    return [row["loss"] for row in RunLog.read(Path(folder)) if "loss" in row]


def final_state(folder):
    return RunState.read(run_state.latest(Path(folder)))


def exported(run):
    return m2d_embed.load_model(str(run.folder / "export"))


def results(run):
    return json.loads((run.folder / "results.json").read_text())


def predictions(run):
    with (run.folder / "predictions.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def stop_at(monkeypatch, step):
    """Have the run see a stop signal once it has taken ``step`` steps."""
    original = Trainer.take_step

    def stepping(self, batches):
        values = original(self, batches)
        self.stop.wanted = self.step >= step
        return values

    monkeypatch.setattr(Trainer, "take_step", stepping)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_round_trip_through_yaml(tmp_path, recipe):
    run = recipe("lora.rank=4", "augment.patch_dropout=[0, 1]", "training.lr=1e-3", fold="2")
    (tmp_path / "again.yaml").write_text(run.to_yaml())
    again = load_recipe(str(tmp_path / "again.yaml"))
    assert again == run
    assert again.differences(run.to_dict()) == []
    changed = load_recipe(str(tmp_path / "again.yaml"), ["lora.rank=8", "training.log_every=7", "output=elsewhere"])
    assert changed.differences(run.to_dict()) == ["lora.rank: 4 -> 8"]
    (tmp_path / "number.yaml").write_text("data: {source: x, fold: 1}\n")
    assert load_recipe(str(tmp_path / "number.yaml")).data.fold == "1"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epoch=3"], "there is no key 'training.epoch'.*training.epochs"),
        (["rank=3"], "did you mean lora.rank"),
        (["training.epochs=many"], "'epochs' must be float"),
        (["training.epochs=0"], "epochs must be positive"),
        (["training.batch_size=1"], "batch_size must be 2 or more"),
        (["training.layer_decay=0"], "layer_decay"),
        (["training.warmup=1"], "warmup"),
        (["training.label_smoothing=1"], "label_smoothing"),
        (["training.average_decay=1"], "training.average_decay"),
        (["augment.mixup=-1"], "mixup"),
        (["training.lr=.nan"], "lr must be positive"),
        (["training.precision=fp8"], "'precision' must be"),
        (["model.features=both"], "'features' must be"),
        (["model.scene_pooling=max"], "'scene_pooling' must be"),
        (["spec_augment.max_freq=16"], "spec_augment.max_freq is a share"),
        (["lora.targets=[query]"], "lora.targets are among qkv, proj, fc1, fc2, not query"),
        (["lora.rank=2", "model.freeze_encoder=true"], "contradict"),
        (["augment.patch_dropout=[1, 0]"], "stacked features need every row"),
        (["data.fold=first"], "fold is a number"),
        (["data.fold=none", "training.patience=3"], "patience needs clips"),
    ],
)
def test_impossible_settings_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("", [*overrides, "data.source=x"])


def test_names_of_data_and_runs():
    recipe = FinetuneRecipe(DataSection("/sounds/esc50/metadata.csv"))
    assert recipe.folder == Path("runs/finetune-esc50-m2d_vit_tiny-80x304p16x16")
    assert FinetuneRecipe(DataSection("/sounds/birds.csv"), start=StartSection("a/b")).folder == Path(
        "runs/finetune-birds-b"
    )
    assert FinetuneRecipe(DataSection("/sounds/dogs/")).data_name == "dogs"


# --- model and optimiser ----------------------------------------------------------------------------------------------


def with_head(config, *head):
    return dataclasses.replace(config, head=HeadConfig(*head))


@pytest.mark.parametrize("features", ["stacked", "flat"])
@pytest.mark.parametrize("per_column, pooling", [(False, "mean"), (False, "mean_std"), (True, "mean")])
def test_a_padded_crop_is_what_inference_gives_for_its_audio_alone(tiny, features, per_column, pooling):
    config = with_head(tiny.config, ("a", "b", "c"), features, True, pooling)
    network = build_classifier(tiny, config, per_column, seed=1).eval()
    model = m2d_embed.M2D(config).eval()
    model.load_state_dict(network.state_dict())
    frames = torch.tensor([3, 17, 23, 24, 40, 55, 57, 64])  # less and more than half of the last patch
    mask = torch.stack([torch.arange(4) < num_columns(int(n), config) for n in frames])
    padded = torch.full((len(frames), 1, 80, 64), 0.0)
    alone = []
    for row, n in enumerate(frames.tolist()):
        clip = torch.randn(1, 1, 80, n, generator=torch.Generator().manual_seed(row))
        padded[row, ..., :n] = clip
        alone.append(model.frame_logits(clip)[0] if per_column else model.logits(clip)[0])
    with torch.no_grad():
        logits = network(padded, frames, mask)
    for row, expected in enumerate(alone):
        found = logits[row, mask[row]] if per_column else logits[row]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if per_column:
        assert (logits[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_not_attended_to(dtype):
    """Both ways to attend: the fused kernel, and the products that are quicker in bfloat16 on a CPU."""
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    attended = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])[:, None, None]
    found = attend(q, k, v, attended)
    torch.testing.assert_close(found[:1], attend(q[:1], k[:1], v[:1]), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found[1:], attend(q[1:], k[1:, :, :4], v[1:, :, :4]), rtol=2e-2, atol=2e-2)


def test_statistics_of_the_head_leave_out_padding(tiny):
    config = with_head(tiny.config, ("a", "b"), "flat", True)
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    log_mel = torch.randn(2, 1, 80, 64)
    networks = [build_classifier(tiny, config, True, seed=1).train() for _ in range(2)]
    networks[0](log_mel, torch.tensor([64, 16]), mask)
    features = networks[1].encoder(log_mel[:1])[0].mean(1), networks[1].encoder(log_mel[1:, ..., :16])[0].mean(1)
    networks[1].head(torch.cat([features[0][0], features[1][0]]))
    torch.testing.assert_close(networks[0].head.norm.running_mean, networks[1].head.norm.running_mean)
    torch.testing.assert_close(networks[0].head.norm.running_var, networks[1].head.norm.running_var)


def test_dropped_patches_are_not_encoded(tiny):
    """Patches that are left out do not matter, and those that are kept keep their places."""
    config = with_head(tiny.config, ("a", "b"), "flat", True)
    network = build_classifier(tiny, config, True, seed=1).eval()
    log_mel, frames, mask = torch.randn(2, 1, 80, 64), torch.tensor([64, 64]), torch.ones(2, 4, dtype=torch.bool)
    kept = kept_patches((5, 4), 2, 1, np.random.default_rng(0))
    changed = log_mel.clone()
    for row in set(range(5)) - set(kept.rows.tolist()):
        changed[:, :, 16 * row : 16 * row + 16] += 1
    for column in set(range(4)) - set(kept.columns.tolist()):
        changed[..., 16 * column : 16 * column + 16] += 1
    with torch.no_grad():
        found = network(log_mel, frames, mask, kept)
        assert found.shape == (2, 3, 2)
        assert torch.equal(found, network(changed, frames, mask, kept))
        every = kept_patches((5, 4), 0, 0, np.random.default_rng(0))
        torch.testing.assert_close(network(log_mel, frames, mask, every), network(log_mel, frames, mask))


def test_lower_layers_learn_more_slowly(tiny):
    config = with_head(tiny.config, ("a", "b"), "stacked", False)
    network = build_classifier(tiny, config, False, seed=0)
    rates, decays = {}, {}
    for group in layer_groups(network, lr=1.0, layer_decay=0.5, weight_decay=0.1):
        assert group["lr"] == group["lr_scale"]
        for name, parameter in network.named_parameters():
            if any(parameter is p for p in group["params"]):
                assert name not in rates
                rates[name], decays[name] = group["lr"], group["weight_decay"]
    assert rates.keys() == dict(network.named_parameters()).keys()
    assert rates["head.linear.weight"] == rates["encoder.norm.weight"] == 1.0
    assert [rates[f"encoder.blocks.{i}.attn.qkv.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert rates["encoder.patch_embed.proj.weight"] == rates["encoder.cls_token"] == 0.0625
    assert decays["encoder.blocks.1.mlp.fc1.weight"] == decays["encoder.patch_embed.proj.weight"] == 0.1
    for name in ("encoder.cls_token", "encoder.norm.weight", "head.linear.bias", "encoder.blocks.0.attn.qkv.bias"):
        assert decays[name] == 0.0, name
    network.encoder.patch_embed.requires_grad_(False)
    left = sum(len(group["params"]) for group in layer_groups(network, 1.0, 0.5, 0.1))
    assert left == len(rates) - 2


def test_losses():
    logits = torch.randn(4, 3)
    classes = torch.tensor([0, 2, 1, 1])
    targets = F.one_hot(classes, 3).float()
    for smoothing in (0.0, 0.2):
        expected = F.cross_entropy(logits, classes, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(loss_per_row(logits, targets, False, smoothing), expected)
    mixed = 0.3 * targets + 0.7 * targets.flip(0)
    expected = F.cross_entropy(logits, mixed, reduction="none")
    torch.testing.assert_close(loss_per_row(logits, mixed, False, 0.0), expected)
    p = logits.sigmoid()
    bce = -(mixed * p.log() + (1 - mixed) * (1 - p).log()).mean(dim=1)
    torch.testing.assert_close(loss_per_row(logits, mixed, True, 0.0), bce)
    assert float(loss_per_row(torch.zeros(1, 1), torch.ones(1, 1), True, 0.2)) == pytest.approx(np.log(2))


def test_average_of_the_weights():
    module = torch.nn.BatchNorm1d(1)
    average = Average(module, 0.5)
    expected = [0.0, 0.0]  # of weights that are set to 1, 2, 3 ...
    with torch.no_grad():
        module.weight.zero_()
        average.tensors["weight"].zero_()
        for step in range(20):
            module.weight.fill_(step + 1)
            module.running_mean.fill_(-step - 1)
            average.update(module, step)
            decay = min(0.5, (1 + step) / (10 + step))
            expected = [decay * expected[0] + (1 - decay) * (step + 1), decay * expected[1] - (1 - decay) * (step + 1)]
    assert float(average.tensors["weight"]) == pytest.approx(expected[0])
    assert float(average.tensors["running_mean"]) == pytest.approx(expected[1])
    assert average.tensors["num_batches_tracked"] == 0
    assert scaled_decay(0.9, 10) == 0.9
    assert scaled_decay(None, 1000) == pytest.approx(1 - 1 / 50)
    assert scaled_decay(None, 5) == 0.0


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_exports_a_classifier(recipe, tones, base):
    run = recipe("training.epochs=10", "augment.mixup=0")
    scores = finetune(run)
    assert scores["accuracy"]["value"] == 1.0
    assert results(run)["scores"]["accuracy"]["value"] == 1.0
    assert np.mean(losses(run.folder)[-4:]) < np.mean(losses(run.folder)[:4]) - 0.1
    assert len(losses(run.folder)) == 20
    model = exported(run)
    assert model.config.head == HeadConfig(("high", "low"), "stacked", False)
    assert model.config.name == "tones-tiny"
    assert model.config.license == "CC0-1.0"
    rows = predictions(run)
    assert [Path(row["file"]).name for row in rows] == [f"{i:02d}.wav" for i in range(24) if i // 2 % 3 == 0]
    for row in rows:
        samples, _ = soundfile.read(row["file"], dtype="float32")
        with torch.no_grad():
            said = model.head.probabilities(model.logits(torch.from_numpy(samples)[None]))[0]
        assert [float(row["high"]), float(row["low"])] == pytest.approx(said.tolist(), abs=1e-4)
        assert row["predicted"] == row["label"]
    card = (run.folder / "export" / "README.md").read_text()
    for said in ("Begun from: tiny", "CC0-1.0", "16 trained on, 8 tested", "fold 0: accuracy 100.0 %", "20 steps of 8"):
        assert said in card, said
    assert (run.folder / "curve.png").stat().st_size > 5000
    assert (run.folder / "recipe.yaml").exists()
    assert list((run.folder / "tensorboard").iterdir())
    assert sorted(f.name for f in (run.folder / "checkpoints").iterdir()) == [
        "step-000000018.ckpt",
        "step-000000020.ckpt",
    ]
    before = (run.folder / "log.jsonl").read_text()
    assert finetune(run)["accuracy"] == scores["accuracy"]
    assert (run.folder / "log.jsonl").read_text() == before


@pytest.mark.parametrize("chosen, expected", [("null", "mean_std"), ("mean", "mean")])
def test_the_head_sees_what_scene_embeddings_of_the_model_are_made_of(recipe, tmp_path, chosen, expected):
    folder = tmp_path / "deviating"
    random_model(dataclasses.replace(TINY, scene_pooling="mean_std")).save_pretrained(folder)
    run = recipe("training.epochs=10", "augment.mixup=0", f"model.scene_pooling={chosen}", model=folder)
    assert finetune(run)["accuracy"]["value"] == 1.0
    model = exported(run)
    assert model.config.head.scene_pooling == expected
    model.features = model.head_features()
    for row in predictions(run):
        with torch.no_grad():
            [logits] = model.head(torch.as_tensor(model.encode(row["file"]))[None])
        [top, _] = model.head.top_tags(logits, 2)
        assert top.label == row["predicted"]
        assert top.score == pytest.approx(float(row[top.label]), abs=1e-4)


@pytest.mark.parametrize("setting", ["model.scene_pooling=mean_std", "start.head=probe"])
def test_what_is_of_whole_clips_is_not_for_events(recipe, events, setting):
    with pytest.raises(ConfigError, match=rf"{setting} is of whole clips.*leave it out"):
        finetune(recipe(setting, data=events))


@pytest.mark.parametrize("table", ["tones.csv", "several.csv"])
@pytest.mark.parametrize("settings", [(), ("lora.rank=2",), ("model.features=flat", "model.scene_pooling=mean_std")])
def test_fine_tuning_begins_where_the_linear_probe_ends(recipe, tones, base, table, settings):
    """A run whose steps change nothing says of the tested clips what the linear probe says."""
    run = recipe("training.steps=1", "training.lr=1e-12", "training.average_decay=0", *settings, data=tones / table)
    finetune(run)
    model = m2d_embed.load_model(str(base), flat="model.features=flat" in settings)
    model.features = dataclasses.replace(model.features, scene_pooling=exported(run).config.head.scene_pooling)
    clips = read_labelled(tones / table)
    embeddings = np.stack([model.encode(file) for file in clips.files])
    probed = next(iter(linear_predictions(embeddings, clips)))
    said = {Path(row["file"]).name: row for row in predictions(run)}
    assert len(said) == len(probed.test) > 0
    for row, scores in zip(probed.test, probed.scores, strict=True):
        found = [float(said[clips.files[row].name][label]) for label in clips.label_names]
        assert found == pytest.approx(scores.tolist(), abs=0.02)


@pytest.mark.parametrize("settings", [(), ("lora.rank=2",), ("model.scene_pooling=mean_std", "start.head=random")])
def test_the_head_normalises_with_statistics_of_whole_clips(recipe, tones, settings):
    """Not with those of the crops it was trained on, which augmentation has changed."""
    run = recipe(*settings)
    finetune(run)
    model = exported(run)
    model.features = model.head_features()
    clips = read_labelled(tones / "tones.csv")
    trained, _ = clips.split(0)
    scenes = np.stack([model.encode(clips.files[row]) for row in trained])
    np.testing.assert_allclose(model.head.norm.running_mean, scenes.mean(axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(model.head.norm.running_var, scenes.var(axis=0), rtol=1e-2, atol=1e-4)
    if settings[:1] == ("lora.rank=2",):
        saved = load_file(run.folder / "adapter" / "head.safetensors")
        assert torch.equal(saved["head.norm.running_mean"], model.head.norm.running_mean)


def test_the_head_for_events_normalises_with_statistics_of_columns(recipe, events):
    run = recipe("training.steps=1", data=events)
    finetune(run)
    model = exported(run)
    model.features = model.head_features()
    with events.open(newline="") as stream:
        files = [row["file"] for row in csv.DictReader(stream) if row["fold"] != "0"]
    audio = [torch.from_numpy(soundfile.read(events.parent / file, dtype="float32")[0]) for file in files]
    with torch.no_grad():
        columns = torch.cat([model.encode_frames(samples[None])[0] for samples in audio]).numpy()
    np.testing.assert_allclose(model.head.norm.running_mean, columns.mean(axis=0), rtol=1e-3, atol=1e-3)


def test_a_head_that_begins_at_random(recipe, capsys):
    run = recipe("training.steps=1", "start.head=random", "training.lr=null")
    finetune(run)
    assert "begins as the linear probe" not in capsys.readouterr().err
    assert (results(run)["head_start"], results(run)["lr"]) == ("random", 1e-3)


def test_the_rate_after_a_probe_is_lower(recipe):
    run = recipe("training.steps=1", "training.lr=null")
    finetune(run)
    assert (results(run)["head_start"], results(run)["lr"]) == ("probe", 3e-4)


def test_several_labels_a_clip(recipe, tones):
    run = recipe("training.epochs=10", data=tones / "several.csv")
    scores = finetune(run)
    assert scores.keys() == {"macro-F1", "mAP"}
    assert scores["mAP"]["value"] > 0.95
    assert exported(run).config.head == HeadConfig(("any", "high", "low"), "stacked", True)
    assert predictions(run)[0]["label"] == "any;low"


def test_events_in_time(recipe, events):
    run = recipe("training.epochs=60", "augment.mixup=0", "training.label_smoothing=0", data=events)
    scores = finetune(run)
    assert scores["frame map"]["value"] > 0.9
    assert results(run)["task"] == "events"
    found = predictions(run)
    assert {row["label"] for row in found} == {"low", "high"}
    printed = CliRunner().invoke(
        cli.app, ["tag", str(events.parent / "1.wav"), "--model", str(run.folder / "export"), "--frames", "--json"]
    )
    columns = [json.loads(line) for line in printed.stdout.splitlines()]
    assert columns[0]["tags"]["high"] < 0.5 < columns[-1]["tags"]["high"]  # onset at 0.35 s


def test_events_with_dropped_columns(recipe, events):
    run = recipe("augment.patch_dropout=[0, 2]", "model.features=flat", "training.steps=3", data=events)
    finetune(run)
    assert np.isfinite(losses(run.folder)).all()


def test_steps_follow_the_recipe(recipe, monkeypatch):
    """Rates that differ from layer to layer, rise and fall; gradients that are clipped; decay of matrices alone."""
    seen, norms = [], []
    original = torch.optim.AdamW.step

    def step(self, *arguments, **options):
        groups = self.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if gradients:
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
            seen.append({(group["lr"], group["weight_decay"]) for group in groups})
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run = recipe(
        "training.steps=4",
        "training.warmup=0.5",
        "training.layer_decay=0.5",
        "training.weight_decay=0.03",
        "training.clip_norm=0.01",
    )
    finetune(run)
    for share, groups in zip((1 / 3, 2 / 3, 1.0, 0.5), seen[:4], strict=True):
        expected = {(0.01 * share * 0.5**level, decay) for level in range(5) for decay in (0.0, 0.03)}
        assert sorted(groups) == [pytest.approx(pair) for pair in sorted(expected)]
    assert norms[:4] == pytest.approx([0.01] * 4, rel=1e-3)
    assert [row["lr"] for row in RunLog.read(run.folder)] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.005])


@pytest.mark.parametrize(
    "overrides",
    [
        (
            "augment.mixup=0.5",
            "augment.gain_db=6",
            "augment.patch_dropout=[2, 1]",
            "model.features=flat",
            "data.balanced=true",
        ),
        ("lora.rank=2", "training.patience=5"),
        ("training.average_decay=0.5", "model.freeze_patch_embed=true", "data.crop_seconds=0.3"),
        ("training.micro_batch=4", "training.average_decay=0", "training.save_every=1", "training.drop_path=0.5"),
    ],
)
def test_resuming_changes_nothing(overrides, recipe, tones, monkeypatch):
    data = tones / "split.csv" if "training.patience=5" in overrides else None
    whole, broken = (recipe(*overrides, "training.epochs=3", data=data, output=name) for name in ("whole", "broken"))
    expected = finetune(whole)
    total = len(losses(whole.folder))
    assert total == 3 if data else 6
    for stop in (1, total - 1):
        with monkeypatch.context() as patched:
            stop_at(patched, stop)
            assert finetune(broken) is None
        assert final_state(broken.folder).step == stop
    found = finetune(broken)
    assert losses(broken.folder) == losses(whole.folder)
    assert found == expected
    states = [final_state(run.folder) for run in (whole, broken)]
    for name, tensor in states[0].model.items():
        assert torch.equal(tensor, states[1].model[name]), name
    models = [exported(run).state_dict() for run in (whole, broken)]
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name


def test_accumulated_micro_batches_are_one_batch(recipe, monkeypatch):
    """But for the statistics of the head, which are of a micro-batch; here they stay as they are."""
    monkeypatch.setattr(BatchNorm1d, "train", lambda self, mode=True: nn.Module.train(self, False))
    settings = ("training.epochs=3", "model.features=flat", "augment.patch_dropout=[0, 1]")
    at_once, pieces = recipe(*settings, output="once"), recipe(*settings, "training.micro_batch=2", output="pieces")
    finetune(at_once)
    finetune(pieces)
    assert len(losses(pieces.folder)) == 6
    assert losses(pieces.folder) == pytest.approx(losses(at_once.folder), abs=1e-5)


def test_each_fold_in_turn(recipe, tones):
    run = recipe("training.steps=2", fold="all")
    together = finetune(run)
    parts = [json.loads((run.folder / f"fold-{fold}" / "results.json").read_text()) for fold in range(3)]
    accuracy = [part["scores"]["accuracy"]["value"] for part in parts]
    assert together["accuracy"]["value"] == pytest.approx(np.mean(accuracy))
    assert list(together["accuracy"]["by_fold"].values()) == pytest.approx(accuracy)
    assert results(run)["scores"]["accuracy"]["value"] == together["accuracy"]["value"]
    assert [part["fold"] for part in parts] == [0, 1, 2]
    assert [list(part["scores"]["accuracy"]["by_fold"]) for part in parts] == [["0"], ["1"], ["2"]]


def test_groups_on_both_sides_are_noted(recipe, tones, tmp_path, capsys):
    with (tones / "tones.csv").open(newline="") as stream:
        rows = [{**row, "file": tones / row["file"], "group": f"g{i}"} for i, row in enumerate(csv.DictReader(stream))]
    rows[0]["group"] = "g3"
    run = recipe("training.steps=1", data=write_table(tmp_path / "groups.csv", rows))
    finetune(run)
    assert results(run)["notes"] == ["1 groups are in training and in test: 'g3'; scores on new ones may be lower."]
    assert "note: 1 groups" in capsys.readouterr().err


def test_labels_that_are_not_tested_are_noted(recipe, tones, tmp_path):
    with (tones / "tones.csv").open(newline="") as stream:
        rows = [{**row, "file": tones / row["file"]} for row in csv.DictReader(stream)]
    for fold in ("1", "2"):
        next(row for row in rows if row["fold"] == fold)["label"] = "new"
    run = recipe("training.steps=1", data=write_table(tmp_path / "new.csv", rows))
    finetune(run)
    assert results(run)["notes"] == ["the test part has no clip of 'new', left out of macro-F1 and mAP."]


def test_no_fold_trains_on_everything(recipe):
    run = recipe("training.steps=2", fold="none")
    assert finetune(run) == {}
    assert results(run)["parts"] == "24 trained on"
    assert not (run.folder / "predictions.csv").exists()
    assert "not tested" in (run.folder / "export" / "README.md").read_text()


def test_validation_keeps_the_best_epoch_and_ends_the_run(recipe, tones, monkeypatch):
    said = iter([0.5, 0.9, 0.9, 0.1, 1.0])
    kept = []

    def score(task, clips, predicted):
        kept.append(predicted)
        return "accuracy", next(said)

    monkeypatch.setattr(evaluate, "main_score", score)
    run = recipe(
        "training.epochs=5", "training.patience=2", "augment.mixup=0", "start.head=random", data=tones / "split.csv"
    )
    finetune(run)
    assert len(kept) == 4
    assert results(run)["best"] == {"step": 2, "score": 0.9, "name": "accuracy"}
    assert results(run)["parts"] == "8 trained on, 8 validated on, 8 tested"
    assert [row["valid/accuracy"] for row in RunLog.read(run.folder) if "valid/accuracy" in row] == [0.5, 0.9, 0.9, 0.1]
    model = exported(run)
    for row, probabilities in kept[1].items():
        samples, _ = soundfile.read(tones / f"{row:02d}.wav", dtype="float32")
        with torch.no_grad():
            said_now = model.head.probabilities(model.logits(torch.from_numpy(samples)[None]))[0]
        assert probabilities == pytest.approx(said_now.numpy(), abs=1e-4)
        assert kept[3][row] != pytest.approx(probabilities, abs=1e-4)


def test_patience_is_kept_over_a_stop(recipe, tones, monkeypatch):
    said = iter([0.9, 0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr(evaluate, "main_score", lambda *_: ("accuracy", next(said)))
    run = recipe("training.epochs=5", "training.patience=2", "start.head=random", data=tones / "split.csv")
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        assert finetune(run) is None
    assert finetune(run) is not None
    assert results(run)["steps"] == 3
    assert results(run)["best"]["step"] == 1


def test_the_probe_is_kept_if_fine_tuning_is_no_better(recipe, tones, monkeypatch):
    said = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr(evaluate, "main_score", lambda *_: ("accuracy", next(said)))
    run = recipe("training.epochs=5", "training.patience=2", data=tones / "split.csv")
    finetune(run)
    assert results(run)["steps"] == 2
    assert results(run)["best"] == {"step": 0, "score": 0.9, "name": "accuracy"}
    assert [row["step"] for row in RunLog.read(run.folder) if "valid/accuracy" in row] == [0, 1, 2]
    untouched = recipe(
        "training.steps=1", "training.lr=1e-12", "training.average_decay=0", data=tones / "split.csv", output="probe"
    )
    monkeypatch.setattr(evaluate, "main_score", lambda *_: ("accuracy", 0.9))
    finetune(untouched)
    for row, expected in zip(predictions(run), predictions(untouched), strict=True):
        assert float(row["high"]) == pytest.approx(float(expected["high"]), abs=1e-3)


def test_the_last_weights_are_exported_if_asked_for(recipe, tones, monkeypatch):
    said = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr(evaluate, "main_score", lambda *_: ("accuracy", next(said)))
    run = recipe("training.export=last", "training.average_decay=0", data=tones / "split.csv")
    finetune(run)
    assert results(run)["best"] == {}
    assert not list((run.folder / "checkpoints").glob("best-*"))
    last = final_state(run.folder)
    assert last.best["step"] == 0
    exported_weights = exported(run).state_dict()
    for name, tensor in last.model.items():
        assert "running" in name or "num_batches" in name or torch.equal(exported_weights[name], tensor), name


def test_patience_without_a_validation_part_holds_some_out(recipe):
    run = recipe("training.steps=2", "training.patience=2")
    finetune(run)
    assert results(run)["parts"] == "8 trained on, 8 validated on, 8 tested"


def test_frozen_parts_stay_as_they_are(recipe, base):
    before = m2d_embed.load_model(str(base)).state_dict()
    head, patches = (
        recipe("training.steps=3", "model.freeze_encoder=true", output="a"),
        recipe("training.steps=3", "model.freeze_patch_embed=true", output="b"),
    )
    finetune(head)
    after = exported(head).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after["head.linear.weight"].abs().max() > 0
    finetune(patches)
    after = exported(patches).state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {n for n in before if "patch_embed" not in n and "pos_embed" not in n}


def test_adapters_are_merged_on_export(recipe, base):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    run = recipe("training.steps=4", "lora.rank=2", "lora.targets=[qkv, fc2]")
    finetune(run)
    before, model = m2d_embed.load_model(str(base)), exported(run)
    after = model.state_dict()
    changed = {name for name, tensor in before.state_dict().items() if not torch.equal(after[name], tensor)}
    assert changed == {f"encoder.blocks.{i}.{m}.weight" for i in range(3) for m in ("attn.qkv", "mlp.fc2")}
    adapters = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    config = LoraConfig.from_pretrained(str(run.folder / "adapter"))
    inject_adapter_in_model(config, before.encoder)
    problems = set_peft_model_state_dict(before.encoder, adapters)
    assert not problems.unexpected_keys
    log_mel = torch.randn(2, 1, 80, 64)
    with torch.no_grad():
        torch.testing.assert_close(before.eval().scene(log_mel), model.scene(log_mel), rtol=1e-4, atol=1e-5)
    head = load_file(run.folder / "adapter" / "head.safetensors")
    assert torch.equal(head["head.linear.weight"], after["head.linear.weight"])


def test_another_window(recipe):
    run = recipe("training.steps=2", "model.window_seconds=1.0", "data.crop_seconds=0.8")
    finetune(run)
    config = exported(run).config
    assert config.input_size == (80, 112)
    assert torch.equal(exported(run).encoder.pos_embed, sincos_positions(32, (5, 7)))
    with pytest.raises(ConfigError, match=r"data\.crop_seconds 0\.8 is longer.*model\.window_seconds=0\.8"):
        finetune(recipe("data.crop_seconds=0.8", output="other"))
    with pytest.raises(ConfigError, match="less than a patch"):
        finetune(recipe("model.window_seconds=0.05", output="other"))


def test_bf16_follows_float32(recipe):
    exact = recipe("training.steps=3", "start.head=random", output="exact")
    half = recipe("training.steps=3", "start.head=random", "training.precision=bf16", output="half")
    finetune(exact)
    finetune(half)
    assert losses(half.folder) == pytest.approx(losses(exact.folder), abs=0.03)
    assert losses(half.folder) != losses(exact.folder)
    assert all(t.dtype == torch.float32 for n, t in final_state(half.folder).model.items() if "num_batches" not in n)


def test_a_head_that_was_there_is_replaced(recipe, capsys):
    first = recipe("training.steps=1")
    finetune(first)
    second = recipe("training.steps=1", "model.features=flat", output="second", model=first.folder / "export")
    finetune(second)
    assert "its head of 2 labels is replaced" in capsys.readouterr().err
    assert exported(second).config.head.features == "flat"


# --- several processes, and signals -----------------------------------------------------------------------------------


def launch(run, *overrides, processes=1):
    launcher = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    module = [*launcher, "-m", "m2d_embed"] if processes > 1 else ["m2d_embed"]
    (run.folder.parent / "run.yaml").write_text(run.to_yaml())
    recipe = ["--recipe", str(run.folder.parent / "run.yaml"), *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", *module, "finetune", run.data.source, *recipe],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_are_as_one(recipe, events, tmp_path):
    """Clips of unequal numbers of columns, so that the processes have unequal shares of them."""
    overrides = (
        "augment.mixup=0.5",
        "data.crop_seconds=0.6",
        "training.steps=4",
        "training.average_decay=0.5",
        "training.batch_size=6",
    )
    short = events.parent / "1.wav"
    samples, rate = soundfile.read(short)
    data = tmp_path / "uneven"
    shutil.copytree(events.parent, data)
    soundfile.write(data / "1.wav", samples[: rate // 2], rate)
    alone, two = (recipe(*overrides, data=data / "events.csv", output=name) for name in ("alone", "two"))
    expected = finetune(alone)
    process = launch(two, processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert losses(two.folder) == pytest.approx(losses(alone.folder), abs=1e-5)
    assert results(two)["scores"]["frame map"]["value"] == pytest.approx(expected["frame map"]["value"], abs=1e-3)
    # Not the weights: a few, like the biases of the keys, have no gradient but rounding, which Adam makes large.
    log_mel = torch.randn(4, 1, 80, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        said = [exported(run).frame_logits(log_mel) for run in (alone, two)]
    torch.testing.assert_close(said[1], said[0], rtol=0, atol=5e-3)


def test_a_signal_saves_and_ends_well(recipe):
    run = recipe("training.steps=100000")
    process = launch(run)
    deadline = time.monotonic() + 60
    while not ((run.folder / "log.jsonl").exists() and losses(run.folder)):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "give the same command again" in printed
    assert "Traceback" not in errors
    assert final_state(run.folder).step == len(losses(run.folder)) > 0


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(tones, tmp_path):
    """``spoiled(edit)``: a copy of the clips, changed by ``edit(folder)``."""

    def make(edit):
        folder = tmp_path / "spoiled"
        shutil.copytree(tones, folder)
        edit(folder)
        return folder / "tones.csv"

    return make


def test_the_same_sound_in_training_and_test(recipe, spoiled):
    data = spoiled(lambda folder: shutil.copy(folder / "00.wav", folder / "02.wav"))
    with pytest.raises(ConfigError, match=r"known from training.*00.wav.*02.wav|02.wav.*00.wav"):
        finetune(recipe(data=data))
    finetune(recipe("training.steps=1", data=data, fold="2"))  # both are trained on


def test_the_same_sound_with_two_labels(recipe, spoiled):
    data = spoiled(lambda folder: shutil.copy(folder / "02.wav", folder / "03.wav"))
    with pytest.raises(ConfigError, match=r"02.wav and .*03.wav are the same sound with different labels"):
        finetune(recipe(data=data))


def test_unreadable_files_are_all_named(recipe, spoiled):
    def edit(folder):
        for name in ("02.wav", "05.wav"):
            (folder / name).write_bytes(b"no audio " + name.encode())

    with pytest.raises(AudioError, match=r"(?s)02.wav.*05.wav"):
        finetune(recipe(data=spoiled(edit)))


def test_one_unreadable_file_in_a_hundred_is_named_and_skipped(recipe, tmp_path, capsys):
    rows = []
    for i in range(150):
        tone(tmp_path / f"{i}.wav", 300 + 2000 * (i % 2), 0.2, i)
        rows.append({"file": f"{i}.wav", "label": ["low", "high"][i % 2], "split": "test" if i < 8 else "train"})
    (tmp_path / "100.wav").write_bytes(b"no audio")
    run = recipe("training.epochs=1", data=write_table(tmp_path / "table.csv", rows))
    assert finetune(run)["accuracy"]["value"] > 0.5
    assert "100.wav" in capsys.readouterr().err
    assert list(final_state(run.folder).bad_files) == [str(tmp_path / "100.wav")]


def test_runs_of_the_other_kind_are_refused(recipe):
    run = recipe("training.steps=1")
    finetune(run)
    state = final_state(run.folder)
    state.kind = "pre-training"
    state.write(run.folder, keep=1)
    with pytest.raises(ConfigError, match="holds a run of pre-training"):
        finetune(run)


def test_data_and_folds_that_make_no_sense(recipe, tmp_path, tones):
    with pytest.raises(ConfigError, match="no such file or folder"):
        finetune(recipe(data=tmp_path / "nothing.csv"))
    with pytest.raises(ConfigError, match="there is no fold 7 to test, but '0', '1', '2'"):
        finetune(recipe(fold="7"))
    with pytest.raises(ConfigError, match="one must be left"):
        finetune(recipe("augment.patch_dropout=[0, 4]"))
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        finetune(recipe("training.precision=fp16"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_goes_on_only_as_it_was_begun(recipe, spoiled, tmp_path):
    data = spoiled(lambda folder: None)
    finetune(recipe("training.steps=1", data=data))
    with pytest.raises(ConfigError, match=r"another recipe \(training.lr: 0.01 -> 0.02\)"):
        finetune(recipe("training.steps=1", "training.lr=0.02", data=data))
    moved = data.parent.rename(tmp_path / "moved") / data.name
    finetune(recipe("training.steps=1", data=moved))
    moved.write_text(moved.read_text().replace("03.wav,high", "03.wav,low"))
    with pytest.raises(ConfigError, match="has changed since the run was begun"):
        finetune(recipe("training.steps=1", data=moved))


def test_a_loss_that_is_not_finite_names_the_files(recipe, monkeypatch):
    original = TrainingClips.batch

    def batch(self, position, batch_size):
        made = original(self, position, batch_size)
        if position == 2 * batch_size:
            made.log_mel[3] = torch.nan
            batch.names = made.names
        return made

    monkeypatch.setattr(TrainingClips, "batch", batch)
    run = recipe("augment.mixup=0", "training.steps=5")
    with pytest.raises(TrainingError, match=r"step 2: loss is nan.*saved as it was before that step") as error:
        finetune(run)
    assert batch.names[3] in str(error.value)
    assert final_state(run.folder).step == 2
    monkeypatch.setattr(TrainingClips, "batch", original)
    assert finetune(run) is not None
    assert len(losses(run.folder)) == 5


# --- command ----------------------------------------------------------------------------------------------------------


def test_command(tones, base, tmp_path):
    output = tmp_path / "run"
    arguments = ["finetune", str(tones / "tones.csv"), "--model", str(base), "--output", str(output), *QUICK]
    shown = CliRunner().invoke(cli.app, [*arguments, "--show"])
    assert "batch_size: 8" in shown.stdout
    (tmp_path / "mine.yaml").write_text(shown.stdout)
    assert CliRunner().invoke(cli.app, ["finetune", "--recipe", str(tmp_path / "mine.yaml"), "--show"]).stdout == (
        shown.stdout
    )
    named = ["finetune", "--recipe", "lora", f"data.source={tones / 'tones.csv'}", "training.lr=0.5", "--show"]
    assert "rank: 8" in CliRunner().invoke(cli.app, named).stdout
    assert "lora" in CliRunner().invoke(cli.app, ["finetune", "--list"]).stdout
    missing = CliRunner().invoke(cli.app, ["finetune", "training.lr=0.5"])
    assert "data.source is missing" in str(missing.exception)
    assert not output.exists()
    done = CliRunner().invoke(cli.app, [*arguments, "--fold", "1", "training.steps=2"])
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.stdout
    assert "fold 1 of 0, 1, 2 (--fold takes another) is tested" in done.stderr
    tagged = CliRunner().invoke(cli.app, ["tag", str(tones / "00.wav"), "--model", str(output / "export"), "--json"])
    assert sum(json.loads(tagged.stdout)["tags"].values()) == pytest.approx(1, abs=1e-4)
