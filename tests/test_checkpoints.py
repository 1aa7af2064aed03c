"""Every published layout against the tensors it was made of and independent arithmetic; our layout; unsafe files."""

import argparse
import io
import json
import os
import pickle
import stat
import tempfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ORACLE, TINY, oracle_cases, random_model
from published import (
    FINE_TUNED,
    NAME,
    depth_of,
    draw,
    encoder_state,
    head_state,
    linear_state,
    log_mel,
    patch_features,
    save,
    sincos,
    under,
    write_zip,
)
from safetensors.torch import load_file, save_file

from m2d_embed import config
from m2d_embed.checkpoints import hub, layouts
from m2d_embed.checkpoints.layouts import convert, load_checkpoint, read_checkpoint, summarise_unused
from m2d_embed.config import ModelConfig
from m2d_embed.errors import CheckpointError, ConfigError, ModelNotFoundError
from m2d_embed.m2d import M2D


def assert_holds(model: M2D, state: dict[str, torch.Tensor]) -> None:
    """The model's encoder is that state dict, number by number."""
    ours = model.encoder.state_dict()
    assert ours.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(ours[name], tensor.float()), name


# --- the reference numbers ---------------------------------------------------------------------------------------


@oracle_cases()
def test_agrees_with_the_reference(case, tmp_path):
    model = M2D.from_pretrained(case.write_pth(tmp_path))
    info, expected = case.info, case.expected
    mean, std = model.config.norm_stats
    assert model.sample_rate == info["sample_rate"]
    for duration in info["durations"]:
        key = str(duration).replace(".", "_")
        audio = torch.from_numpy(expected[f"audio_{key}"])
        with torch.no_grad():
            spectrum = model.log_mel(audio)[0] * std + mean
            flat = info["feature_d"] == model.config.embed_dim
            frames = model.patches(audio).flatten(1, 2) if flat else model(audio)
            reference = expected[f"logmel_{key}"]
            assert np.abs(spectrum[..., : reference.shape[-1]].numpy() - reference).max() < 2e-4
            assert frames.shape == expected[f"frames_{key}"].shape
            assert np.abs(frames.numpy() - expected[f"frames_{key}"]).max() < 1e-4
            if f"logits_{key}" in expected:
                assert np.abs(model.logits(audio).numpy() - expected[f"logits_{key}"]).max() < 5e-4
            if f"clap_{key}" in expected:
                assert np.abs(model.encode_audio_clap(audio).numpy() - expected[f"clap_{key}"]).max() < 1e-4


@pytest.mark.skipif(not ORACLE.exists(), reason="needs ../shared/oracle")
def test_positions_of_this_test_are_the_references():
    expected = np.load(ORACLE / "pretrain" / "m2d" / "expected.npz")
    rows, columns = expected["input"].shape[2] // 16, expected["input"].shape[3] // 16
    assert np.abs(sincos(96, rows, columns).numpy() - expected["pos_embed"]).max() < 1e-6


# --- what a published checkpoint computes ------------------------------------------------------------------------

