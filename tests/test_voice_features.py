"""Offline targets from a voice encoder, and the join of two teachers' targets."""

import csv
import json

import numpy as np
import pytest
import soundfile
import torch

from benchmarks.pretraining import join_features, resemblyzer_features
from benchmarks.pretraining.resemblyzer_features import VoiceEncoder, around
from m2d_embed.pretrain.sources import read_source

SECONDS = (1.0, 40.0, 0.2)  # one of them longer than a segment


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(40, 256, 3)
    file = tmp_path_factory.mktemp("resemblyzer") / "pretrained.pt"
    torch.save({"model_state": {f"lstm.{k}": v for k, v in lstm.state_dict().items()} | {"x": torch.zeros(1)}}, file)
    return file


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["file,seconds,kind,weight"]
    for number, seconds in enumerate(SECONDS):
        soundfile.write(tmp_path / f"{number}.wav", 0.1 * rng.standard_normal(int(16_000 * seconds)), 16_000)
        rows.append(f"{number}.wav,{seconds},{'music' if number else 'speech'},1")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    return tmp_path / "manifest.csv"


def test_states_of_a_stretch_do_not_depend_on_its_batch_nor_on_its_loudness(weights):
    encoder = VoiceEncoder(weights)
    audio = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    short, long = encoder.mels(audio[:4000]), encoder.mels(audio)
    (alone,) = encoder([short])
    together, _ = encoder([short, long])
    assert alone.shape == (26, 256)
    # Of bfloat16, whose sums PyTorch's own LSTM rounds in another order for another batch, where oneDNN has none.
    torch.testing.assert_close(alone, together, rtol=0.016, atol=1e-3)
    torch.testing.assert_close(encoder.mels(audio * np.float32(0.05)), long, rtol=1e-4, atol=1e-5)


def test_means_around_the_times_of_the_frames():
    hidden = torch.arange(480.0)[:, None].expand(-1, 3)
    found = around(hidden, 480.0)
    assert found.shape == (10, 3)
    assert found.dtype == np.float16
    assert found[3, 0] == pytest.approx(3.5 * 48 - 0.5)
    assert around(hidden[:7], 480.0)[:, 0].tolist() == [3.0]


def test_files_of_any_length_and_a_manifest(weights, corpus, tmp_path):
    resemblyzer_features.main(corpus, weights, tmp_path / "voice", hop=480.0)
    rows = list(csv.DictReader((tmp_path / "voice" / "manifest.csv").open()))
    frames = [len(np.load(tmp_path / "voice" / row["features"])) for row in rows]
    assert frames == [2, 83, 1]
    # What was heard in one go and what in two agree, as the state has a second and more to settle.
    encoder = VoiceEncoder(weights)
    audio, _ = soundfile.read(corpus.parent / "1.wav", dtype="float32")
    (whole,) = encoder([encoder.mels(audio)])
    found = np.load(tmp_path / "voice" / rows[1]["features"]).astype(np.float32)
    np.testing.assert_allclose(found, around(whole, 480.0).astype(np.float32), atol=0.02)


def test_joined_targets_give_each_teacher_the_same_part(corpus, tmp_path):
    rng = np.random.default_rng(1)
    manifests = []
    for teacher, values in (("a", 30), ("b", 6)):
        rows = ["file,seconds,kind,weight,features"]
        for number, seconds in enumerate(SECONDS):
            frames = rng.standard_normal((max(1, int(seconds * 10)), values)) * 7 + 3
            (tmp_path / teacher).mkdir(exist_ok=True)
            np.save(tmp_path / teacher / f"{number}.npy", frames.astype(np.float16))
            rows.append(f"../{number}.wav,{seconds},{'music' if number else 'speech'},1,{number}.npy")
        manifests.append(tmp_path / teacher / "manifest.csv")
        manifests[-1].write_text("\n".join(rows))
    join_features.main(tmp_path / "joined", manifests, ["music=1", "speech=3"])
    items = read_source(str(tmp_path / "joined" / "manifest.csv"))
    assert [item.file.resolve() for item in items] == [tmp_path.resolve() / f"{n}.wav" for n in range(3)]
    assert [item.weight for item in items] == pytest.approx([2.25, 0.375, 0.375])
    report = {"same name": [str(tmp_path / "2.wav")], "same sound": [{"corpus": str(tmp_path / "0.wav")}]}
    (tmp_path / "overlap.json").write_text(json.dumps(report))
    join_features.main(tmp_path / "less", manifests, without=tmp_path / "overlap.json")
    assert [item.file.name for item in read_source(str(tmp_path / "less" / "manifest.csv"))] == ["1.wav"]
    frames = np.load(items[1].features).astype(np.float32)
    assert frames.shape == (400, 36)
    parts = [np.square(frames[:, :30]).sum(1).mean(), np.square(frames[:, 30:]).sum(1).mean()]
    assert parts == pytest.approx([1, 1], rel=0.1)
    assert abs(frames.mean()) < 0.01
    parts_of_kinds = ["speech=1,1", "music=1,0.5"]
    join_features.main(tmp_path / "parts", manifests, parts=parts_of_kinds)
    by_kind = [np.load(tmp_path / "parts" / "features" / "000" / f"00{n}.npy").astype(np.float32) for n in (0, 1)]
    np.testing.assert_array_equal(by_kind[0], np.load(items[0].features).astype(np.float32))
    np.testing.assert_array_equal(by_kind[1][:, :30], frames[:, :30])
    np.testing.assert_allclose(by_kind[1][:, 30:], frames[:, 30:] / 2, atol=1e-3)


def test_join_refuses_what_does_not_fit(corpus, tmp_path):
    text = "file,seconds,kind,features\n{},1,music,0.npy\n"
    for name, file in (("a", "0.wav"), ("b", "1.wav")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.csv").write_text(text.format(f"../{file}"))
        np.save(tmp_path / name / "0.npy", np.eye(3, dtype=np.float16))
    a, b = (tmp_path / name / "manifest.csv" for name in "ab")
    with pytest.raises(SystemExit, match="same clips"):
        join_features.main(tmp_path / "joined", [a, b])
    (tmp_path / "b" / "manifest.csv").write_text(text.format("../0.wav"))
    np.save(tmp_path / "b" / "0.npy", np.eye(5, dtype=np.float16))
    with pytest.raises(SystemExit, match=r"\[3, 5\] frames"):
        join_features.main(tmp_path / "joined", [a, b])
    with pytest.raises(SystemExit, match="kinds music"):
        join_features.main(tmp_path / "joined", [a], ["speech=1"])
    for wrong in ("music", "music=", "music=-1", "music=0", "music=1,2"):
        with pytest.raises(SystemExit, match=f"--share {wrong}: write KIND=NUMBER, 0 or more"):
            join_features.main(tmp_path / "joined", [a], [wrong])
    with pytest.raises(SystemExit, match="--parts music=1: write KIND=NUMBER,NUMBER"):
        join_features.main(tmp_path / "joined", [a, a], parts=["music=1"])
