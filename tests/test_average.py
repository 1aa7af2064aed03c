"""The mean of the weights of models."""

import dataclasses

import pytest
import torch
from conftest import TINY, random_model

import m2d_embed
from benchmarks.pretraining.average import main


@pytest.fixture
def models(tmp_path):
    """Folders of three models that differ in their weights alone."""
    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        random_model(TINY, seed=seed).save_pretrained(folder)
    return [str(folder) for folder in folders]


def test_every_tensor_is_the_mean(models, tmp_path, noise):
    main(tmp_path / "mean", models)
    mean = m2d_embed.load_model(tmp_path / "mean")
    assert mean.config.input_size == TINY.input_size
    assert torch.isfinite(mean.scene(noise(1.0))).all()
    states = [m2d_embed.load_model(folder).encoder.state_dict() for folder in models]
    for name, tensor in mean.encoder.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name] + states[2][name]) / 3)


def test_the_mean_of_one_is_itself(models, tmp_path):
    main(tmp_path / "mean", models[1:2])
    mean, one = m2d_embed.load_model(tmp_path / "mean"), m2d_embed.load_model(models[1])
    assert all(torch.equal(a, b) for a, b in zip(mean.parameters(), one.parameters(), strict=True))


@pytest.mark.parametrize("change", [{"depth": 2}, {"norm_stats": (-5.0, 4.0)}, {"hop_length": 100}])
def test_unlike_models_are_refused(models, tmp_path, change):
    random_model(dataclasses.replace(TINY, **change)).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=f"unlike models: {next(iter(change))} of"):
        main(tmp_path / "mean", [*models, str(tmp_path / "other")])
    assert not (tmp_path / "mean" / "model.safetensors").exists()
