"""The configuration: its JSON, its contradictions, the grammar of published names."""

import json
from dataclasses import replace

import pytest

from m2d_embed.checkpoints.registry import RELEASES
from m2d_embed.config import (
    VIT_SIZES,
    CheckpointName,
    ClapConfig,
    FeatureConfig,
    HeadConfig,
    ModelConfig,
    resolve_layers,
)
from m2d_embed.errors import ConfigError

CLAP = ClapConfig(
    audio_projector="semantic",
    audio_layers=(768,),
    text_layers=(768, 512, 768),
    text_encoder="google-bert/bert-base-uncased",
    text_pooling="cls",
    semantic_depth=2,
    semantic_mlp_dim=768,
)

# --- config.json -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(name="ü", norm_stats=(-6.5, 4.0), sample_rate=32_000, n_fft=800, hop_length=320, f_max=16_000.0),
        ModelConfig(
            head=HeadConfig(
                labels=("Speech", "Chien, aboiement"), features="flat", multi_label=False, scene_pooling="mean_std"
            )
        ),
        ModelConfig(clap=CLAP, source="x.zip: y.pth", license="z"),
    ],
)
def test_json_round_trip(config, tmp_path):
    (tmp_path / "config.json").write_text(config.to_json(), encoding="utf-8")
    assert ModelConfig.from_json(tmp_path / "config.json") == config
    assert hash(ModelConfig.from_json(tmp_path / "config.json")) == hash(config)


def read(tmp_path, **changes):
    """What comes of the default configuration's JSON with some keys changed; ``...`` removes one."""
    content = json.loads(ModelConfig(head=HeadConfig(("a",)), clap=CLAP).to_json()) | changes
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return ModelConfig.from_json(file)


def test_keys_with_a_default_may_be_missing(tmp_path):
    assert read(tmp_path, name=..., depth=..., head=..., clap=...) == ModelConfig()


def test_whole_numbers_serve_as_floats(tmp_path):
    config = read(tmp_path, f_min=60, norm_stats=[-7, 4])
    assert (config.f_min, config.norm_stats) == (60.0, (-7.0, 4.0))
    assert [type(value) for value in (config.f_min, *config.norm_stats)] == [float] * 3


HEAD = {"labels": ["a"], "features": "stacked", "multi_label": True}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embed_dims": 768}, r"config\.json: unknown key 'embed_dims' \(known: name, embed_dim, depth"),
        ({"embed_dim": "768"}, "'embed_dim' must be int, not '768'"),
        ({"embed_dim": 768.0}, "'embed_dim' must be int, not 768.0"),
        ({"embed_dim": True}, "'embed_dim' must be int, not True"),
        ({"embed_dim": None}, "'embed_dim' must be int, not None"),
        ({"norm_eps": "small"}, "'norm_eps' must be float, not 'small'"),
        ({"norm_eps": True}, "'norm_eps' must be float, not True"),
        ({"name": 3}, "'name' must be str, not 3"),
        ({"input_size": 80}, r"'input_size' must be tuple\[int, int\], not 80"),
        ({"input_size": [80]}, r"'input_size' must be tuple\[int, int\], not \[80\]"),
        ({"input_size": [80, 608, 1]}, "'input_size' must be"),
        ({"input_size": [80, "608"]}, "'input_size' must be int, not '608'"),
        ({"head": ["a"]}, "'head' must be HeadConfig"),
        ({"head": {}}, "key 'labels' is missing"),
        ({"head": HEAD | {"features": "mean"}}, "'features' must be .*stacked.*flat.*, not 'mean'"),
        ({"head": HEAD | {"features": ["flat"]}}, "'features' must be"),
        ({"head": HEAD | {"labels": "ab"}}, "'labels' must be"),
        ({"head": HEAD | {"labels": ["a", 1]}}, "'labels' must be str, not 1"),
        ({"head": HEAD | {"multi_label": 1}}, "'multi_label' must be bool, not 1"),
        ({"head": HEAD | {"extra": 1}}, "unknown key 'extra'"),
        ({"clap": {"audio_projector": "mlp"}}, "key 'audio_layers' is missing"),
        ({"model_type": "bert"}, 'lacks "model_type": "m2d"'),
        ({"model_type": ...}, 'lacks "model_type": "m2d"'),
        ({"format_version": 2}, "format_version 2, but this release reads 1; upgrade"),
        ({"format_version": ...}, "format_version None"),
        ({"num_heads": 5}, "embed_dim 768 is not a multiple of num_heads"),
    ],
)
def test_json_that_makes_no_sense(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, **changes)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b'"m2d"', b"\xff\xfe{}"])
def test_files_that_are_no_configuration(content, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json: not (valid JSON|an m2d-embed configuration)"):
        ModelConfig.from_json(file)


# --- contradictions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        *(({field: 0}, f"{field} must be positive") for field in ("embed_dim", "depth", "num_heads", "sample_rate")),
        *(({field: -1}, f"{field} must be positive") for field in ("n_fft", "hop_length", "mlp_ratio")),
        ({"input_size": (80, 0)}, "must be positive"),
        ({"patch_size": (16, 0)}, "must be positive"),
        ({"patch_size": (12, 16)}, "80 mels, not a multiple of the patch's 12"),
        ({"input_size": (80, 15)}, "15 frames, fewer than the patch's 16"),
        ({"embed_dim": 770, "num_heads": 1}, "embed_dim 770 is not a multiple of 4"),
        ({"embed_dim": 780, "num_heads": 7}, "not a multiple of num_heads"),
        ({"f_min": -1.0}, "f_min < f_max"),
        ({"f_min": 9_000.0}, "f_min < f_max"),
        ({"f_max": 8_001.0}, "f_max <= sample_rate / 2"),
        ({"norm_stats": (-7.1, 0.0)}, "standard deviation of 0.0"),
        ({"norm_stats": (-7.1, -4.2)}, "standard deviation of -4.2"),
        ({"norm_stats": (-7.1, float("nan"))}, "norm_stats must be"),
        ({"norm_stats": (float("inf"), 4.2)}, "norm_stats must be"),
        ({"norm_stats": (-7.1,)}, "norm_stats must be"),
        ({"clap": replace(CLAP, audio_layers=(192, 192))}, "begins with 192, but embed_dim is 768"),
        ({"clap": replace(CLAP, audio_layers=())}, "begins with None, but embed_dim is 768"),
    ],
)
def test_contradictions(fields, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**fields)


