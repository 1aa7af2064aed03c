"""What is kept of a run of pre-training, and the model card made of it."""

import csv
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

import m2d_embed
from benchmarks import render
from benchmarks.pretraining import blocks, record, release, trials
from benchmarks.pretraining.encoders import read_encoder
from m2d_embed.checkpoints.layouts import Checkpoint, write_native
from m2d_embed.config import FeatureConfig, ModelConfig
from m2d_embed.labelled.clips import read_labelled
from m2d_embed.m2d import M2D

RECIPE = {
    "name": "mine",
    "about": "a trial",
    "objective": "msm_mae_s",
    "output": "/home/someone/runs/mine",
    "data": {"source": "/home/someone/corpus/manifest.csv", "cache": None, "workers": 1},
    "masking": {"mask_ratio": 0.6},
    "predictor": {"dim": 192, "depth": 2},
    "offline": {"weights": [1.0, 2.0], "teacher": ""},
    "start": {"model": "", "parts": "encoder"},
    "training": {
        "steps": 200,
        "batch_size": 32,
        "lr": 8e-4,
        "warmup": 0.03,
        "weight_decay": 0.05,
        "precision": "bf16",
        "seed": 0,
    },
}


def log(steps, every=2, rate=16.0):
    losses = {"loss": 1.23456, "loss/online": 0.5, "loss/offline": 0.75}
    return [{"step": s, **losses, "lr": 1e-3, "clips_per_second": rate} for s in range(every, steps + 1, every)]


def test_settings_hold_nothing_of_the_machine():
    kept = record.settings(RECIPE)
    assert "someone" not in json.dumps(kept)
    assert kept["data"]["source"] == "corpus/manifest.csv"
    assert kept["training"] == RECIPE["training"]


def test_curve_and_minutes():
    rows = log(200)
    points = record.curve(rows)
    assert [points[0]["step"], points[-1]["step"]] == [2, 200]
    assert len(points) <= 101
    assert set(points[0]) == {"step", "loss", "loss/online", "loss/offline"}
    assert record.minutes(rows, 32) == pytest.approx(200 * 32 / 16 / 60)


