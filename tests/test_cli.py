"""The command line as a user meets it, on real files."""

import io
import json
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from conftest import DATA, TINY, WORDS, random_model

from m2d_embed.audio.clips import load_audio
from m2d_embed.backends import selection, threads
from m2d_embed.checkpoints.registry import BUNDLED_NAME, RELEASES
from m2d_embed.cli import main
from m2d_embed.config import CheckpointName, ClapConfig, HeadConfig
from m2d_embed.jobs.outputs import read_scenes
from m2d_embed.m2d import M2D

ALARM = DATA / "sounds" / "alarm-clock-elapsed.oga"


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments) -> Result:
    """Run the command line in this process: what it prints and returns are a process's."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["m2d-embed", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
    return Result(status, out.getvalue(), err.getvalue())


def picture_size(png: Path) -> tuple[int, int]:
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_help_names_every_command():
    shown = run("--help").stdout
    for command in (
        "embed",
        "tag",
        "zero-shot",
        "similar",
        "plot",
        "convert",
        "export",
        "info",
        "models",
        "probe",
        "finetune",
    ):
        assert command in shown
        assert run(command, "--help").returncode == 0


def test_embed_a_folder_with_a_bad_file(tmp_path):
    (tmp_path / "bad.wav").write_text("text")
    result = run("embed", DATA, tmp_path / "bad.wav", "-o", tmp_path / "out.parquet")
    assert result.returncode == 1
    assert "bad.wav: not audio that can be read" in result.stderr
    assert "12 clips, 1920 values each" in result.stdout
    names, embeddings, _ = read_scenes(tmp_path / "out.parquet")
    assert len(names) == 12
    assert embeddings.shape == (12, 1920)
    again = run("embed", DATA, "--scene-pooling", "mean", "-o", tmp_path / "mean.parquet")
    assert "12 clips, 960 values each" in again.stdout
    _, means, _ = read_scenes(tmp_path / "mean.parquet")
    assert np.abs(means - embeddings[:, :960]).max() <= 1e-5


def test_embed_the_files_of_a_list(tmp_path):
    (tmp_path / "list.txt").write_text(f"{ALARM}\n{tmp_path / 'gone.wav'}\n")
    (tmp_path / "table.csv").write_text(f"file,label\n{ALARM},x\n")
    for arguments, status in ((["--list", tmp_path / "list.txt"], 1), ([tmp_path / "table.csv"], 0)):
        result = run("embed", *arguments, "-o", tmp_path / f"{status}.npz")
        assert result.returncode == status
        assert ("gone.wav: no such file" in result.stderr) == bool(status)
        assert read_scenes(tmp_path / f"{status}.npz")[0] == [str(ALARM)]
    assert "give --list FILE" in run("embed", "-o", tmp_path / "none.npz").stderr


def test_embed_errors_have_no_traceback(tmp_path):
    for arguments, message in [
        ((tmp_path, "-o", tmp_path / "o.npz"), "no audio files in this folder"),
        ((tmp_path / "no.wav", "-o", tmp_path / "o.npz"), "no such file or folder"),
        ((DATA, "-o", tmp_path / "o.csv"), "unknown kind of output"),
        ((DATA, "-o", tmp_path / "o.npz", "--hop-ms", "33"), "hop_ms=33"),
        ((DATA, "-o", tmp_path / "o.npz", "--layers", "1,x"), "--layers"),
        ((DATA, "-o", tmp_path / "o.npz", "--model", "m2d_vit_bsae"), "known model"),
    ]:
        result = run("embed", *arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on(tmp_path, monkeypatch, how):
    """Stopped in the middle; the same command goes on, and the result is that of an undisturbed run."""
    generator = np.random.default_rng(0)
    (tmp_path / "clips").mkdir()
    for i in range(60):
        soundfile.write(tmp_path / "clips" / f"{i:02}.wav", 0.1 * generator.standard_normal(160_000), 16_000)
    monkeypatch.chdir(tmp_path)
    arguments = ["embed", "clips", "--batch-size", "1", "-o", "out.npz"]
    every_clip_a_part = (
        "from m2d_embed import cli; from m2d_embed.jobs import embed as e; e._SECONDS_A_PART = 0.0; cli.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", every_clip_a_part, *arguments], stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("out.npz.partial/part-*.json"))) < 3:
        assert process.poll() is None, "finished before it could be stopped"
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in err
    assert not (tmp_path / "out.npz").exists()
    result = run(*arguments)
    assert result.returncode == 0
    assert "by an earlier run" in result.stdout
    names, embeddings, _ = read_scenes(tmp_path / "out.npz")
    assert names == [f"clips/{i:02}.wav" for i in range(60)]
    assert np.abs(embeddings - M2D.from_pretrained().encode(names)).max() <= 1e-5
    assert not (tmp_path / "out.npz.partial").exists()


def test_a_disk_quota_is_reported(tmp_path):
    """A limit on file size stands in for a full disk: the system refuses the write."""
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
    code = limit + "sys.argv[0] = 'm2d-embed'; runpy.run_module('m2d_embed', run_name='__main__')"
    limited = [sys.executable, "-B", "-c", code, "embed", str(DATA), "-o", str(tmp_path / "o.npz")]
    result = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "File too large" in result.stderr
    assert "try again to go on" in result.stderr
    assert "Traceback" not in result.stderr


def test_timestamps_with_a_hop(tmp_path):
    assert run("embed", ALARM, "--kind", "timestamps", "--hop-ms", 40, "-o", tmp_path / "o.npz").returncode == 0
    times = np.load(tmp_path / "o.npz")["timestamps"]
    assert np.allclose(np.diff(times), 40)
    assert times[0] == 75


def test_similar_in_a_folder_and_in_an_index(tmp_path):
    query = DATA / "digits" / "3_theo_0.opus"
    result = run("similar", query, DATA, "-k", 3, "--json")
    assert result.returncode == 0
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == 3
    assert str(query) not in [line["file"] for line in found]
    assert all(Path(line["file"]).parent.name == "digits" for line in found)
    assert [line["similarity"] for line in found] == sorted((line["similarity"] for line in found), reverse=True)
    run("embed", DATA, "-o", tmp_path / "index.npz")
    indexed = run("similar", query, tmp_path / "index.npz", "-k", 1).stdout
    assert indexed == f"{found[0]['similarity']:.4f}  {found[0]['file']}\n"
    run("embed", DATA, "-o", tmp_path / "flat.npz", "--flat")
    refused = run("similar", query, tmp_path / "flat.npz")
    assert refused.returncode == 2
    assert "other settings" in refused.stderr


def test_features_of_a_model_are_switched_off(tmp_path):
    random_model(replace(TINY, flat=True, layers=(0, 1), layer_pooling="concat")).save_pretrained(tmp_path / "model")
    sizes = {}
    for options in ((), ("--no-flat",), ("--no-concat",), ("--no-flat", "--no-concat"), ("--flat", "--concat")):
        output = tmp_path / f"out{len(sizes)}.npz"
        assert run("embed", ALARM, "-o", output, "--model", tmp_path / "model", *options).returncode == 0
        sizes[options] = read_scenes(output).embeddings.shape[1]
    size, rows = TINY.embed_dim, TINY.grid_size[0]
    assert list(sizes.values()) == [2 * size, 2 * size * rows, size, size * rows, 2 * size]


@pytest.fixture(scope="module")
def tagger(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tagger")
    labels = ("alarm", "bell", "speech")
    random_model(replace(TINY, head=HeadConfig(labels))).save_pretrained(folder)
    return folder


def test_tag(tagger):
    shown = run("tag", ALARM, "--model", tagger, "-k", 2).stdout.splitlines()
    assert shown[0] == str(ALARM)
    assert len(shown) == 3
    as_json = json.loads(run("tag", ALARM, "--model", tagger, "--json").stdout)
    assert set(as_json["tags"]) == {"alarm", "bell", "speech"}
    frames = [
        json.loads(line) for line in run("tag", ALARM, "--model", tagger, "--frames", "--json").stdout.splitlines()
    ]
    assert [line["seconds"] for line in frames[:3]] == [0.075, 0.235, 0.395]
    assert len(frames) == 38


def test_places_that_cannot_be_written(tmp_path):
    result = run("plot", ALARM, "-o", tmp_path / "nowhere" / "x.png")
    assert result.returncode == 2
    assert "nowhere does not exist" in result.stderr
    (tmp_path / "plain").touch()
    assert "is a file" in run("embed", ALARM, "-o", tmp_path / "plain").stderr
    (tmp_path / "d.npz").mkdir()
    assert "is a folder" in run("embed", ALARM, "-o", tmp_path / "d.npz", "--overwrite").stderr
    (tmp_path / "weights").mkdir()
    refused = run("convert", tmp_path / "weights", tmp_path / "plain" / "out")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_verbose_says_what_a_checkpoint_holds_besides(tmp_path):
    name = "m2d_vit_tiny-80x64p16x16-990101"
    state = M2D(CheckpointName.parse(name).model_config()).encoder.state_dict()
    (tmp_path / name).mkdir()
    torch.save({**state, "mask_token": torch.zeros(1)}, tmp_path / name / "checkpoint.pth")
    assert "mask_token (1)" in run("convert", tmp_path / name, tmp_path / "converted").stdout
    assert "mask_token (1)" in run("--verbose", "info", tmp_path / name).stderr


def test_tag_with_a_model_that_cannot(tmp_path):
    result = run("tag", ALARM, "--model", BUNDLED_NAME)
    assert result.returncode == 2
    assert "has no tagging head" in result.stderr


def test_tag_reports_bad_files(tagger, tmp_path):
    (tmp_path / "bad.wav").write_text("text")
    result = run("tag", tmp_path / "bad.wav", ALARM, "--model", tagger)
    assert result.returncode == 1
    assert "bad.wav" in result.stderr
    assert str(ALARM) in result.stdout


@pytest.fixture
def clap(tmp_path, bert) -> Path:
    config = ClapConfig("mlp", (32, 24), (32, 24), str(bert), "mean")
    random_model(replace(TINY, clap=config)).save_pretrained(tmp_path / "clap")
    return tmp_path / "clap"


def test_zero_shot(clap, bert, tmp_path):
    labels = WORDS[5:8]
    arguments = ["--model", clap, "--labels", ",".join(labels), "--template", "a {}", "--json"]
    line = json.loads(run("zero-shot", ALARM, *arguments).stdout)
    model = M2D.from_pretrained(clap)
    with torch.no_grad():
        audio = model.encode_audio_clap(torch.from_numpy(load_audio(ALARM, 16_000))[None])
        text = model.encode_text([f"a {label}" for label in labels])
        cosine = torch.nn.functional.cosine_similarity(audio, text)
        expected = (cosine * model.clap.logit_scale.exp()).softmax(0)
    assert line["file"] == str(ALARM)
    assert line["tags"] == {label: pytest.approx(p.item(), abs=1e-5) for label, p in zip(labels, expected, strict=True)}
    assert list(line["tags"].values()) == sorted(line["tags"].values(), reverse=True)
    (tmp_path / "bad.wav").write_text("text")
    assert run("zero-shot", tmp_path / "bad.wav", *arguments).returncode == 1
    assert "--template" in run("zero-shot", ALARM, "--model", clap, "--labels", "a", "--template", "x").stderr


def test_plot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("plot", ALARM, "--hop-ms", 80)
    assert result.returncode == 0
    width, height = picture_size(tmp_path / "alarm-clock-elapsed.oga.png")
    assert width > 800
    assert height > 800
    assert run("plot", DATA / "sounds" / "bell.oga", "-o", tmp_path / "one.png").returncode == 0  # one column
    assert run("plot", ALARM, "-o", tmp_path / "x.jpg").returncode == 2


def test_convert_and_info(tmp_path, tagger):
    result = run("convert", tagger, tmp_path / "converted", "--dtype", "bf16")
    assert result.returncode == 0
    assert "model.bf16.safetensors" in result.stdout
    facts = json.loads(run("info", tmp_path / "converted", "--json").stdout)
    assert facts["name"] == TINY.name
    assert facts["scene embedding"] == 160
    again = run("convert", tagger, tmp_path / "converted")
    assert again.returncode == 2
    assert "choose another destination" in again.stderr
    assert "no such file" in run("convert", tmp_path / "none", tmp_path / "x").stderr


def test_info_of_the_bundled_model():
    shown = run("info").stdout
    for part in (
        BUNDLED_NAME,
        *selection.describe(M2D.from_pretrained().encoder).values(),
        "bundled with m2d-embed",
        "16000 Hz",
        threads.describe(),
        "6, 7, 8, 9",
        "960",
        "Apache-2.0",
        "tiny-cpu-teachers",
    ):
        assert part in shown


def test_models_lists_what_exists():
    names = {line.split()[0] for line in run("models").stdout.splitlines()}
    assert names == {BUNDLED_NAME, *RELEASES}