SHAPES = {  # name -> patch, grid; 0.63 s are 64 frames of log-mel
    "m2d_vit_tiny-80x64p16x16-990101": ((16, 16), (5, 4)),
    "m2d_vit_tiny-80x64p16x4-990101": ((16, 4), (5, 16)),
    "m2d_s_vit_tiny-80x64p80x2-990101": ((80, 2), (1, 32)),
    "m2d_as_vit_tiny-80x64p16x16p32k-990101_enconly": ((16, 16), (5, 4)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_computes_what_the_name_and_the_tensors_say(name, tmp_path, noise):
    patch, grid = SHAPES[name]
    sample_rate = 32_000 if "32k" in name else 16_000
    state = encoder_state(patch=patch, patches=grid[0] * grid[1])
    model = M2D.from_pretrained(save(tmp_path, {"model": {**state, "norm_stats": torch.tensor([-6.5, 4.6])}}, name))
    audio = noise(0.63 * sample_rate / 16_000, batch=2)
    normalised = (log_mel(audio, sample_rate) - -6.5) / 4.6
    assert normalised.shape == (2, 80, 64)
    expected = patch_features(state, normalised)
    with torch.no_grad():
        assert (model.log_mel(audio)[:, 0] - normalised).abs().max() < 1e-4
        assert model.sample_rate == sample_rate
        assert model.patches(audio).shape == (2, *grid, 192)
        assert (model.patches(audio) - expected).abs().max() < 1e-4
        stacked = torch.stack([expected[:, :, t].flatten(1) for t in range(grid[1])], dim=1)
        assert (model(audio) - stacked).abs().max() < 1e-4


def test_large_has_24_layers_and_16_heads(tmp_path, monkeypatch, noise):
    assert config.VIT_SIZES["large"] == (1024, 24, 16)
    monkeypatch.setitem(config.VIT_SIZES, "large", (64, 24, 16))  # narrower, to be quick
    state = encoder_state(dim=64, depth=24)
    model = M2D.from_pretrained(save(tmp_path, state, "m2d_vit_large-80x64p16x16-990101"))
    normalised = (log_mel(noise(0.63)) - -7.1) / 4.2
    with torch.no_grad():
        assert (model.patches(noise(0.63)) - patch_features(state, normalised, heads=16)).abs().max() < 1e-4


# --- layouts -----------------------------------------------------------------------------------------------------

ARGUMENTS = argparse.Namespace(
    lr=3e-4, output_dir=Path("/runs/m2d"), mean=np.float64(-7.1), epochs=np.int64(300), stats=np.array([-7.1, 4.2])
)
LAYOUTS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state},
    "training": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "epoch": 300,
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
        "args": ARGUMENTS,
    },
    "backbone": lambda state: under("backbone.", state),
    "fine-tuned": lambda state: {"model": under(FINE_TUNED, state)},
    "data parallel": lambda state: {"model": under("module.", state)},
    "parameters": lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
    "views of one tensor": lambda state: {name: torch.stack([tensor, tensor])[1] for name, tensor in state.items()},
    "not contiguous": lambda state: {
        name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in state.items()
    },
    "numbers beside tensors": lambda state: {"model": {**state, "version": 3, "notes": "x"}},
    "buffers of the runtime": lambda state: {
        **under(FINE_TUNED, state),
        "module.ar.runtime.to_spec.mel_basis": torch.zeros(80, 201),
        "module.ar.runtime.to_spec.stft.wsin": torch.zeros(201, 1, 400),
    },
    "a teacher beside it": lambda state: {
        **under("teacher.", {name: tensor + 1 for name, tensor in state.items()}),
        **under("module.backbone.", state),
        **under("module.target_", {name: tensor + 1 for name, tensor in state.items()}),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_encoder(layout, tmp_path):
    state = encoder_state()
    model = M2D.from_pretrained(save(tmp_path, LAYOUTS[layout](state)))
    assert_holds(model, state)
    assert model.config.norm_stats == (-7.1, 4.2)
    assert model.head is None
    assert model.clap is None
    assert not model.training
    assert all(parameter.is_leaf for parameter in model.parameters())
    assert not model.encoder.pos_embed.requires_grad


def test_torch_files_of_before_2020(tmp_path):
    file = save(tmp_path, {"model": encoder_state()}, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(file)
    assert_holds(M2D.from_pretrained(file), encoder_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_another_precision(dtype, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in encoder_state().items()}
    model = M2D.from_pretrained(save(tmp_path, state))
    assert_holds(model, state)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_positions_are_computed_where_the_file_has_none(tmp_path):
    state = encoder_state()
    del state["pos_embed"]
    model = M2D.from_pretrained(save(tmp_path, state))
    assert (model.encoder.pos_embed - sincos(192, 5, 4)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("norm_stats", [-6.5, 4.5], (-6.5, 4.5)),
        ("norm_stats", [[-6.5], [4.5]], (-6.5, 4.5)),
        (None, None, (-7.1, 4.2)),
    ],
)
def test_norm_stats(key, value, expected, tmp_path):
    state = encoder_state() | ({key: torch.tensor(value)} if key else {})
    assert M2D.from_pretrained(save(tmp_path, state)).config.norm_stats == expected


def test_norm_stats_of_the_encoder_come_before_others(tmp_path):
    state = under(FINE_TUNED, encoder_state())
    outer = {"module.ar.norm_stats": torch.tensor([-5.0, 2.0])}
    assert read_checkpoint(save(tmp_path, state | outer)).config.norm_stats == (-5.0, 2.0)
    own = {f"{FINE_TUNED}norm_stats": torch.tensor([-6.0, 3.0])}
    assert read_checkpoint(save(tmp_path, state | outer | own)).config.norm_stats == (-6.0, 3.0)


@pytest.mark.parametrize("value", [[-7.1], [-7.1, 4.2, 1.0], [-7.1, 0.0], [float("nan"), 4.2], [-7.1, float("inf")]])
def test_norm_stats_that_make_no_sense(value, tmp_path):
    with pytest.raises(CheckpointError, match="norm_stats"):
        M2D.from_pretrained(save(tmp_path, {**encoder_state(), "norm_stats": torch.tensor(value)}))


PRETRAINING = {
    "mask_token": torch.zeros(1, 1, 512),
    "decoder_pos_embed": torch.zeros(1, 21, 512),
    **linear_state("decoder_embed", 192, 512, 0),
    **linear_state("decoder_blocks.0.attn.qkv", 512, 1536, 0),
    **linear_state("decoder_blocks.1.attn.qkv", 512, 1536, 0),
    "decoder_norm.weight": torch.ones(512),
    "decoder_norm.bias": torch.ones(512),
    **linear_state("decoder_pred", 512, 192, 0),
    **under("target_", {k: t + 1 for k, t in encoder_state().items() if k.startswith(("blocks.", "norm."))}),
    **linear_state("offline_predictor", 960, 24, 0),
}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_pretraining_checkpoint_leaves_decoder_and_target_behind(prefix, tmp_path, caplog):
    state = encoder_state()
    file = save(tmp_path, {"model": under(prefix, state | PRETRAINING)})
    checkpoint = read_checkpoint(file)
    assert sorted(checkpoint.unused) == sorted(under(prefix, PRETRAINING))
    with caplog.at_level("INFO", logger="m2d_embed"):
        assert_holds(M2D.from_pretrained(file), state)
    assert (
        "decoder_blocks (4), decoder_embed (2), decoder_norm (2), decoder_pos_embed (1), decoder_pred (2), "
        "mask_token (1), offline_predictor (2), target_blocks (144), target_norm (2)"
    ) in caplog.text


def test_unused_tensors_are_summed_up_by_component():
    keys = ["module.ar.runtime.to_spec.a", "module.ar.runtime.to_spec.b", "backbone.decoder.x", "mask_token"]
    assert summarise_unused(keys) == "decoder (1), mask_token (1), to_spec (2)"
    assert summarise_unused([]) == ""


def test_an_unknown_tensor_of_a_block_is_not_ignored(tmp_path):
    with pytest.raises(CheckpointError, match=r"encoder\.blocks\.3\.ls1\.gamma is not part of the model"):
        M2D.from_pretrained(save(tmp_path, {**encoder_state(), "blocks.3.ls1.gamma": torch.ones(192)}))


# --- where a checkpoint may lie ----------------------------------------------------------------------------------


def test_by_file_by_folder_and_by_relative_path(tmp_path, monkeypatch):
    file = save(tmp_path, {"model": encoder_state()})
    for path in (file, str(file), file.parent, f"{file.parent}/"):
        model = M2D.from_pretrained(path)
        assert_holds(model, encoder_state())
        assert model.config.name == NAME
        assert model.config.source == f"{NAME}/checkpoint-300.pth"
    monkeypatch.chdir(file.parent)
    for path in (".", "./checkpoint-300.pth", "checkpoint-300.pth"):
        assert_holds(M2D.from_pretrained(path), encoder_state())


def test_name_of_the_file_serves_where_the_folder_has_none(tmp_path):
    file = tmp_path / "downloads" / f"{NAME}.pth"
    save(tmp_path, encoder_state()).parent.rename(file.parent)
    (file.parent / "checkpoint-300.pth").rename(file)
    assert_holds(M2D.from_pretrained(file), encoder_state())
    assert_holds(M2D.from_pretrained(file.parent), encoder_state())


def test_links_as_in_a_download_cache(tmp_path):
    file = save(tmp_path / "real", encoder_state())
    blob = file.rename(tmp_path / "0123abcd")
    file.symlink_to(blob)
    alias = tmp_path / "current"
    alias.symlink_to(file.parent)
    for path in (file, file.parent, alias):
        assert_holds(M2D.from_pretrained(path), encoder_state())


ZIPS = {
    "release": (f"{NAME}.zip", f"{NAME}/checkpoint-300.pth"),
    "renamed": ("download.zip", f"{NAME}/checkpoint-300.pth"),
    "flat": (f"{NAME}.zip", "checkpoint-300.pth"),
    "deep": ("x.zip", f"m2d/{NAME}/checkpoint-300.pth"),
}


@pytest.mark.parametrize("kind", ZIPS)
def test_zip(kind, tmp_path):
    name, member = ZIPS[kind]
    content = save(tmp_path, {"model": encoder_state()}).read_bytes()
    extras = {f"{NAME}/LICENSE.pdf": b"%PDF", f"__MACOSX/{NAME}/._checkpoint-300.pth": b"resource fork"}
    archive = write_zip(tmp_path / "zips" / name, {member: content, **extras})
    model = M2D.from_pretrained(archive)
    assert_holds(model, encoder_state())
    assert model.config.name == NAME
    assert model.config.source == f"{name}: {member}"
    assert [p.name for p in archive.parent.iterdir()] == [name]


# --- conversion --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["pth", "folder", "zip", "native"])
def source(request, tmp_path):
    file = save(tmp_path / "source", {"model": encoder_state() | {"norm_stats": torch.tensor([-6.0, 3.0])}})
    if request.param == "zip":
        return write_zip(tmp_path / f"{NAME}.zip", {f"{NAME}/{file.name}": file.read_bytes()})
    if request.param == "native":
        convert(file, tmp_path / "native")
        return tmp_path / "native"
    return file if request.param == "pth" else file.parent


def test_convert_is_exact(source, tmp_path, noise):
    before = M2D.from_pretrained(source)
    destination = tmp_path / "new" / "model"
    checkpoint = convert(source, destination, [torch.bfloat16])
    assert sorted(p.name for p in destination.iterdir()) == [
        "README.md",
        "config.json",
        "model.bf16.safetensors",
        "model.safetensors",
    ]
    after = M2D.from_pretrained(destination)
    assert after.config == before.config == checkpoint.config
    assert after.config.norm_stats == (-6.0, 3.0)
    assert_holds(after, encoder_state())
    with torch.no_grad():
        assert (after(noise(1.0)) - before(noise(1.0))).abs().max() < 1e-5  # sums differ with the memory's alignment
    assert [p.name for p in destination.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sibling(dtype, tmp_path, noise):
    state = encoder_state()
    convert(save(tmp_path, state), tmp_path / "out", [dtype])
    stored = load_file(tmp_path / "out" / layouts.WEIGHT_FILES[dtype])
    assert {name.removeprefix("encoder.") for name in stored} == state.keys()
    for name, tensor in state.items():
        in_matrices = name.startswith("blocks.") and ".norm" not in name
        assert stored[f"encoder.{name}"].dtype == (dtype if in_matrices else torch.float32), name
        assert torch.equal(stored[f"encoder.{name}"], tensor.to(stored[f"encoder.{name}"].dtype)), name
    exact = M2D.from_pretrained(tmp_path / "out")
    half = M2D.from_pretrained(tmp_path / "out", dtype=dtype)
    assert half.encoder.blocks[0].attn.qkv.weight.dtype == dtype
    with torch.no_grad():
        assert torch.cosine_similarity(half(noise(1.0)), exact(noise(1.0)), dim=-1).min() > 0.999


def test_convert_rounds_half_precision_sources_no_further(tmp_path):
    state = {name: tensor.half() for name, tensor in encoder_state().items()}
    convert(save(tmp_path, state), tmp_path / "out")
    assert_holds(M2D.from_pretrained(tmp_path / "out"), state)


def test_files_are_as_readable_as_any(tmp_path):
    convert(save(tmp_path, encoder_state()), tmp_path / "out", [torch.float16])
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == dict.fromkeys(
        ["config.json", "model.safetensors", "model.fp16.safetensors", "README.md"], usual
    )
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_convert_takes_an_empty_folder_and_a_link_to_one(tmp_path):
    file = save(tmp_path, encoder_state())
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    convert(file, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_holds(M2D.from_pretrained(tmp_path / "empty"), encoder_state())


def test_convert_never_overwrites(tmp_path):
    file = save(tmp_path, encoder_state())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "a file").write_text("mine")
    for destination in (tmp_path / "full", tmp_path / "a file", file.parent):
        with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
            convert(file, destination)
    assert [p.read_text() for p in (tmp_path / "a file", *(tmp_path / "full").iterdir())] == ["mine", "mine"]
    assert list(file.parent.iterdir()) == [file]


def test_convert_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    file = save(tmp_path, encoder_state())
    written = []

    def save_one_then_fail(tensors, path, metadata):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(layouts, "save_file", save_one_then_fail)
    with pytest.raises(OSError, match="No space left"):
        convert(file, tmp_path / "out", [torch.bfloat16])
    assert len(written) == 1
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_convert_refuses_what_would_not_load(tmp_path):
    with pytest.raises(CheckpointError, match=r"encoder\.pos_embed has shape \(1, 21, 192\), not \(1, 191, 192\)"):
        convert(save(tmp_path, encoder_state(), "m2d_vit_tiny-80x608p16x16-990101"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_of_nothing(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        convert(tmp_path / "nope.pth", tmp_path / "out")


def test_model_card_names_origin_and_sizes(tmp_path):
    convert(save(tmp_path, encoder_state()), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for expected in (f"# {NAME}", f"Source: {NAME}/checkpoint-300.pth", "192-d, 12 layers", "(2, 960)"):
        assert expected in card


# --- official releases -------------------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path):
    content = save(tmp_path / "made", {"model": encoder_state()}).read_bytes()
    archive = write_zip(tmp_path / "cache" / f"{NAME}.zip", {f"{NAME}/checkpoint-300.pth": content})
    return hub.Location(archive, "official M2D release", release=tmp_path / "cache" / NAME)


def test_release_is_converted_once_and_read_from_there(release, monkeypatch):
    checkpoint = load_checkpoint(release)
    assert checkpoint.config.source == f"{NAME}.zip: {NAME}/checkpoint-300.pth"
    assert [p.name for p in release.path.parent.iterdir() if p.suffix != ".lock"] == [NAME]
    monkeypatch.setattr(layouts, "convert", None)
    again = load_checkpoint(release, [torch.bfloat16])
    assert again.file_dtype == torch.bfloat16
    assert torch.equal(again.tensors["encoder.norm.bias"], encoder_state()["norm.bias"])


def test_two_processes_convert_a_release_at_once(release, monkeypatch):
    """The second waits for the first, and reads what that has made."""
    begun = []

    def slow(source, destination, half_dtypes):
        begun.append(source)
        time.sleep(0.3)
        return convert(source, destination, half_dtypes)

    monkeypatch.setattr(layouts, "convert", slow)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: load_checkpoint(release), range(4)))
    assert len(begun) == 1
    for checkpoint in found:
        assert torch.equal(checkpoint.tensors["encoder.norm.bias"], encoder_state()["norm.bias"])


def test_damaged_release_is_an_error(release):
    release.path.write_bytes(release.path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(release)


# --- our own layout ----------------------------------------------------------------------------------------------


@pytest.fixture
def native(tmp_path):
    random_model(TINY).save_pretrained(tmp_path / "native")
    return tmp_path / "native"


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("encoder.norm.bias"), "encoder.norm.bias is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is not part of the model"),
        (lambda t: t.update({"encoder.norm.bias": torch.zeros(3)}), r"encoder.norm.bias has shape \(3,\), not \(32,\)"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration(native, change, message):
    edit(native, change)
    with pytest.raises(CheckpointError, match=message):
        M2D.from_pretrained(native)
    with pytest.raises(CheckpointError, match=message):
        convert(native, native.with_name("out"))


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b[:4], lambda b: b"", lambda b: b"text, not tensors"])
def test_damaged_safetensors(native, damage):
    file = native / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        M2D.from_pretrained(native)


def test_config_without_weights(native):
    (native / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        M2D.from_pretrained(native)


def test_saving_a_changed_model_leaves_no_stale_weights(tmp_path):
    folder = tmp_path / "model"
    convert(save(tmp_path, under("", encoder_state())), folder, [torch.bfloat16])
    save_file({"a": torch.zeros(1)}, folder / "text_encoder.safetensors")
    (folder / "README.md").write_text("my own words")
    model = M2D.from_pretrained(folder)
    model._text_weights = None
    with torch.no_grad():
        model.encoder.norm.bias += 1
    model.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (folder / "README.md").read_text() == "my own words"
    loaded = M2D.from_pretrained(folder, dtype="bf16")
    assert torch.equal(loaded.encoder.norm.bias, encoder_state()["norm.bias"] + 1)


# --- files that are not what they should be ----------------------------------------------------------------------


class Payload:
    """Unpickled carelessly, it runs a command."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def write_plain_pickle(file: Path, content, protocol: int) -> None:
    file.write_bytes(pickle.dumps(content, protocol=protocol))


HOSTILE = {
    "torch.save": lambda file, content: torch.save(content, file),
    "torch.save before 2020": lambda file, content: torch.save(content, file, _use_new_zipfile_serialization=False),
    "pickle": lambda file, content: write_plain_pickle(file, content, 4),
    "old pickle": lambda file, content: write_plain_pickle(file, content, 2),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["args", "model"])
def test_code_in_a_pickle_does_not_run(kind, place, tmp_path):
    file = tmp_path / NAME / "checkpoint-300.pth"
    file.parent.mkdir()
    marker = tmp_path / "ran"
    HOSTILE[kind](file, {"model": {"a": torch.zeros(1)}, place: Payload(marker)})
    for path in (file, file.parent, write_zip(tmp_path / f"{NAME}.zip", {"c.pth": file.read_bytes()})):
        with warnings.catch_warnings(), pytest.raises(CheckpointError) as caught:
            warnings.simplefilter("ignore")  # torch remarks on the protocol
            M2D.from_pretrained(path)
        assert f"{os.system.__module__}.system" in str(caught.value)
        assert "weights_only" not in str(caught.value)
    assert not marker.exists()


def test_whole_model_in_a_pickle_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*Save its state dict alone"):
        M2D.from_pretrained(save(tmp_path, {"model": torch.nn.Linear(2, 2)}))


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files go, three folders below ``tmp_path``."""
    folder = tmp_path / "a" / "b" / "scratch"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("member", ["../../evil.pth", "/evil.pth", "a/../../evil.pth"])
def test_zip_writes_nowhere_but_into_its_scratch_folder(member, tmp_path, scratch):
    content = save(tmp_path / "made", encoder_state()).read_bytes()
    archive = write_zip(tmp_path / "a" / "b" / f"{NAME}.zip", {member: content})
    before = sorted(tmp_path.rglob("*"))
    assert_holds(M2D.from_pretrained(archive), encoder_state())
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/evil.pth").exists()


@pytest.mark.parametrize(
    "members, message",
    [
        ({"readme.txt": b"x"}, "expected one .pth in the archive, found none"),
        ({}, "expected one .pth in the archive, found none"),
        ({"a/1.pth": b"x", "b/2.pth": b"y"}, r"found a/1\.pth, b/2\.pth"),
        ({"a/1.pth": b"x"}, "not a readable checkpoint"),
    ],
)
def test_zip_of_something_else(members, message, tmp_path, scratch):
    with pytest.raises(CheckpointError, match=message):
        M2D.from_pretrained(write_zip(tmp_path / f"{NAME}.zip", members))
    assert list(scratch.iterdir()) == []


def small_zip(compression: int) -> bytearray:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("c.pth", b"0123456789" * 500)
    return bytearray(stream.getvalue())


def changed(content: bytearray, *positions: int, to: int = 0xFF) -> bytes:
    for position in positions:
        content[position] = to
    return bytes(content)


DAMAGED_ZIPS = {  # the data begin after a local header of 30 bytes and the name's 5
    "cut short": bytes(small_zip(zipfile.ZIP_STORED)[:100]),
    "empty": b"",
    "text": b"<html>404</html>",
    "a wrong byte": changed(small_zip(zipfile.ZIP_STORED), 1000),
    "a wrong byte, deflated": changed(small_zip(zipfile.ZIP_DEFLATED), 36, 37, 38),
    "a wrong offset": changed(small_zip(zipfile.ZIP_STORED), small_zip(0).rindex(b"PK\x05\x06") + 17),
    "a name that is no text": changed(small_zip(zipfile.ZIP_STORED), small_zip(0).rindex(b"PK\x01\x02") + 46).replace(
        b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x00\x08"
    ),
    "another compression": changed(small_zip(zipfile.ZIP_STORED), 8, small_zip(0).rindex(b"PK\x01\x02") + 10, to=97),
    "encrypted": changed(small_zip(zipfile.ZIP_STORED), 6, small_zip(0).rindex(b"PK\x01\x02") + 8, to=1),
}


@pytest.mark.parametrize("damage", DAMAGED_ZIPS)
def test_damaged_zip(damage, tmp_path):
    file = tmp_path / f"{NAME}.zip"
    file.write_bytes(DAMAGED_ZIPS[damage])
    with pytest.raises(CheckpointError, match=rf"{NAME}\.zip: (a damaged zip archive|cannot be unpacked)"):
        M2D.from_pretrained(file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-10],
        lambda b: b[: len(b) // 2],
        lambda b: b[:1000],
        lambda b: b[:10],
        lambda b: b"",
        lambda b: b"hello, this is a text\n",
        lambda b: b"<!DOCTYPE html><html></html>",
        lambda b: b"version https://git-lfs.github.com/spec/v1\nsize 1\n",
        lambda b: b.replace(b"checkpoint-300/data/0", b"checkpoint-300/data/x"),
        lambda b: pickle.dumps({"x": 1}),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pth(damage, tmp_path):
    file = save(tmp_path, {"model": {"a": torch.zeros(1000)}})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"checkpoint-300\.pth: not a readable checkpoint"):
        M2D.from_pretrained(file)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "no state dict in it; it holds list"),
        (torch.zeros(3), "no state dict in it; it holds Tensor"),
        ({}, "no state dict in it; it holds nothing"),
        ({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, "no state dict in it; it holds state_dict, epoch"),
        ({1: torch.zeros(1)}, "no state dict in it; it holds 1"),
        ({"conv1.weight": torch.zeros(1)}, r"no M2D encoder in it; its keys begin with conv1\.weight"),
    ],
)
def test_pth_of_something_else(content, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        M2D.from_pretrained(save(tmp_path, content))


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("m2d_vit_tiny-80x64p16x8-990101", "encoder.patch_embed.proj.weight"),
        ("m2d_vit_tiny-80x64p80x4-990101", "encoder.patch_embed.proj.weight"),
        ("m2d_vit_tiny-80x608p16x16-990101", "encoder.pos_embed"),
        ("m2d_vit_tiny-128x64p16x16-990101", "encoder.pos_embed"),
        ("m2d_vit_small-80x64p16x16-990101", "encoder.cls_token"),
        ("m2d_vit_base-80x64p16x16-990101", "encoder.cls_token"),
        ("m2d_vit_tiny-80x64p7x16-990101", "input_size has 80 mels"),
        ("m2d_vit_tiny-80x8p16x16-990101", "input_size has 8 frames"),
        ("m2d_vit_tiny-80x64p0x16-990101", "patch_size must be positive"),
    ],
)
def test_name_that_contradicts_the_tensors(name, tensor, tmp_path):
    with pytest.raises(CheckpointError, match=tensor):
        M2D.from_pretrained(save(tmp_path, encoder_state(), name))


def test_depth_that_contradicts_the_name(tmp_path):
    state = encoder_state(depth=13)
    with pytest.raises(CheckpointError, match=r"encoder\.blocks\.12\.norm1\.weight is not part of the model"):
        M2D.from_pretrained(save(tmp_path, state))
    state = encoder_state(depth=11)
    assert depth_of(state, "blocks.") == 11
    with pytest.raises(CheckpointError, match=r"encoder\.blocks\.11\.norm1\.weight is missing"):
        M2D.from_pretrained(save(tmp_path, state))


@pytest.mark.parametrize("missing", ["cls_token", "norm.weight", "patch_embed.proj.bias", "blocks.4.attn.proj.bias"])
def test_missing_tensor(missing, tmp_path):
    state = under(FINE_TUNED, {k: t for k, t in encoder_state().items() if k != missing}) | head_state(960)
    with pytest.raises(CheckpointError, match=rf"encoder\.{missing} is missing"):
        M2D.from_pretrained(save(tmp_path, state))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((527, 100), r"head\.linear\.weight has shape \(527, 100\), not \(527, 960\)"),
        ((527,), r"head\.mlp\.mlp\.0\.weight has shape \(527,\)"),
        ((), r"head\.mlp\.mlp\.0\.weight has shape \(\)"),
    ],
)
def test_head_that_does_not_fit(shape, message, tmp_path):
    state = under(FINE_TUNED, encoder_state()) | head_state(960) | {"module.head.mlp.mlp.0.weight": draw(shape, 0)}
    with pytest.raises(CheckpointError, match=message):
        M2D.from_pretrained(save(tmp_path, state))