@pytest.fixture
def run(tmp_path):
    """A finished run with the least that a record and a release read."""
    folder = tmp_path / "run"
    (folder / "export").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log(200)))
    torch.manual_seed(0)
    model = M2D(ModelConfig(embed_dim=64, depth=2, num_heads=1, input_size=(80, 64), name="mine"))
    tensors = {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    write_native(folder / "export", Checkpoint(model.config, tensors))
    (folder / "export" / "loss.png").write_bytes(b"png")
    return folder


def test_a_record_and_the_table_of_all(run, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr(record, "TRIALS", tmp_path / "runs" / "trials")
    monkeypatch.setattr(record, "TABLE", tmp_path / "README.md")
    scores = iter(
        [{"a": [50.0, 45.0, 55.0], "b": [90.0, 89.0, 91.0]}, {"a": [60.0, 55.0, 65.0], "b": [90.0, 89.0, 91.0]}]
    )
    monkeypatch.setattr(record, "probes", lambda model, data: next(scores))
    record.main(run, tmp_path)
    (run / "recipe.yaml").write_text(json.dumps({**RECIPE, "name": "better"}))
    record.main(run, tmp_path)
    kept = json.loads((tmp_path / "runs" / "mine.json").read_text())
    assert kept["crops"] == 6400
    assert kept["minutes"] == pytest.approx(200 * 32 / 16 / 60, abs=0.1)
    text = (tmp_path / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert [row.split("]")[0] for row in rows] == ["| [better", "| [mine"]
    assert "60.0 (55.0-65.0)" in rows[0]
    assert rows[0].endswith("75.0 |")
    assert "## Trials" not in text


def test_a_run_that_is_not_probed_comes_last(run, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr(record, "TRIALS", tmp_path / "runs" / "trials")
    monkeypatch.setattr(record, "TABLE", tmp_path / "README.md")
    monkeypatch.setattr(record, "probes", lambda model, data: {"a": [50.0, 45.0, 55.0], "b": [90.0, 89.0, 91.0]})
    record.main(run)
    assert json.loads((tmp_path / "runs" / "mine.json").read_text())["linear probe, accuracy in %"] == {}
    (run / "recipe.yaml").write_text(json.dumps({**RECIPE, "name": "probed"}))
    record.main(run, tmp_path)
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| [")]
    assert [row.split("]")[0] for row in rows] == ["| [probed", "| [mine"]
    assert rows[0].endswith("| 50.0 (45.0-55.0) | 90.0 (89.0-91.0) | 70.0 |")
    assert rows[1].endswith("| not probed |  |  |")


def test_trials_have_a_table_of_their_own(run, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path / "records")
    monkeypatch.setattr(record, "TRIALS", tmp_path / "records" / "trials")
    monkeypatch.setattr(record, "TABLE", tmp_path / "README.md")
    monkeypatch.setattr(record, "probes", lambda model, data: {"a": [50.0, 45.0, 55.0]})
    record.keep(run, tmp_path, record.TRIALS)
    assert (tmp_path / "README.md").read_text().count("| [mine](records/trials/mine.json)") == 1
    record.keep(run, tmp_path, record.FOLDER)
    runs, short = (tmp_path / "README.md").read_text().split("## Trials")
    assert "| [mine](records/mine.json)" in runs
    assert "| [mine](records/trials/mine.json)" in short


def test_every_trial_changes_one_thing_and_is_a_recipe(tmp_path):
    plan = trials.read_yaml(trials.PLAN)
    places = trials.Places(tmp_path / "m.csv", tmp_path / "fine.csv", tmp_path, tmp_path / "cache")
    recipes = {name: trials.recipe_of(name, plan, places) for name in plan["trials"]}
    first = next(iter(plan["trials"]))
    assert plan["trials"][first]["set"] == []
    seconds = {r.training.steps * r.training.batch_size * r.model.input_size[1] for r in recipes.values()}
    assert len(seconds) == 1
    for name, recipe in recipes.items():
        changed = {line.split(":")[0].split("[")[0] for line in recipes[first].differences(recipe.to_dict())} - {"name"}
        allowed = {text.split("=")[0] for text in plan["trials"][name]["set"]}
        assert changed == (allowed - {"training.micro_batch"})  # which is free to differ
        assert recipe.about == plan["trials"][name]["about"]
        assert recipe.output == str(tmp_path / name)
    assert recipes["salt"].offline.teacher == str(tmp_path / "pixels" / "export")
    assert recipes["noise"].data.noise == str(tmp_path / "m.csv")
    assert recipes["fine-spectrum"].data.source == str(tmp_path / "fine.csv")


def test_trials_with_a_record_are_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "TRIALS", tmp_path)
    (tmp_path / "mask-0.3.json").write_text("{}")
    done = []
    monkeypatch.setattr(trials, "pretrain", lambda recipe: done.append(recipe.name) or tmp_path)
    monkeypatch.setattr(trials, "keep", lambda run, data, folder: {"a": [50.0, 45.0, 55.0]})
    trials.main(
        tmp_path / "m.csv", tmp_path / "fine.csv", tmp_path, tmp_path, tmp_path, ["mask-0.8", "mask-0.3", "adamw"]
    )
    assert done == ["adamw", "mask-0.8"]
    with pytest.raises(SystemExit, match=r"--only nothing: .* has both-teachers, "):
        trials.main(tmp_path / "m.csv", tmp_path / "fine.csv", tmp_path, tmp_path, tmp_path, ["nothing"])


def test_trials_stop_when_a_run_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "TRIALS", tmp_path)
    done = []
    monkeypatch.setattr(trials, "pretrain", lambda recipe: done.append(recipe.name))
    monkeypatch.setattr(trials, "keep", lambda *_: pytest.fail("a run that was stopped has no record"))
    trials.main(tmp_path / "m.csv", tmp_path / "fine.csv", tmp_path, tmp_path, tmp_path, ["mask-0.8", "adamw"])
    assert done == ["adamw"]


@pytest.fixture
def tones(tmp_path):
    """A folder with one labelled set: high tones and low ones."""
    data = tmp_path / "data" / "tones"
    data.mkdir(parents=True)
    rows = ["file,label,split"]
    for number in range(20):
        time = np.arange(8000) / 16_000
        soundfile.write(data / f"{number}.wav", np.sin(2 * np.pi * (300 + 2000 * (number % 2)) * time), 16_000)
        rows.append(f"{number}.wav,{'high' if number % 2 else 'low'},{number // 10}")
    (data / "metadata.csv").write_text("\n".join(rows))
    return data.parent


def test_probes_of_a_model(run, tones):
    found = record.probes(run / "export", tones)
    assert list(found) == ["tones"]
    assert found["tones"][0] == 100.0


def test_probes_by_blocks_kept(run, tones, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "FOLDER", tmp_path)
    monkeypatch.setenv("M2D_EMBED_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit, match=r"mine\.json: no such record"):
        blocks.main(run, tones, [1])
    (tmp_path / "mine.json").write_text(json.dumps({"about": "a trial"}))
    blocks.main(run, tones, [2, 1, 2])
    kept = json.loads((tmp_path / "mine.json").read_text())
    assert kept == {"about": "a trial", blocks.BY_BLOCKS: {"1": {"tones": 100.0}, "2": {"tones": 100.0}}}
    with pytest.raises(SystemExit, match=r"--keep 3: the encoder of .* has 2 blocks"):
        blocks.main(run, tones, [1, 3])


def test_scenes_by_blocks_are_those_of_shorter_models(run, tones, tmp_path, monkeypatch):
    monkeypatch.setenv("M2D_EMBED_CACHE", str(tmp_path / "cache"))
    clips = read_labelled(tones / "tones" / "metadata.csv")
    features = FeatureConfig(layers=(0, 1), layer_pooling="concat", scene_pooling="mean_std")
    both = blocks.scenes_by_blocks(M2D.from_pretrained(str(run / "export"), features=features), clips)
    for count, scenes in enumerate(both, start=1):
        shorter = tmp_path / f"first-{count}"
        shorter.mkdir()
        release.write_weights(release.first_blocks(read_encoder(str(run / "export")), count), "x", shorter)
        alone = M2D.from_pretrained(str(shorter)).encode(clips.files)
        np.testing.assert_allclose(scenes, alone, atol=5e-3)  # kept in float16


def test_release_writes_a_model_that_loads_and_a_card(run, tmp_path, monkeypatch):
    card = tmp_path / "weights" / "README.md"
    card.parent.mkdir()
    card.write_text("# Model\n<!-- data -->\n<!-- /data -->\n<!-- training -->\nold\n<!-- /training -->\nend\n")
    monkeypatch.setattr(release, "CARD", card)
    monkeypatch.setattr(release, "RECORDS", tmp_path / "runs")
    kept = {
        "settings": record.settings(RECIPE),
        "machine": {"cpu": "Some CPU", "cores": 2, "matrix units": ["avx512_bf16"], "torch": "2.13.0"},
        "crops": 6400,
        "minutes": 6.7,
        "curve": record.curve(log(200)),
    }
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine.json").write_text(json.dumps(kept))
    with (tmp_path / "manifest.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "seconds", "kind", "package", "licence"])
        writer.writerows([["a.flac", 7200, "music", "p1", "CC0"], ["b.flac", 1800, "speech", "p2", "GPL-2"]])
        writer.writerow(["c.flac", 1800, "speech", "p1", "GPL-2"])
        writer.writerow(["d.flac", 3600, "speech", "scenes", "GPL-2 and CC0"])
    release.main(run, tmp_path / "manifest.csv")
    text = card.read_text()
    for part in (
        "| music | 2.0 | 1 | 1 |",
        "| speech | 1.0 | 2 | 2 |",
        "| all | 3.0 | 3 | 2 |",
        "CC0 2.0 h, GPL-2 1.0 h, and 0 others",
        "And 1.0 hours of scenes",
    ):
        assert part in text
    for part in (
        "60% of the patches",
        "200 steps of 32 crops",
        "rate 0.0008",
        "7 minutes on 2 cores of Some CPU",
        "end",
    ):
        assert part in text
    assert "old" not in text
    model = m2d_embed.load_model(str(card.parent))
    assert model.config.license == "Apache-2.0"
    assert "recipe mine" in model.config.source
    assert model.config.scene_pooling == "mean_std"
    original = m2d_embed.load_model(str(run / "export"), scene_pooling="mean_std")
    audio = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    a, b = (m2d_embed.get_scene_embeddings(audio, m) for m in (model, original))
    assert torch.nn.functional.cosine_similarity(a, b).min() > 0.9999
    assert sorted(f.name for f in card.parent.iterdir()) == [
        "README.md",
        "config.json",
        "loss.png",
        "model.safetensors",
    ]
    assert "blocks trained" not in text and "blocks kept" not in text
    assert "from scratch;" in text and "begins with" not in text
    before = {**kept, "crops": 999_000}
    start = {"model": "first/step-1.ckpt", "parts": "predictor"}
    kept = {**kept, "settings": {**kept["settings"], "start": start}}
    (tmp_path / "runs" / "first.json").write_text(json.dumps(before))
    by_blocks = {"1": {"a": 50.0, "b": 90.0}, "2": {"a": 40.04, "b": 90.0}}
    (tmp_path / "runs" / "mine.json").write_text(json.dumps({**kept, blocks.BY_BLOCKS: by_blocks}))
    release.main(run, tmp_path / "manifest.csv", ["first"], blocks=1)
    shorter = m2d_embed.load_model(str(card.parent))
    assert (shorter.config.depth, len(shorter.encoder.blocks)) == (1, 1)
    [first] = original.intermediates(audio, [0])
    a, b = m2d_embed.get_scene_embeddings(audio, shorter).chunk(2, dim=1)[0], first.mean(dim=1)
    assert torch.nn.functional.cosine_similarity(a, b).min() > 0.9999
    text = card.read_text()
    assert f"Of the {original.config.depth} blocks trained, the first 1 are kept." in text
    assert "| blocks kept | a | b | mean |" in text
    assert "| 1 | 50.0 | 90.0 | 70.0 |\n| 2 | 40.0 | 90.0 | 65.0 |" in text
    assert text.index("[`first`]") < text.index("999,000 in all") < text.index("[`mine`]") < text.index("6,400 in all")
    begun = text.index("begins with the encoder and predictor of the stage before;")
    assert text.index("from scratch;") < text.index("[`mine`]") < begun
    assert "`m2d-embed pretrain RECIPE.yaml` with each of these recipes" in text
    assert "The weights are the mean" not in text and "Embeddings are" not in text
    release.main(run, tmp_path / "manifest.csv", ["first"], layer=[0, -1])
    several = m2d_embed.load_model(str(card.parent))
    assert several.config.layers == (0, -1)
    both = torch.stack(original.intermediates(audio, [0, 1])).mean(dim=0)
    a, b = m2d_embed.get_scene_embeddings(audio, several).chunk(2, dim=1)[0], both.mean(dim=1)
    assert torch.nn.functional.cosine_similarity(a, b).min() > 0.9999
    assert "Embeddings are the mean of blocks 1, 2, each after the final norm." in card.read_text()
    other = run.with_name("other")
    shutil.copytree(run, other)
    (other / "recipe.yaml").write_text(json.dumps({**RECIPE, "name": "first"}))
    (other / "export" / "model.safetensors").unlink()
    tensors = {f"encoder.{name}": 3 * tensor for name, tensor in original.encoder.state_dict().items()}
    write_native(other / "export", Checkpoint(original.config, tensors))
    release.main(run, tmp_path / "manifest.csv", ["first"], mean_with=[other])
    assert "The weights are the mean of those of `first` and `mine`." in card.read_text()
    mean = m2d_embed.load_model(str(card.parent)).encoder.state_dict()
    for name, tensor in original.encoder.state_dict().items():
        torch.testing.assert_close(mean[name], 2 * tensor, atol=1e-3, rtol=1e-3)  # kept in float16


def test_a_card_without_a_section_is_refused():
    with pytest.raises(SystemExit, match="'data'"):
        render.replace_section("# Model", "data", "x")
