"""Runs from a recipe to an exported model: resuming, several processes, stops, bad data, warm starts."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import WORDS
from typer.testing import CliRunner

import m2d_embed
from m2d_embed import cli
from m2d_embed.config import ModelConfig
from m2d_embed.errors import (
    AudioError,
    CheckpointError,
    ConfigError,
    M2DEmbedError,
    TrainingError,
    UnsupportedError,
)
from m2d_embed.pretrain import loop, objectives
from m2d_embed.pretrain.build import build_optimizers
from m2d_embed.pretrain.inputs import Inputs
from m2d_embed.pretrain.loop import pretrain
from m2d_embed.pretrain.recipe import WITH_TEACHER, load_recipe
from m2d_embed.pretrain.warm_start import PUBLISHED_PARTS
from m2d_embed.training import run_state
from m2d_embed.training.bad_files import BadFiles
from m2d_embed.training.monitor import RunLog
from m2d_embed.training.run_state import RunState
from m2d_embed.training.trainer import Trainer

RATE = 16_000
TINY_RUN = {
    "name": "tiny-run",
    "objective": "m2d",
    "model": {"embed_dim": 32, "depth": 2, "num_heads": 2, "input_size": [80, 64], "patch_size": [16, 16]},
    "predictor": {"dim": 16, "depth": 1, "num_heads": 2},
    "data": {"norm_crops": 8, "workers": 0},
    "training": {
        "steps": 6,
        "batch_size": 4,
        "micro_batch": 4,
        "lr": 0.02 * 4 / 256,
        "ema_decay": [0.9, 0.99],
        "precision": "fp32",
        "log_every": 1,
        "save_every": 100,
    },
}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Twenty clips of a second and more, each a tone in noise."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for i in range(20):
        t = np.arange(RATE + 200 * i) / RATE
        tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * i) * t) + 0.05 * rng.standard_normal(len(t))
        soundfile.write(folder / f"tone{i:02d}.wav", tone.astype(np.float32), RATE)
    return folder


@pytest.fixture
def recipe(tmp_path, sounds):
    """``recipe("training.steps=3", ...)``: the tiny run with overrides."""

    def make(*overrides, output="run"):
        file = tmp_path / "tiny-run.yaml"
        file.write_text(yaml.safe_dump(TINY_RUN))
        return load_recipe(str(file), [f"data.source={sounds}", f"output={tmp_path / output}", *overrides])

    return make


def losses(folder):
    return [row["loss"] for row in RunLog.read(Path(folder)) if "loss" in row]


def stop_at(monkeypatch, step):
    """Have the run see a stop signal once it has taken ``step`` steps."""
    original = Trainer.take_step

    def stepping(self, batches):
        values = original(self, batches)
        self.stop.wanted = self.step >= step
        return values

    monkeypatch.setattr(Trainer, "take_step", stepping)


def final_state(folder):
    return RunState.read(run_state.latest(Path(folder)))


# --- a whole run -------------------------------------------------------------------------------------------------


def test_a_run_learns_and_exports_a_model(recipe, tmp_path, sounds, capsys):
    run = recipe("training.steps=40")
    exported = pretrain(run)
    curve = losses(run.folder)
    assert len(curve) == 40
    assert np.mean(curve[-5:]) < np.mean(curve[:5]) - 0.2
    model = m2d_embed.load_model(str(exported))
    assert model.config.name == "tiny-run"
    assert model.encode([str(sounds / "tone00.wav")]).shape == (1, 5 * 32)
    state = final_state(run.folder)
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, state.model[f"encoder.{name}"])
    mean, std = model.config.norm_stats
    assert -12 < mean < -3
    assert 1 < std < 8
    card = (exported / "README.md").read_text()
    for said in ("40 steps of 4 crops", "160 crops", "20 files", "m2d", "loss.png", "lr: 0.0003125", f"{mean:.4f}"):
        assert said in card, said
    assert (exported / "loss.png").stat().st_size > 5000
    assert (exported / "model.bf16.safetensors").exists()
    assert (run.folder / "recipe.yaml").exists()
    assert list((run.folder / "tensorboard").iterdir())
    row = json.loads((run.folder / "log.jsonl").read_text().splitlines()[-1])
    for key in ("lr", "ema_decay", "grad_norm", "target_variance", "target_rank", "data_share", "clips_per_second"):
        assert np.isfinite(row[key]), key


def test_steps_follow_the_recipe(recipe, monkeypatch):
    """Learning rate scaled by the batch, weight decay on matrices alone, clipped gradients, EMA after each step."""
    norms, decays = [], []
    original = torch.optim.AdamW.step

    def step(self, *arguments, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
            decays.extend((p.ndim, group["weight_decay"]) for group in self.param_groups for p in group["params"])
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run = recipe("training.clip_norm=0.01", "training.ema_decay=[0, 0]", "training.warmup=0.5")
    pretrain(run)
    assert norms[:6] == pytest.approx([0.01] * 6, rel=1e-3)
    assert set(decays[: len(decays) // len(norms)]) == {(1, 0.0), (2, 0.05), (3, 0.05), (4, 0.05)}
    rows = RunLog.read(run.folder)
    assert min(row["grad_norm"] for row in rows) > 0.1  # as it was before it was clipped
    peak = 0.02 * 4 / 256
    assert [row["lr"] for row in rows[:4]] == pytest.approx([peak / 4, peak / 2, peak * 3 / 4, peak])
    assert rows[-1]["lr"] == pytest.approx(peak * 0.25)
    model = final_state(run.folder).model
    for name in [name for name in model if name.startswith("target.")]:
        assert torch.equal(model[name], model[name.replace("target.", "encoder.", 1)])


def test_muon_takes_the_matrices_of_blocks(recipe):
    """A step is as large as AdamW's usual ones, 0.2 learning rates an element, and keeps no direction for itself."""
    run = recipe("training.optimizer=muon", "training.weight_decay=0", "objective=m2d_s")
    objective = objectives.M2DS(ModelConfig(embed_dim=32, depth=2, num_heads=2), run.predictor, 8, (1.0, 1.0))
    objective.init_weights()
    _, muon = optimizers = build_optimizers(objective, run)
    for optimizer in optimizers:
        assert optimizer.defaults["lr"] == pytest.approx(0.02 * 4 / 256)
    blocks = [*objective.encoder.blocks, *objective.predictor.blocks]
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(p) for p in matrices}
    taken = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in objective.parameters() if p.requires_grad)
    weight = objective.encoder.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    weight.grad = torch.outer(torch.ones(128), torch.arange(1.0, 33.0)) + torch.randn_like(weight)
    muon.step()
    update = (weight.detach() - before) / muon.defaults["lr"]
    assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=0.3)
    strengths = torch.linalg.svdvals(update)
    assert strengths.max() < 3 * strengths.min()  # of the gradient it is 100 times and more