def test_derived_values():
    config = ModelConfig(input_size=(80, 1001), patch_size=(16, 4))
    assert config.grid_size == (5, 250)
    assert (config.frame_ms, config.column_ms) == (10.0, 40.0)
    assert ModelConfig(sample_rate=32_000, hop_length=320, n_fft=800).frame_ms == 10.0
    assert config.head_dim == 5 * 768
    assert replace(config, head=HeadConfig(("a",), "stacked")).head_dim == 5 * 768
    assert replace(config, head=HeadConfig(("a",), "flat")).head_dim == 768
    assert replace(config, head=HeadConfig(("a",), "flat", scene_pooling="mean_std")).head_dim == 2 * 768


# --- features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, expected",
    [((-1,), [11]), ((0, 11), [0, 11]), ((-12, -1), [0, 11]), ([3, 3], [3, 3]), ((5, 2), [5, 2])],
)
def test_layers(layers, expected):
    assert resolve_layers(layers, 12) == expected


@pytest.mark.parametrize("layer", [12, -13, 1.0, "1", None])
def test_layers_that_do_not_exist(layer):
    with pytest.raises(ConfigError, match=r"layer .* does not exist; this model's run from 0 to 11 \(or -12 to -1\)"):
        resolve_layers((0, layer), 12)


def test_no_layers():
    with pytest.raises(ConfigError, match="layers is empty"):
        resolve_layers((), 12)


@pytest.mark.parametrize(
    "hop_ms, frames",
    [(None, 16), (160.0, 16), (160, 16), (80.0, 8), (40.0, 4), (20.0, 2), (10.0, 1), (10.0000000001, 1)],
)
def test_hop(hop_ms, frames):
    assert FeatureConfig(hop_ms=hop_ms).hop_frames(ModelConfig()) == frames


@pytest.mark.parametrize("hop_ms", [0.0, 5.0, 30.0, 50.0, 161.0, 320.0, -10.0, float("nan")])
def test_impossible_hop_lists_the_choices(hop_ms):
    with pytest.raises(ConfigError, match=r"is not possible with this model; choose one of 10, 20, 40, 80, 160\."):
        FeatureConfig(hop_ms=hop_ms).hop_frames(ModelConfig())
    with pytest.raises(ConfigError, match="choose one of"):
        FeatureConfig(hop_ms=hop_ms).check(ModelConfig())


def test_choices_of_hop_depend_on_the_model():
    with pytest.raises(ConfigError, match=r"choose one of 10, 20\."):
        FeatureConfig(hop_ms=40).hop_frames(ModelConfig(patch_size=(80, 2)))
    with pytest.raises(ConfigError, match=r"choose one of 12\.5, 25\."):
        FeatureConfig(hop_ms=10).hop_frames(ModelConfig(patch_size=(80, 2), hop_length=200))