@pytest.mark.parametrize("name", ["model", "m2d_vit_huge-80x64p16x16-990101", "m2d_vit_tiny-80x64p16x16p44k-990101"])
def test_name_that_says_nothing(name, tmp_path):
    with pytest.raises(ConfigError, match=name):
        M2D.from_pretrained(save(tmp_path, encoder_state(), name))


def test_several_checkpoints_in_a_folder(tmp_path):
    file = save(tmp_path, encoder_state())
    file.with_name("checkpoint-200.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoint-200\.pth, checkpoint-300\.pth\); name one"):
        M2D.from_pretrained(file.parent)
    assert_holds(M2D.from_pretrained(file), encoder_state())


def test_empty_folder(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no model in this folder"):
        M2D.from_pretrained(tmp_path)


def test_file_of_another_kind(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model\.onnx: not a checkpoint"):
        M2D.from_pretrained(tmp_path / "model.onnx")


def test_config_json_is_what_the_checkpoint_says(tmp_path):
    convert(save(tmp_path, encoder_state()), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["model_type"] == "m2d"
    assert (content["embed_dim"], content["depth"], content["num_heads"]) == (192, 12, 3)
    assert (content["input_size"], content["patch_size"]) == ([80, 64], [16, 16])
    assert ModelConfig.from_json(tmp_path / "out" / "config.json") == read_checkpoint(tmp_path / NAME).config