def test_muon_needs_a_recent_pytorch(recipe, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UnsupportedError, match=r"PyTorch 2\.9 or later, and this is .*adamw"):
        pretrain(recipe("training.optimizer=muon"))


def test_a_finished_run_is_left_as_it_is(recipe):
    run = recipe("training.steps=3")
    pretrain(run)
    before = (run.folder / "log.jsonl").read_text()
    pretrain(run)
    assert (run.folder / "log.jsonl").read_text() == before


OFFLINE = ("m2d_s", "msm_mae_s", "m2d_as", "m2d_clap")


@pytest.fixture
def manifest(tmp_path, sounds):
    """The same clips with labels, captions and precomputed features."""
    rows = ["file,labels,caption,features"]
    for i, file in enumerate(sorted(sounds.iterdir())):
        features = tmp_path / f"{file.stem}.npy"
        np.save(features, np.random.default_rng(i).standard_normal((60, 12)).astype(np.float32))
        rows.append(f"{file},{'low' if i < 10 else 'high;odd'},{WORDS[5]} {WORDS[6 + i % 3]},{features}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    return tmp_path / "manifest.csv"


@pytest.fixture
def options(manifest, bert, recipe):
    """Overrides that an objective needs."""

    def make(objective):
        if objective in WITH_TEACHER:
            teacher = recipe("training.steps=1", output="teacher")
            pretrain(teacher)
            return [f"offline.teacher={teacher.folder / 'export'}", f"data.noise={manifest}"]
        extra = [f"data.source={manifest}"] if objective in OFFLINE else []
        return [*extra, f"offline.text_encoder={bert}", "offline.joint_dim=24"] if objective == "m2d_clap" else extra

    return make


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("objective", ["m2d", "data2vec", "msm_mae", "m2d_x", "salt", *OFFLINE])
def test_resuming_changes_nothing(objective, optimizer, recipe, options, monkeypatch):
    extra = [f"objective={objective}", f"training.optimizer={optimizer}", *options(objective)]
    whole, broken = recipe(*extra, output="whole"), recipe(*extra, output="broken")
    assert pretrain(whole) is not None
    with monkeypatch.context() as patched:
        stop_at(patched, 4)
        assert pretrain(broken) is None
    assert final_state(broken.folder).step == 4
    assert pretrain(broken) is not None
    assert losses(broken.folder) == losses(whole.folder)
    assert len(losses(whole.folder)) == 6
    first, second = final_state(whole.folder), final_state(broken.folder)
    assert first.model.keys() == second.model.keys()
    assert all(torch.equal(first.model[name], second.model[name]) for name in first.model)
    assert m2d_embed.load_model(str(broken.folder / "export")).encoder is not None


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_from_shards_changes_nothing(workers, recipe, sounds, tmp_path, monkeypatch):
    files = sorted(sounds.iterdir())
    for number in range(2):
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as tar:
            for file in files[number::2]:
                tar.add(file, file.name)
    extra = [f"data.source={tmp_path}/shard-{{0..1}}.tar", f"data.workers={workers}"]
    whole, broken = recipe(*extra, output="whole"), recipe(*extra, output="broken")
    assert pretrain(whole) is not None
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        assert pretrain(broken) is None
    assert pretrain(broken) is not None
    assert losses(broken.folder) == losses(whole.folder)
    with pytest.raises(ConfigError, match=r"give training\.steps"):
        pretrain(recipe(*extra, "training.steps=null", "training.epochs=1", output="epochs"))


def test_export_of_clap_has_its_projections(recipe, options):
    exported = pretrain(recipe("objective=m2d_clap", *options("m2d_clap"), "training.steps=2"))
    model = m2d_embed.load_model(str(exported))
    assert model.encode_audio_clap(torch.randn(1, RATE)).shape == (1, 24)
    assert model.encode_text(["a dog"]).shape == (1, 24)


def test_accumulated_micro_batches_are_one_batch(recipe):
    at_once, pieces = recipe(output="once"), recipe("training.micro_batch=2", output="pieces")
    pretrain(at_once)
    pretrain(pieces)
    assert losses(pieces.folder) == pytest.approx(losses(at_once.folder), abs=1e-5)


def test_drop_path_is_resumed_exactly(recipe, monkeypatch):
    settings = ["training.drop_path=0.5", "training.micro_batch=2"]
    whole, broken, plain = recipe(*settings, output="whole"), recipe(*settings, output="broken"), recipe(output="plain")
    state = torch.get_rng_state()
    for run in (whole, plain):
        pretrain(run)
    assert torch.equal(torch.get_rng_state(), state)  # that of the process is left alone
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        assert pretrain(broken) is None
    pretrain(broken)
    assert losses(broken.folder) == losses(whole.folder)
    assert losses(whole.folder) != pytest.approx(losses(plain.folder), abs=1e-3)
    with pytest.raises(ConfigError, match=r"training\.micro_batch: 2 -> 4"):
        pretrain(recipe("training.drop_path=0.5", output="whole"))


def test_gradient_checkpointing_changes_nothing(recipe):
    usual, saving = recipe(output="usual"), recipe("training.grad_checkpointing=true", output="saving")
    pretrain(usual)
    pretrain(saving)
    assert losses(saving.folder) == losses(usual.folder)


def test_workers_change_nothing(recipe):
    none, two = recipe(output="none"), recipe("data.workers=2", output="two")
    pretrain(none)
    pretrain(two)
    assert losses(two.folder) == losses(none.folder)


@pytest.mark.parametrize("kept", [2, 3])
def test_log_lines_average_the_steps_between_them_across_a_stop(kept, recipe, monkeypatch):
    fine, coarse = (
        recipe(output="fine"),
        recipe("training.log_every=3", "training.save_every=1", "training.keep=9", output="coarse"),
    )
    pretrain(fine)
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        pretrain(coarse)
    # As if it had been killed after step `kept`.
    for step in range(kept + 1, 6):
        (coarse.folder / "checkpoints" / f"step-{step:09d}.ckpt").unlink(missing_ok=True)
    pretrain(coarse)
    each = losses(fine.folder)
    assert losses(coarse.folder) == pytest.approx([np.mean(each[:3]), np.mean(each[3:])])


def test_bf16_follows_float32(recipe):
    exact, half = recipe(output="exact"), recipe("training.precision=bf16", output="half")
    pretrain(exact)
    pretrain(half)
    assert losses(half.folder) == pytest.approx(losses(exact.folder), abs=0.03)
    assert losses(half.folder) != losses(exact.folder)
    weights = final_state(half.folder).model
    assert all(t.dtype == torch.float32 for t in weights.values())


def test_cache_gives_nearly_the_same_run(recipe, tmp_path):
    direct, cached = recipe(output="direct"), recipe(f"data.cache={tmp_path / 'cache'}", output="cached")
    pretrain(direct)
    pretrain(cached)
    assert losses(cached.folder)[0] == pytest.approx(losses(direct.folder)[0], abs=0.1)


# --- several processes -------------------------------------------------------------------------------------------


TWO_PROCESSES = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def command(recipe_file, *overrides, processes=1):
    launcher = [*TWO_PROCESSES, "-m"] if processes > 1 else []
    return [sys.executable, "-m", *launcher, "m2d_embed", "pretrain", str(recipe_file), *overrides]


def launch(arguments, **popen):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


@pytest.mark.parametrize("objective", ["m2d", "m2d_clap"])
def test_two_processes_are_as_one(objective, recipe, tmp_path, options):
    extra = [f"objective={objective}", *options(objective)]
    alone = recipe(*extra, output="alone")
    pretrain(alone)
    source = [] if any(e.startswith("data.source") for e in extra) else [f"data.source={alone.data.source}"]
    arguments = [*source, *extra, "training.micro_batch=2", f"output={tmp_path / 'two'}"]
    process = launch(command(tmp_path / "tiny-run.yaml", *arguments, processes=2))
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert losses(tmp_path / "two") == pytest.approx(losses(alone.folder), abs=1e-5)


def test_two_processes_resume_exactly(recipe, tmp_path, sounds):
    recipe()  # writes the file
    arguments = [f"data.source={sounds}", "training.micro_batch=2", "training.save_every=3", "training.keep=9"]
    for name in ("whole", "broken"):
        process = launch(command(tmp_path / "tiny-run.yaml", *arguments, f"output={tmp_path / name}", processes=2))
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    after = losses(tmp_path / "broken")
    # As if it had been killed some time after step 3.
    (tmp_path / "broken" / "checkpoints" / "step-000000006.ckpt").unlink()
    process = launch(command(tmp_path / "tiny-run.yaml", *arguments, f"output={tmp_path / 'broken'}", processes=2))
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole") == after
    first, second = final_state(tmp_path / "whole"), final_state(tmp_path / "broken")
    assert all(torch.equal(first.model[name], second.model[name]) for name in first.model)


# Muon multiplies in bfloat16, and makes as much of a gradient's weakest directions as of its strongest.
@pytest.mark.parametrize("optimizer, tolerance", [("sgd", 1e-5), ("muon", 0.3)])
def test_sharded_training_takes_the_same_steps(optimizer, tolerance):
    script = Path(__file__).with_name("sharded_training.py")
    process = launch([sys.executable, "-m", *TWO_PROCESSES, str(script), optimizer, str(tolerance)])
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert "the same" in output


def test_a_signal_to_the_launcher_of_two_processes_saves(recipe, tmp_path, sounds):
    recipe()
    output = tmp_path / "run"
    arguments = [f"data.source={sounds}", "data.workers=1", "training.steps=100000", f"output={output}"]
    arguments += ["training.micro_batch=2"]
    process = launch(command(tmp_path / "tiny-run.yaml", *arguments, processes=2))
    wait_for(lambda: (output / "log.jsonl").exists() and losses(output), process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert printed.count("give the same command again") == 1
    [checkpoint] = (output / "checkpoints").iterdir()
    assert RunState.read(checkpoint).step == len(losses(output)) > 0
    assert RunState.read(checkpoint).processes == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_saves_and_ends_well(number, workers, recipe, tmp_path, sounds):
    recipe()
    output = tmp_path / "run"
    arguments = [f"data.source={sounds}", f"data.workers={workers}", "training.steps=100000", f"output={output}"]
    process = launch(command(tmp_path / "tiny-run.yaml", *arguments), start_new_session=True)
    wait_for(lambda: (output / "log.jsonl").exists() and losses(output), process)
    os.killpg(process.pid, number)  # a terminal, SLURM and systemd signal all processes of a job
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "give the same command again" in printed
    assert "Traceback" not in errors
    state = final_state(output)
    assert state.step == len(losses(output)) > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_at_once(number, recipe, tmp_path, sounds):
    recipe()
    rows = ["file", *[str(f) for f in sorted(sounds.iterdir())] * 400]
    (tmp_path / "many.csv").write_text("\n".join(rows))
    cache = tmp_path / "cache"
    arguments = [f"data.source={tmp_path / 'many.csv'}", f"data.cache={cache}", f"output={tmp_path / 'run'}"]
    process = launch(command(tmp_path / "tiny-run.yaml", *arguments), start_new_session=True)
    wait_for(lambda: list(cache.glob("clips/part-*")), process)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "try again to go on" in errors
    assert not (tmp_path / "run" / "checkpoints").exists()


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, process.communicate()
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_with_its_files(recipe, monkeypatch, sounds):
    run = recipe("training.log_every=2")
    original = Inputs.forward
    calls = []

    def forward(self, batch):
        example = original(self, batch)
        calls.append(batch.names)
        if len(calls) == 4:
            example.log_mel[2] = torch.nan
        return example

    monkeypatch.setattr(Inputs, "forward", forward)
    with pytest.raises(TrainingError, match="step 3: loss is nan") as caught:
        pretrain(run)
    assert all(name in str(caught.value) for name in calls[3])
    state = final_state(run.folder)
    assert state.step == 3
    assert all(torch.isfinite(t).all() for t in state.model.values())
    assert pretrain(run) is not None  # the file was repaired: it goes on


def test_one_bad_file_in_a_hundred_is_named_and_skipped(recipe, sounds, tmp_path, capsys):
    rows = ["file", *[str(f) for f in sorted(sounds.iterdir())] * 10, str(tmp_path / "gone.wav")]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    run = recipe(f"data.source={tmp_path / 'list.csv'}", "training.epochs=1", "training.steps=null")
    assert pretrain(run) is not None
    assert "gone.wav" in capsys.readouterr().err
    assert "gone.wav" in str(final_state(run.folder).bad_files)


def test_more_bad_files_end_the_run(recipe, sounds, tmp_path):
    (tmp_path / "list.csv").write_text("\n".join(["file", *map(str, sorted(sounds.iterdir())), "gone.wav"]))
    run = recipe(f"data.source={tmp_path / 'list.csv'}", "training.epochs=3", "training.steps=null")
    with pytest.raises(AudioError, match=r"gone\.wav"):
        pretrain(run)


def test_an_error_loses_no_step(recipe, sounds, tmp_path, monkeypatch):
    run = recipe()
    original = BadFiles.check
    monkeypatch.setattr(BadFiles, "check", lambda self, seen=None: fail(self.seen))

    def fail(seen):
        if seen > 4 * 3:
            raise AudioError("too many")

    with pytest.raises(AudioError, match="too many"):
        pretrain(run)
    assert final_state(run.folder).step == 3 == len(losses(run.folder))
    monkeypatch.setattr(BadFiles, "check", original)
    assert pretrain(run) is not None


def test_a_run_goes_on_when_its_bad_files_are_repaired(recipe, sounds, tmp_path):
    missing = tmp_path / "gone.wav"
    (tmp_path / "list.csv").write_text("\n".join(["file", *map(str, sorted(sounds.iterdir())), str(missing)]))
    run = recipe(f"data.source={tmp_path / 'list.csv'}", "training.steps=12")
    with pytest.raises(AudioError, match=r"gone\.wav"):
        pretrain(run)
    shutil.copy(sounds / "tone00.wav", missing)
    assert pretrain(run) is not None


def test_a_damaged_shard_is_named_and_read_as_far_as_it_goes(recipe, sounds, tmp_path, capsys):
    for name in ("whole", "cut"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for file in sorted(sounds.iterdir()):
                tar.add(file, file.name)
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    run = recipe(f"data.source={tmp_path}/{{whole,cut}}.tar", "training.steps=20")
    assert pretrain(run) is not None
    assert "cut.tar" in capsys.readouterr().err
    assert any("cut.tar" in name for name in final_state(run.folder).bad_files)


def test_probe_clips_are_looked_at_before_the_first_step(recipe, tmp_path):
    with pytest.raises(M2DEmbedError, match="nowhere"):
        pretrain(recipe(f"probe.data={tmp_path / 'nowhere'}", "probe.every=1000"))
    assert not (tmp_path / "run").exists()


def test_shards_need_the_same_number_of_processes(recipe, sounds, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in sorted(sounds.iterdir()):
            tar.add(file, file.name)
    run = recipe(f"data.source={tmp_path / 'a.tar'}", "training.steps=2")
    pretrain(run)
    state = final_state(run.folder)
    state.processes = 4
    state.write(run.folder, keep=1)
    with pytest.raises(ConfigError, match="begun with 4 processes"):
        pretrain(run)


def test_what_a_cpu_cannot_do(recipe, monkeypatch):
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        pretrain(recipe("training.precision=fp16"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
        pretrain(recipe("training.compile=true"))


def test_output_that_is_a_file(recipe, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        pretrain(recipe())


def test_a_checkpoint_that_cannot_be_written(recipe, monkeypatch):
    run = recipe("training.save_every=2")
    original = torch.save

    def save(content, path):
        if content["step"] == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(content, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(CheckpointError, match=r"step-000000004\.ckpt: cannot be written .*No space left"):
        pretrain(run)
    assert [f.name for f in (run.folder / "checkpoints").iterdir()] == ["step-000000002.ckpt"]
    monkeypatch.setattr(torch, "save", original)
    (run.folder / "checkpoints" / ".step-000000009.ckpt.0123456789ab.partial").write_text("of a run that was killed")
    assert pretrain(run) is not None
    assert len(losses(run.folder)) == 6
    assert not list((run.folder / "checkpoints").glob(".*.partial"))


def test_licence_of_the_start_is_kept(recipe):
    first = pretrain(recipe("training.steps=1", "license=CC BY 4.0", output="first"))
    second = pretrain(recipe("training.steps=1", f"start.model={first}", output="second"))
    assert m2d_embed.load_model(str(second)).config.license == "CC BY 4.0"
    assert "CC BY 4.0" in (second / "README.md").read_text()


def test_another_recipe_does_not_go_on_with_a_run(recipe):
    pretrain(recipe("training.steps=2"))
    with pytest.raises(ConfigError, match=r"training\.steps: 2 -> 6.*output="):
        pretrain(recipe())


def test_a_damaged_checkpoint_is_named(recipe):
    run = recipe("training.steps=2")
    pretrain(run)
    file = run_state.latest(run.folder)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-000000002\.ckpt: damaged"):
        pretrain(run)


def test_the_last_checkpoints_are_kept(recipe):
    run = recipe("training.save_every=1", "training.keep=2")
    pretrain(run)
    assert sorted(f.name for f in (run.folder / "checkpoints").iterdir()) == [
        "step-000000005.ckpt",
        "step-000000006.ckpt",
    ]


def test_batch_that_does_not_divide(recipe):
    with pytest.raises(ConfigError, match=r"batch_size 4 is not a multiple of training\.micro_batch 3"):
        pretrain(recipe("training.micro_batch=3"))


def test_objectives_say_what_the_manifest_lacks(recipe, sounds):
    with pytest.raises(ConfigError, match="labels"):
        pretrain(recipe("objective=m2d_as"))
    with pytest.raises(ConfigError, match="features"):
        pretrain(recipe("objective=m2d_s"))
    with pytest.raises(ConfigError, match="caption"):
        pretrain(recipe("objective=m2d_clap"))


def test_export_without_a_checkpoint(recipe):
    with pytest.raises(ConfigError, match="no checkpoint to export"):
        loop.export_latest(recipe())


def test_export_of_a_stopped_run(recipe, monkeypatch):
    run = recipe()
    stop_at(monkeypatch, 3)
    assert pretrain(run) is None
    exported = loop.export_latest(run)
    assert "3 steps of 4 crops" in (exported / "README.md").read_text()
    assert m2d_embed.load_model(str(exported)).config.embed_dim == 32


# --- probes ------------------------------------------------------------------------------------------------------


def test_probes_are_logged(recipe, sounds, tmp_path):
    for i, file in enumerate(sorted(sounds.iterdir())):
        label = tmp_path / "labelled" / ("low" if i < 10 else "high")
        label.mkdir(parents=True, exist_ok=True)
        (label / file.name).symlink_to(file)
    run = recipe(f"probe.data={tmp_path / 'labelled'}", "probe.every=4")
    pretrain(run)
    rows = RunLog.read(run.folder)
    assert [row["step"] for row in rows if "probe/linear" in row] == [4, 6]
    assert rows[-1]["probe/linear"] > 0.7
    assert 0 <= rows[-1]["probe/knn"] <= 1
    quiet = recipe(output="quiet")
    pretrain(quiet)
    assert losses(run.folder) == losses(quiet.folder)  # looking on changes nothing


@pytest.fixture
def labelled(sounds, tmp_path):
    """The clips in a folder for each of two labels."""
    for i, file in enumerate(sorted(sounds.iterdir())):
        label = tmp_path / "labelled" / ("low" if i < 10 else "high")
        label.mkdir(parents=True, exist_ok=True)
        (label / file.name).symlink_to(file)
    return tmp_path / "labelled"


def exported_encoder(run):
    return m2d_embed.load_model(str(run.folder / "export")).encoder.state_dict()


def test_the_best_probe_is_exported_and_patience_ends_the_run(recipe, labelled, monkeypatch):
    said = iter([0.5, 0.9, 0.8, 0.9, 1.0, 1.0])
    monkeypatch.setattr(loop, "linear_probe_accuracy", lambda *_: next(said))
    probed = [f"probe.data={labelled}", "probe.every=1", "training.export=best", "training.keep=9"]
    run = recipe(*probed, "training.patience=2", "training.save_every=1")
    with monkeypatch.context() as patched:
        stop_at(patched, 3)  # the count of validations is kept over a stop
        assert pretrain(run) is None
    assert pretrain(run) is not None
    state = final_state(run.folder)
    assert (state.step, state.stale) == (4, 2)
    assert state.best == {"step": 2, "score": 0.9, "name": "linear probe"}
    then = RunState.read(run.folder / "checkpoints" / "step-000000002.ckpt").model
    for name, tensor in exported_encoder(run).items():
        assert torch.equal(tensor, then[f"encoder.{name}"])
    assert not torch.equal(then["encoder.cls_token"], state.model["encoder.cls_token"])
    assert loop.export_latest(run) == run.folder / "export"


def test_averaged_weights_are_probed_exported_and_resumed(recipe, labelled, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "embed_clips", lambda model, clips: seen.append(model.encoder.state_dict()))
    monkeypatch.setattr(loop, "knn_accuracy", lambda *_: 0.5)
    monkeypatch.setattr(loop, "linear_probe_accuracy", lambda *_: 0.5)
    averaged = ["training.average_decay=0.5", f"probe.data={labelled}"]
    whole, broken = recipe(*averaged, output="whole"), recipe(*averaged, output="broken")
    plain = recipe(output="plain")
    for run in (whole, plain):
        pretrain(run)
    assert losses(whole.folder) == losses(plain.folder)  # averaging changes no step
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        assert pretrain(broken) is None
    pretrain(broken)
    average = final_state(whole.folder).average
    assert all(torch.equal(average[n], t) for n, t in final_state(broken.folder).average.items())
    for name, tensor in exported_encoder(whole).items():
        assert torch.equal(tensor, average[f"encoder.{name}"])
        assert torch.equal(tensor, seen[0][name])
    assert not torch.equal(average["encoder.cls_token"], final_state(plain.folder).model["encoder.cls_token"])


# --- warm starts -------------------------------------------------------------------------------------------------


def test_starting_from_an_exported_model_of_another_window(recipe):
    first = recipe("training.steps=3", output="first")
    exported = pretrain(first)
    second = recipe(
        f"start.model={exported}",
        "model={input_size: [80, 96]}",
        "training.steps=1",
        "training.lr=1e-14",
        output="second",
    )
    pretrain(second)
    before, after = final_state(first.folder), final_state(second.folder)
    assert after.config.grid_size == (5, 6)
    for name in before.model:
        if name.startswith("encoder.") and "pos_embed" not in name:
            torch.testing.assert_close(after.model[name], before.model[name], rtol=0, atol=1e-6)
    assert after.model["encoder.pos_embed"].shape[1] == 1 + 30
    target = after.model["target.blocks.0.mlp.fc1.weight"]
    torch.testing.assert_close(target, before.model["encoder.blocks.0.mlp.fc1.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["published", "own"])
def test_starting_from_a_full_checkpoint(recipe, tmp_path, kind):
    first = recipe("training.steps=3", "model={size: tiny, input_size: [80, 64]}", output="first")
    pretrain(first)
    state = final_state(first.folder)
    if kind == "published":
        names = {ours: theirs for theirs, ours in PUBLISHED_PARTS.items()}

        def published(name):
            for ours, theirs in names.items():
                if name == ours or name.startswith(ours + "."):
                    return theirs + name.removeprefix(ours)
            return name.removeprefix("encoder.")

        folder = tmp_path / "m2d_vit_tiny-80x64p16x16-test"
        folder.mkdir()
        file = folder / "checkpoint.pth"
        torch.save({"model": {published(name): tensor for name, tensor in state.model.items()}}, file)
    else:
        file = run_state.latest(first.folder)
    second = recipe(
        f"start={{model: {file}, parts: all}}",
        "model={}",
        "training.steps=1",
        "training.lr=1e-14",
        "training.ema_decay=[1, 1]",
        output="second",
    )
    pretrain(second)
    after = final_state(second.folder)
    assert after.model.keys() == state.model.keys()
    for name, tensor in state.model.items():
        torch.testing.assert_close(after.model[name], tensor, rtol=0, atol=1e-6)


def test_an_additional_task_begins_on_a_full_checkpoint_without_it(recipe, options):
    first = recipe("training.steps=2", output="first")
    pretrain(first)
    state, file = final_state(first.folder), run_state.latest(first.folder)
    still = ["training.steps=1", "training.lr=1e-14", "training.ema_decay=[1, 1]"]
    second = recipe("objective=m2d_as", *options("m2d_as"), f"start={{model: {file}, parts: all}}", *still, output="b")
    pretrain(second)
    after = final_state(second.folder).model
    assert {name for name in after if name not in state.model} == {"offline.weight", "offline.bias"}
    for name, tensor in state.model.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


def test_starting_with_the_predictor_and_a_new_head(recipe, options):
    task = ["objective=m2d_as", *options("m2d_as")]
    first = recipe(*task, "training.steps=2", output="first")
    pretrain(first)
    before, file = final_state(first.folder).model, run_state.latest(first.folder)
    still = ["training.steps=1", "training.lr=1e-14", "training.ema_decay=[1, 1]", "training.seed=5"]
    second = recipe(*task, f"start={{model: {file}, parts: predictor}}", *still, output="b")
    pretrain(second)
    after = final_state(second.folder).model
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        part, _, rest = name.partition(".")
        if part in ("encoder", "predictor"):
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
        elif part == "target":
            torch.testing.assert_close(after[name], before[f"encoder.{rest}"], rtol=0, atol=1e-6)
    assert not torch.allclose(after["offline.weight"], before["offline.weight"], atol=1e-3)
    assert not torch.allclose(
        after["target.blocks.0.mlp.fc1.weight"], before["target.blocks.0.mlp.fc1.weight"], atol=1e-6
    )


def test_a_start_that_does_not_fit_is_named(recipe):
    exported = pretrain(recipe("training.steps=1", output="first"))
    with pytest.raises(ConfigError, match="depth is 3, but tiny-run has 2"):
        pretrain(recipe(f"start.model={exported}", "model.depth=3", output="a"))
    for parts in ("predictor", "all"):
        with pytest.raises(CheckpointError, match="encoder alone"):
            pretrain(recipe(f"start={{model: {exported}, parts: {parts}}}", output="b"))
    ours = run_state.latest(exported.parent)
    with pytest.raises(CheckpointError, match=r"predictor\.mask_token has shape .*start\.parts=encoder"):
        pretrain(recipe(f"start={{model: {ours}, parts: all}}", "predictor.dim=24", output="c"))


# --- the command line --------------------------------------------------------------------------------------------


def test_command_line(recipe, tmp_path, sounds):
    recipe()
    file = tmp_path / "tiny-run.yaml"
    process = launch(command(file, f"data.source={sounds}", "training.steps=2", f"output={tmp_path / 'run'}"))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.strip() == str(tmp_path / "run" / "export")
    assert "2 steps of 4 crops" in errors
    process = launch(command(file, f"data.source={sounds}", "training.stepz=2"))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "training.stepz" in errors
    assert "Traceback" not in errors


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_a_recipe_is_named_by_argument_or_option():
    for arguments in (["debug", "data.source=x"], ["--recipe", "debug", "data.source=x"]):
        shown = invoke("pretrain", *arguments, "training.lr=0.5", "--show")
        assert yaml.safe_load(shown.output)["name"] == "debug"
        assert yaml.safe_load(shown.output)["training"]["lr"] == 0.5
    twice = invoke("pretrain", "debug", "--recipe", "tiny-cpu", "data.source=x")
    assert isinstance(twice.exception, ConfigError)


def test_list_and_show():
    listed = invoke("pretrain", "--list")
    assert all(name in listed.output for name in ("audioset-base", "debug", "tiny-cpu"))
    shown = invoke("pretrain", "debug", "data.source=sounds", "training.steps=7", "--show")
    assert yaml.safe_load(shown.output)["training"]["steps"] == 7
    assert yaml.safe_load(shown.output)["masking"]["mask_ratio"] == 0.7
    assert isinstance(invoke("pretrain").exception, ConfigError)


def test_export_option(recipe, tmp_path, sounds, monkeypatch):
    run = recipe()
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        pretrain(run)
    result = invoke("pretrain", tmp_path / "tiny-run.yaml", f"data.source={sounds}", f"output={run.folder}", "--export")
    assert result.output.strip() == str(run.folder / "export")
    assert final_state(run.folder).step == 2


def test_masks_command(tmp_path):
    result = invoke("masks", "-o", tmp_path / "masks.png", "--input-size", 80, 304)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"accelerate, yaml, tensorboard: pip install 'm2d-embed\[pretrain\]'"):
        cli.options.require_extra("pretrain", "accelerate", "yaml", "tensorboard")