@pytest.mark.parametrize(
    "features, dim",
    [
        (FeatureConfig(), 3840),
        (FeatureConfig(flat=True), 768),
        (FeatureConfig(layers=(1, 2, 3)), 3840),
        (FeatureConfig(layers=(1, 2, 3), layer_pooling="concat"), 3 * 3840),
        (FeatureConfig(layers=(1, 2), layer_pooling="concat", flat=True), 2 * 768),
    ],
)
def test_frame_dim(features, dim):
    assert features.frame_dim(ModelConfig()) == dim


def test_scene_dim():
    frames_and_spread = ModelConfig(scene_pooling="mean_std")
    assert FeatureConfig().scene_dim(ModelConfig()) == 3840
    assert FeatureConfig().scene_dim(frames_and_spread) == 2 * 3840
    assert FeatureConfig(scene_pooling="mean").scene_dim(frames_and_spread) == 3840
    assert FeatureConfig(scene_pooling="mean_std", flat=True).scene_dim(ModelConfig()) == 2 * 768
    assert FeatureConfig().frame_dim(frames_and_spread) == 3840


def test_a_configuration_without_scene_pooling_means_the_mean(tmp_path):
    content = json.loads(ModelConfig(scene_pooling="mean_std").to_json())
    assert content.pop("scene_pooling") == "mean_std"
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert ModelConfig.from_json(tmp_path / "config.json").scene_pooling == "mean"
    (tmp_path / "config.json").write_text(json.dumps(content | {"scene_pooling": "max"}))
    with pytest.raises(ConfigError, match="scene_pooling"):
        ModelConfig.from_json(tmp_path / "config.json")


def test_layers_of_the_model():
    own = ModelConfig(depth=4, layers=(1, -1))
    assert FeatureConfig().blocks(own) == (1, -1)
    assert FeatureConfig(layers=(2,)).blocks(own) == (2,)
    assert FeatureConfig().blocks(ModelConfig()) == (-1,)
    assert ModelConfig.parse_json(own.to_json(), "config.json") == own
    with pytest.raises(ConfigError, match="layer 4 does not exist; this model's run from 0 to 3"):
        ModelConfig(depth=4, layers=(4,))
    with pytest.raises(ConfigError, match="layers is empty"):
        ModelConfig(layers=())


def test_unknown_pooling():
    with pytest.raises(ConfigError, match='scene_pooling is "mean" or "mean_std", not \'max\''):
        FeatureConfig(scene_pooling="max").check(ModelConfig())
    with pytest.raises(ConfigError, match='layer_pooling is "mean" or "concat", not \'max\''):
        FeatureConfig(layer_pooling="max").check(ModelConfig())


# --- names -------------------------------------------------------------------------------------------------------

RELEASED = {  # name -> family, frames, patch, rate; written out by hand from the list of releases
    "m2d_clap_vit_base-80x1001p16x16-240128_AS-FT_enconly": ("m2d_clap", 1001, (16, 16), 16_000),
    "m2d_as_vit_base-80x1001p16x16-240213_AS-FT_enconly": ("m2d_as", 1001, (16, 16), 16_000),
    "m2d_vit_base-80x1001p16x16-221006-mr7_as_46ab246d": ("m2d", 1001, (16, 16), 16_000),
    "m2d_as_vit_base-80x1001p16x16p32k-240413_AS-FT_enconly": ("m2d_as", 1001, (16, 16), 32_000),
    "m2d_vit_base-80x200p16x4-230529": ("m2d", 200, (16, 4), 16_000),
    "m2d_clap_vit_base-80x608p16x16-240128": ("m2d_clap", 608, (16, 16), 16_000),
    "m2d_as_vit_base-80x608p16x16-240213": ("m2d_as", 608, (16, 16), 16_000),
    "m2d_vit_base-80x608p16x16-221006-mr7": ("m2d", 608, (16, 16), 16_000),
    "m2d_vit_base-80x608p16x16-221006-mr6": ("m2d", 608, (16, 16), 16_000),
    "m2d_vit_base-80x608p16x16-221006-mr7_enconly": ("m2d", 608, (16, 16), 16_000),
    "m2d_vit_base-80x608p16x16-220930-mr7_enconly": ("m2d", 608, (16, 16), 16_000),
    "m2d_as_vit_base-80x608p16x16p32k-240413_enconly": ("m2d_as", 608, (16, 16), 32_000),
    "m2d_s_vit_base-80x608p80x2-230220": ("m2d_s", 608, (80, 2), 16_000),
    "m2d_s_vit_base-80x512p80x2-230301": ("m2d_s", 512, (80, 2), 16_000),
    "m2d_s_vit_base-80x400p80x2-230201": ("m2d_s", 400, (80, 2), 16_000),
}


def test_every_release_is_listed():
    assert RELEASES.keys() == RELEASED.keys()


