"""M2D as an nn.Module: shapes, features, gradients, windows, saving and loading."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model

from m2d_embed.config import ClapConfig, FeatureConfig, HeadConfig
from m2d_embed.errors import AudioError, CheckpointError, ConfigError, UnsupportedError
from m2d_embed.m2d import M2D

FEATURES = [
    FeatureConfig(),
    FeatureConfig(flat=True),
    FeatureConfig(layers=(0, 2)),
    FeatureConfig(layers=(0, 2), layer_pooling="concat"),
    FeatureConfig(layers=(0, -1), layer_pooling="concat", flat=True),
    FeatureConfig(scene_pooling="mean_std"),
]


@pytest.mark.parametrize("features", FEATURES)
def test_sizes_are_as_announced(features, noise):
    model = random_model(TINY, features=features)
    frames = model(noise(0.5, batch=2))
    assert frames.shape == (2, 3, model.timestamp_embedding_size)
    assert model.scene(noise(0.5, batch=2)).shape == (2, model.scene_embedding_size)
    assert type(model.scene_embedding_size) is int
    assert type(model.timestamp_embedding_size) is int
    assert type(model.sample_rate) is int


def test_features_are_made_of_the_patches(tiny, noise):
    audio = noise(0.5, batch=2)
    patches = tiny.patches(audio)  # (B, F, T, d)
    by_layer = tiny.intermediates(audio, [0, 2])
    assert torch.equal(by_layer[1], tiny(audio))
    for column in range(3):
        stacked = torch.cat([patches[:, row, column] for row in range(5)], dim=-1)
        assert torch.equal(tiny(audio)[:, column], stacked)
    tiny.features = FeatureConfig(flat=True)
    torch.testing.assert_close(tiny(audio), patches.mean(1))
    tiny.features = FeatureConfig(layers=(0, 2))
    torch.testing.assert_close(tiny(audio), (by_layer[0] + by_layer[1]) / 2)
    tiny.features = FeatureConfig(layers=(2, 0), layer_pooling="concat")
    torch.testing.assert_close(tiny(audio), torch.cat([by_layer[1], by_layer[0]], dim=-1))
    torch.testing.assert_close(tiny.scene(audio), tiny(audio).mean(1))
    tiny.features = FeatureConfig(scene_pooling="mean_std")
    spread = tiny(audio).std(1, correction=0)
    torch.testing.assert_close(tiny.scene(audio), torch.cat([tiny(audio).mean(1), spread], dim=-1))


def test_layers_of_the_model_itself(noise):
    """Those of its configuration, unless the features name others; a head reads the last, which it was trained on."""
    model = random_model(replace(TINY, layers=(0, 2), head=HeadConfig(("a", "b"), multi_label=False)))
    audio = noise(0.5, batch=2)
    first, last = model.intermediates(audio, [0, 2])
    torch.testing.assert_close(model(audio), (first + last) / 2)
    torch.testing.assert_close(torch.from_numpy(model.encode(list(audio.numpy()))), model.scene(audio))
    torch.testing.assert_close(model.logits(audio), model.head(last.mean(1)))
    model.features = FeatureConfig(layers=(-1,))
    assert torch.equal(model(audio), last)
    model.features = FeatureConfig(layer_pooling="concat")
    assert torch.equal(model(audio), torch.cat([first, last], dim=-1))
    assert model.timestamp_embedding_size == 2 * last.shape[-1]


def test_the_standard_deviation_of_a_single_column_is_zero_and_has_a_gradient(tiny, noise):
    tiny.features = FeatureConfig(scene_pooling="mean_std")
    audio = noise(0.1, batch=2).requires_grad_()
    mean, spread = tiny.scene(audio).chunk(2, dim=1)
    assert mean.abs().max() > 0.1 and spread.max() <= 1e-5
    spread.sum().backward()
    assert torch.isfinite(audio.grad).all()


def test_log_mel_is_taken_too(tiny, noise):
    audio = noise(1.3, batch=2)
    log_mel = tiny.log_mel(audio)
    assert torch.equal(tiny(log_mel), tiny(audio))
    assert torch.equal(tiny.scene(log_mel), tiny.scene(audio))
    assert torch.equal(tiny.timestamps(log_mel).embeddings, tiny.timestamps(audio).embeddings)


@pytest.mark.parametrize(
    "shape", [(16_000,), (0, 16_000), (2, 1, 16_000), (0, 0), (2, 0), (2, 1, 40, 64), (2, 2, 80, 64)]
)
def test_other_shapes_are_refused(tiny, shape):
    with pytest.raises(AudioError, match="shape"):
        tiny(torch.zeros(shape))


def test_integers_are_refused(tiny):
    with pytest.raises(AudioError, match="int16"):
        tiny(torch.zeros(1, 16_000, dtype=torch.int16))


def test_windows_are_encoded_on_their_own(tiny, noise):
    audio = noise(2.0)
    log_mel = tiny.log_mel(audio)  # 201 frames: 64 + 64 + 64 + 9
    frames = tiny.encode_frames(log_mel)
    assert frames.shape[1] == 4 + 4 + 4 + 1
    torch.testing.assert_close(frames[:, 4:8], tiny.encode_frames(log_mel[..., 64:128]))
    torch.testing.assert_close(frames[:, 12:], tiny.encode_frames(log_mel[..., 192:]))


def test_a_last_partial_patch_is_padded_after_normalisation(tiny, noise):
    log_mel = tiny.log_mel(noise(0.25))  # 26 frames: 16 + 10
    padded = torch.nn.functional.pad(log_mel, (0, 6))
    torch.testing.assert_close(tiny.encode_frames(log_mel), tiny.encode_frames(padded))


def test_an_almost_empty_column_is_seen_but_not_emitted(tiny, noise):
    log_mel = tiny.log_mel(noise(0.2))  # 21 frames: 16 + 5
    padded = torch.nn.functional.pad(log_mel, (0, 11))
    assert tiny.encode_frames(log_mel).shape[1] == 1
    torch.testing.assert_close(tiny.encode_frames(log_mel), tiny.encode_frames(padded)[:, :1])


def test_many_windows_of_many_clips(tiny, noise, monkeypatch):
    """More windows than are encoded at a time give the same numbers."""
    monkeypatch.setattr("m2d_embed.model.network._CPU_ACTIVATIONS", 5 * 20 * 128)  # of five windows
    audio = noise(15.0, batch=3)
    one_by_one = torch.cat([tiny(clip[None]) for clip in audio])
    torch.testing.assert_close(tiny(audio), one_by_one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seconds", [0.01, 0.03, 0.16, 0.5, 1.07, 6.5])
def test_timestamps_are_centres(tiny, noise, seconds):
    embeddings, times = tiny.timestamps(noise(seconds, batch=2))
    assert embeddings.shape[:2] == times.shape
    assert torch.equal(times[0], times[1])
    assert times.max() <= 1000 * seconds
    if seconds >= 0.08:
        assert torch.equal(times[0], 75 + 160 * torch.arange(times.shape[1], dtype=torch.float32))
        assert 1000 * seconds - times.max() < 160 + 80


@pytest.mark.parametrize("hop_ms", [10, 40, 80, 160])
def test_finer_hop_interleaves_shifted_copies(noise, hop_ms):
    model = random_model(TINY, features=FeatureConfig(hop_ms=hop_ms))
    audio = noise(1.51)
    embeddings, times = model.timestamps(audio)
    step = hop_ms // 10
    assert torch.equal(times[0], 75 + hop_ms * torch.arange(len(times[0]), dtype=torch.float32))
    log_mel = model.log_mel(audio)
    for shift in range(0, 16, step):
        shifted = model.encode_frames(log_mel[..., shift:])
        expected = shifted[:, : len(range(shift // step, embeddings.shape[1], 16 // step))]
        torch.testing.assert_close(embeddings[:, shift // step :: 16 // step], expected, atol=1e-5, rtol=0)
    assert 1510 - times.max() < 80 + hop_ms


def test_impossible_features_are_refused():
    for features, message in [
        (FeatureConfig(hop_ms=50), "choose one of 10, 20, 40, 80, 160"),
        (FeatureConfig(layers=(3,)), "run from 0 to 2"),
        (FeatureConfig(layers=()), "empty"),
        (FeatureConfig(layer_pooling="max"), "layer_pooling"),
    ]:
        with pytest.raises(ConfigError, match=message):
            M2D(TINY, features)


def test_an_event_is_found_at_its_time(bundled):
    """A click in silence changes most the embedding whose stamp is nearest to it."""
    audio = torch.zeros(1, 48_000)
    quiet = bundled.timestamps(audio).embeddings
    audio[0, 24_000:24_200] = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 0.5
    embeddings, times = bundled.timestamps(audio)
    change = (embeddings - quiet).norm(dim=-1)[0]
    assert abs(times[0, change.argmax()] - 1500) <= 160


def test_gradients_reach_audio_and_weights(tiny, noise):
    audio = noise(0.7, batch=2).requires_grad_()
    tiny.train()
    tiny(audio).square().mean().backward()
    assert audio.grad.abs().sum() > 0
    without = [name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_trains_inside_another_module(noise):
    """An ordinary fine-tuning loop lowers the loss."""
    torch.manual_seed(0)
    classifier = torch.nn.Sequential(random_model(TINY), torch.nn.Flatten(), torch.nn.Linear(3 * 160, 2))
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    labels = torch.arange(8) % 2
    pitch = torch.tensor([500.0, 3000.0])[labels, None]
    audio = torch.sin(2 * torch.pi * pitch * torch.arange(8_000) / 16_000) + 0.1 * noise(0.5, batch=8)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(classifier(audio), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("dtype", ["bf16", "float16", torch.bfloat16])
def test_output_is_float32_whatever_the_dtype(tmp_path, tiny, noise, dtype):
    tiny.save_pretrained(tmp_path)
    model = M2D.from_pretrained(tmp_path, dtype=dtype)
    assert model.dtype in (torch.bfloat16, torch.float16)
    audio = noise(1.0)
    for got, expected in [(model(audio), tiny(audio)), (model.scene(audio), tiny.scene(audio))]:
        assert got.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.999


def test_works_when_cast_as_a_whole(tiny, noise):
    audio = noise(1.0)
    expected = tiny.scene(audio)
    got = tiny.to(torch.bfloat16).scene(audio.to(torch.bfloat16).float())
    assert got.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1) > 0.99


def test_heads_work_when_cast_and_under_autocast(noise):
    clap = ClapConfig("mlp", (32, 24), (32, 24), "some/encoder", "mean")
    model = random_model(replace(TINY, head=HeadConfig(("a", "b")), clap=clap))
    audio = noise(1.0)
    expected = [model.logits(audio), model.frame_logits(audio), model.encode_audio_clap(audio)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = [model.logits(audio), model.frame_logits(audio), model.encode_audio_clap(audio)]
    model.to(torch.bfloat16)
    cast += [model.logits(audio), model.frame_logits(audio), model.encode_audio_clap(audio)]
    for got, exact in zip(cast, expected * 2, strict=True):
        assert got.dtype == torch.float32
        assert (got - exact).abs().max() < 0.1 * exact.abs().max()


def test_the_default_dtype_does_not_matter(noise):
    audio = noise(0.5)
    torch.set_default_dtype(torch.float64)
    try:
        log_mel = M2D(TINY).log_mel(audio)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(log_mel, M2D(TINY).log_mel(audio))


def test_unknown_dtype_is_refused(tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="bf16"):
        M2D.from_pretrained(tmp_path, dtype="int4")


def test_save_and_load_are_exact(tmp_path, tiny, noise):
    tiny.save_pretrained(tmp_path / "model")
    loaded = M2D.from_pretrained(tmp_path / "model")
    assert loaded.config == tiny.config
    assert not loaded.training
    assert torch.equal(loaded(noise(1.0)), tiny(noise(1.0)))
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_a_model_can_be_saved_where_it_came_from(tmp_path, tiny, noise):
    tiny.save_pretrained(tmp_path)
    loaded = M2D.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.encoder.norm.bias += 1
    loaded.save_pretrained(tmp_path)
    torch.testing.assert_close(M2D.from_pretrained(tmp_path)(noise(0.5)), tiny(noise(0.5)) + 1)


def test_config_that_disagrees_with_the_tensors(tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(replace(TINY, depth=4).to_json())
    with pytest.raises(CheckpointError, match=r"encoder\.blocks\.3\.\S+ is missing"):
        M2D.from_pretrained(tmp_path)


def test_models_without_heads_say_so(tiny, noise):
    for call in (tiny.logits, tiny.frame_logits, tiny.encode_audio_clap):
        with pytest.raises(UnsupportedError, match="m2d_vit_test"):
            call(noise(0.5))
    with pytest.raises(UnsupportedError, match="CLAP"):
        tiny.encode_text(["a dog"])


def test_the_bundled_model_tells_speech_from_other_sounds(bundled):
    """Spoken digits are nearer to each other than to bells, alarms and shutters."""
    from conftest import DATA

    files = sorted(DATA.glob("*/*.o*"))
    scenes = torch.from_numpy(bundled.encode(files))
    scenes = torch.nn.functional.normalize(scenes - scenes.mean(0), dim=1)
    speech = torch.tensor([file.parent.name == "digits" for file in files])
    similarity = scenes @ scenes.T
    assert similarity[speech][:, speech].mean() > similarity[speech][:, ~speech].mean() + 0.3
