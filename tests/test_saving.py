"""Saving a model: its features with it, and never a mix of two models, whatever happens meanwhile."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_model
from safetensors.torch import load_file

import m2d_embed
from m2d_embed.checkpoints import layouts
from m2d_embed.checkpoints.layouts import Checkpoint, convert, read_native, write_native
from m2d_embed.config import ClapConfig, FeatureConfig, ModelConfig
from m2d_embed.errors import CheckpointError, ConfigError, M2DEmbedError
from m2d_embed.m2d import M2D

CLAP = ClapConfig("mlp", (32, 24), (32, 24), "some/encoder", "mean", text_encoder_included=True)
EVERY_DTYPE = (torch.float32, torch.bfloat16, torch.float16)

FEATURES = [
    {},
    {"layers": [-1], "scene_pooling": "mean"},
    {"layers": [0, 2], "layer_pooling": "concat"},
    {"flat": True, "scene_pooling": "mean_std"},
    {"hop_ms": 40},
    {"layers": 1, "layer_pooling": "concat", "flat": True, "hop_ms": 20, "scene_pooling": "mean_std"},
]


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FEATURES)
def test_features_are_saved_with_the_model(tmp_path, noise, options):
    random_model(TINY).save_pretrained(tmp_path / "plain")
    model = m2d_embed.load_model(tmp_path / "plain", **options)
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "converted")
    audio = noise(1.0, batch=2)
    for folder in ("saved", "converted"):
        loaded = m2d_embed.load_model(str(tmp_path / folder))
        assert loaded.features == model.features
        assert loaded.scene_embedding_size == model.scene_embedding_size
        assert torch.equal(loaded.scene(audio), model.scene(audio))
        assert (loaded.encode(list(audio.numpy())) == model.encode(list(audio.numpy()))).all()
        for ours, expected in zip(loaded.timestamps(audio), model.timestamps(audio), strict=True):
            assert torch.equal(ours, expected)
        assert f"# (2, {model.scene_embedding_size})" in (tmp_path / folder / "README.md").read_text()


def test_the_bundled_model_with_other_features(tmp_path, noise):
    m2d_embed.load_model(layers=[-1], scene_pooling="mean").save_pretrained(tmp_path)
    loaded = m2d_embed.load_model(tmp_path)
    assert loaded.scene_embedding_size == 960
    assert m2d_embed.get_scene_embeddings(noise(1.0), loaded).shape == (1, 960)


def test_what_load_model_is_given_comes_before_what_was_saved(tmp_path, noise):
    saved = {"layers": (0, 1), "layer_pooling": "concat", "flat": True, "hop_ms": 40, "scene_pooling": "mean_std"}
    random_model(TINY, features=FeatureConfig(**saved)).save_pretrained(tmp_path)
    given = {"layers": (2,), "layer_pooling": "mean", "flat": False, "hop_ms": 160, "scene_pooling": "mean"}
    for name, value in given.items():
        loaded = m2d_embed.load_model(tmp_path, **{name: value})
        assert loaded.features == FeatureConfig(**saved | {name: value})
    plain = m2d_embed.load_model(tmp_path, **given)
    assert torch.equal(plain.scene(noise(1.0)), random_model(TINY).scene(noise(1.0)))


def test_features_may_be_set_and_are_saved(tmp_path):
    model = random_model(TINY)
    model.features = FeatureConfig(flat=True)
    model.save_pretrained(tmp_path)
    assert M2D.from_pretrained(tmp_path).features.flat is True
    with pytest.raises(ConfigError, match="hop_ms=30"):
        model.features = FeatureConfig(hop_ms=30)
    assert model.features.flat is True


def test_scenes_do_not_depend_on_the_hop_of_timestamps(tmp_path, noise):
    model, plain = random_model(TINY, features=FeatureConfig(hop_ms=20)), random_model(TINY)
    assert (model.encode(noise(1.3)[0]) == plain.encode(noise(1.3)[0])).all()


def test_configurations_without_features_are_read_as_before(tmp_path):
    """Those of releases that did not save them; and what needs none of them is still read by those releases."""
    random_model(TINY).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert not {"layer_pooling", "flat", "hop_ms"} & set(content)
    assert M2D.from_pretrained(tmp_path).features == FeatureConfig((-1,), "mean", False, None, "mean")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hop_ms": 30}, "hop_ms=30 is not possible"),
        ({"hop_ms": "40"}, "'hop_ms' must be float"),
        ({"layer_pooling": "max"}, "layer_pooling"),
        ({"flat": 1}, "'flat' must be bool"),
        ({"layers": [7]}, "layer 7 does not exist"),
    ],
)
def test_impossible_features_in_a_configuration(tmp_path, change, message):
    random_model(TINY).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        M2D.from_pretrained(tmp_path)


def test_numbers_of_numpy_are_features_too():
    import numpy as np

    features = FeatureConfig(layers=(np.int64(1),), flat=np.bool_(True), hop_ms=np.float32(40))
    assert json.dumps(vars(features)) == json.dumps(vars(FeatureConfig((1,), None, True, 40.0, None)))
    assert ModelConfig(layers=(1,)).layers == (1,)
    for bad in ({"layers": (1.0,)}, {"layers": (True,)}):
        with pytest.raises(ConfigError, match="does not exist"):
            FeatureConfig(**bad).check(TINY)
    for bad in ({"flat": "yes"}, {"hop_ms": "40"}):
        with pytest.raises(ConfigError):
            FeatureConfig(**bad)


# --- whole or not at all ----------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here: nothing that it would do afterwards is done."""