@pytest.mark.parametrize("name", RELEASED)
def test_names_of_releases(name):
    family, frames, patch, rate = RELEASED[name]
    parsed = RELEASES[name].shape
    assert (parsed.name, parsed.family, parsed.size) == (name, family, "base")
    assert (parsed.input_size, parsed.patch_size, parsed.sample_rate) == ((80, frames), patch, rate)
    assert RELEASES[name].sample_rate == rate
    assert (parsed.text_encoder, parsed.text_encoder_inside) == ("thenlper/gte-base", False)
    config = parsed.model_config()
    assert (config.embed_dim, config.depth, config.num_heads) == (768, 12, 12)
    assert (config.input_size, config.patch_size, config.sample_rate) == ((80, frames), patch, rate)
    front_end = (400, 160, 50.0, 8_000.0) if rate == 16_000 else (800, 320, 50.0, 16_000.0)
    assert (config.n_fft, config.hop_length, config.f_min, config.f_max) == front_end


GTE, BERT, NV = "thenlper/gte-base", "google-bert/bert-base-uncased", "nvidia/NV-Embed-v2"


@pytest.mark.parametrize(
    "suffix, rate, text_encoder, inside",
    [
        ("", 16_000, GTE, False),
        ("-240128", 16_000, GTE, False),
        ("p16k-240128", 16_000, GTE, False),
        ("p32k-240128", 32_000, GTE, False),
        ("pA-240128", 16_000, GTE, False),
        ("pB-240128", 16_000, BERT, False),
        ("pN-240128", 16_000, NV, False),
        ("pApTI-240128", 16_000, GTE, True),
        ("pBpTI-240128", 16_000, BERT, True),
        ("pBTI-240128", 16_000, BERT, True),
        ("pTI-240128", 16_000, GTE, True),
        ("p16kpBpTI-250304_AS-FT", 16_000, BERT, True),
        ("p32kpNpTI-250304", 32_000, NV, True),
        ("_enconly", 16_000, GTE, False),
    ],
)
def test_variants_of_names(suffix, rate, text_encoder, inside):
    name = f"m2d_clap_vit_base-80x608p16x16{suffix}"
    assert CheckpointName.matches(name)
    parsed = CheckpointName.parse(name)
    assert (parsed.family, parsed.input_size, parsed.patch_size) == ("m2d_clap", (80, 608), (16, 16))
    assert (parsed.sample_rate, parsed.text_encoder, parsed.text_encoder_inside) == (rate, text_encoder, inside)


@pytest.mark.parametrize("family", ["m2d", "m2d_as", "m2d_x", "m2d_s", "m2d_clap", "msm_mae"])
@pytest.mark.parametrize("size", ["base", "large"])
def test_families_and_sizes(family, size):
    parsed = CheckpointName.parse(f"{family}_vit_{size}-80x208p16x16-220924-mr75")
    assert (parsed.family, parsed.size) == (family, size)
    config = parsed.model_config(norm_stats=(-6.0, 4.0))
    assert (config.embed_dim, config.depth, config.num_heads) == {"base": (768, 12, 12), "large": (1024, 24, 16)}[size]
    assert (config.mlp_ratio, config.norm_eps, config.norm_stats) == (4.0, 1e-6, (-6.0, 4.0))


def test_every_size_has_heads_of_64():
    assert {dim // heads for dim, _, heads in VIT_SIZES.values()} == {64}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "checkpoint-300",
        "m2d_vit_base",
        "m2d_vit_base-80x608",
        "m2d_vit_base-80x608p16",
        "m2d_vit_base-80p16x16-221006",
        "m2d_vit_base-axbp16x16-221006",
        "m2d_vit_base-80x608p16x16p32-221006",
        "m2d_vit_base-80x608p16x16pX-221006",
        "m2d_vit_base-80x608p16x16pTIpB-221006",
        "m2d_vit_base-80x608p16x16 221006",
        "m2d_vit_base-80x608p16x16foo",
        "m2d_base-80x608p16x16-221006",
        "_vit_base-80x608p16x16-221006",
        "org/m2d_vit_base-80x608p16x16-221006",
        " m2d_vit_base-80x608p16x16-221006",
        "vit_base-80x608p16x16-221006",
    ],
)
def test_bad_names(name):
    assert not CheckpointName.matches(name)
    with pytest.raises(ConfigError, match="is not a published checkpoint name: expected something like"):
        CheckpointName.parse(name)


@pytest.mark.parametrize(
    "name, message",
    [
        ("m2d_vit_huge-80x608p16x16-221006", "unknown size 'huge', not one of .*'base', 'large'"),
        ("m2d_vit_base-80x608p16x16p44k-221006", r"no front end is defined for 44000 Hz, only for \[16000, 32000\]"),
    ],
)
def test_names_of_unknown_shape(name, message):
    with pytest.raises(ConfigError, match=message):
        CheckpointName.parse(name)