@pytest.fixture
def crash_at(monkeypatch):
    """``crash_at(n)``: end at the n-th thing done to the disk; returns a function that says whether it came to that."""
    watched = [(Path, name) for name in ("touch", "write_text", "replace", "unlink")]
    watched += [(layouts, "save_file"), (shutil, "copyfile")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in watched]

    def arm(number: int):
        done = []

        def watch(original):
            def watching(*args, **kwargs):
                done.append(original)
                if len(done) == number:
                    raise Crash
                return original(*args, **kwargs) if len(done) < number else None

            return watching

        for owner, name, original in originals:
            monkeypatch.setattr(owner, name, watch(original))

        def disarm() -> bool:
            for owner, name, original in originals:
                monkeypatch.setattr(owner, name, original)
            return len(done) >= number

        return disarm

    return arm


def checkpoint_of(name: str, number: int, text_encoder: bool) -> Checkpoint:
    """A model all of whose tensors hold ``number``."""
    config = replace(TINY, name=name, clap=replace(CLAP, text_encoder_included=text_encoder))
    tensors = {n: torch.full_like(t, number) for n, t in M2D(config).state_dict().items()}
    return Checkpoint(config, tensors, {"weight": torch.tensor([float(number)])} if text_encoder else None)


def held(folder: Path, dtype: torch.dtype) -> tuple[str, float, float | None]:
    """Which model a folder gives to whom asks for a dtype: its name, what its tensors hold, and its text encoder's."""
    found = read_native(folder, [dtype])
    values = {tensor.float().mean().item() for tensor in found.tensors.values()}
    assert len(values) == 1
    text = load_file(found.text_encoder)["weight"].item() if found.text_encoder else None
    return found.config.name, values.pop(), text


@pytest.mark.parametrize("new_has_text", [True, False])
@pytest.mark.parametrize("old_has_text", [True, False])
@pytest.mark.parametrize("dtypes", [EVERY_DTYPE[:1], EVERY_DTYPE[:2]])
def test_a_crash_leaves_one_model_or_none(tmp_path, crash_at, dtypes, old_has_text, new_has_text):
    old = checkpoint_of("old", 1, old_has_text)
    new = checkpoint_of("new", 2, new_has_text)
    expected = {("old", 1, 1 if old_has_text else None), ("new", 2, 2 if new_has_text else None)}
    outcomes, number, crashed = set(), 0, True
    while crashed:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        write_native(folder, old, EVERY_DTYPE)
        disarm = crash_at(number)
        try:
            write_native(folder, new, dtypes)
        except Crash:
            pass
        finally:
            crashed = disarm()
        for dtype in EVERY_DTYPE:
            try:
                found = held(folder, dtype)
            except M2DEmbedError as error:
                with pytest.raises(M2DEmbedError, match=r"weights without a config\.json, as while a model is saved"):
                    layouts.read_checkpoint(folder)
                found = type(error)
            outcomes.add(found)
            assert found in expected | {CheckpointError}, f"after {number}"
    assert outcomes >= expected
    assert number > 10
    assert found == ("new", 2, 2 if new_has_text else None)


def test_a_full_disk_leaves_the_old_model_and_no_litter(tmp_path, monkeypatch):
    write_native(tmp_path, checkpoint_of("old", 1, True), EVERY_DTYPE)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(tensors, file, metadata):
        Path(file).write_bytes(b"begun")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layouts, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_native(tmp_path, checkpoint_of("new", 2, False))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_saving_over_a_model_does_not_take_it_away_first(tmp_path, monkeypatch):
    """As the client's own ``save_pretrained`` does, whatever comes of it."""
    random_model(TINY).save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    monkeypatch.setattr("m2d_embed.m2d.write_native", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        random_model(TINY, seed=1).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_two_who_save_and_one_who_loads(tmp_path):
    models = {"old": checkpoint_of("old", 1, True), "new": checkpoint_of("new", 2, True)}
    write_native(tmp_path, models["old"])
    failed: list[BaseException] = []
    ended = threading.Event()

    def save(checkpoint: Checkpoint) -> None:
        try:
            for _ in range(25):
                write_native(tmp_path, checkpoint)
        except BaseException as error:
            failed.append(error)

    def load() -> None:
        while not ended.is_set():
            try:
                found = held(tmp_path, torch.float32)[:2]
                if found not in {("old", 1), ("new", 2)}:
                    failed.append(AssertionError(found))
            except CheckpointError:
                pass
            except BaseException as error:
                failed.append(error)

    writers = [threading.Thread(target=save, args=[checkpoint]) for checkpoint in models.values()]
    reader = threading.Thread(target=load)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    reader.join()
    assert not failed
    assert held(tmp_path, torch.float32) in {("old", 1, 1), ("new", 2, 2)}


def test_a_text_encoder_replaced_after_loading_is_not_taken_for_the_models(tmp_path):
    """It is read when the first sentence comes, or copied when the model is saved, perhaps much later."""
    write_native(tmp_path, checkpoint_of("old", 1, True))
    model = M2D.from_pretrained(tmp_path)
    (tmp_path / "copy").mkdir()
    model.save_pretrained(tmp_path / "copy")
    write_native(tmp_path, checkpoint_of("new", 2, True))
    for late in (lambda: model.encode_text(["a dog"]), lambda: model.save_pretrained(tmp_path / "copy")):
        with pytest.raises(CheckpointError, match="another file since the model was loaded"):
            late()
    assert held(tmp_path / "copy", torch.float32) == ("old", 1, 1)
