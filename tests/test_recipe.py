"""Recipes: strict, complete, overridable."""

import dataclasses

import pytest
import yaml

from m2d_embed.config import ModelConfig
from m2d_embed.errors import ConfigError
from m2d_embed.finetune.recipe import RECIPES as FINETUNE_RECIPES
from m2d_embed.finetune.recipe import FinetuneRecipe
from m2d_embed.finetune.recipe import load_recipe as load_finetune_recipe
from m2d_embed.pretrain.recipe import RECIPES, Recipe, load_recipe
from m2d_embed.training.settings import TrainingSection, known_keys, known_recipes

NAMES = sorted(file.stem for file in RECIPES.glob("*.yaml"))
EXPECTED = {"audioset-base", "librispeech-speech", "further", "tiny-cpu", "small-gpu", "debug"}


@pytest.fixture
def write(tmp_path):
    def make(text):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return str(file)

    return make


MINIMAL = "name: run\nobjective: m2d\ndata: {source: sounds}\ntraining: {steps: 10}\n"


def test_the_promised_recipes_are_there():
    assert set(NAMES) >= EXPECTED
    assert all(known_recipes(RECIPES).values()), "each says what it is about"


@pytest.mark.parametrize("name", NAMES)
def test_packaged_recipes_load_and_describe_a_model(name):
    recipe = load_recipe(name, ["data.source=sounds", *(["start.model=x"] if name == "further" else [])])
    assert recipe.name == name
    config = recipe.model_config(None, (-7.0, 4.0))
    assert config.norm_stats == (-7.0, 4.0)
    assert recipe.training.batch_size % recipe.training.micro_batch == 0


def test_published_settings():
    recipe = load_recipe("audioset-base", ["data.source=x"])
    training, config = recipe.training, recipe.model_config(None, (0.0, 1.0))
    assert (config.embed_dim, config.depth, config.num_heads) == (768, 12, 12)
    assert (config.input_size, config.patch_size) == ((80, 608), (16, 16))
    assert (recipe.predictor.dim, recipe.predictor.depth, recipe.predictor.num_heads) == (512, 8, 16)
    assert (recipe.masking.strategy, recipe.masking.mask_ratio) == ("random", 0.7)
    assert (training.epochs, training.batch_size, training.peak_lr) == (300, 2048, 3e-4 * 8)
    assert training.warmup == pytest.approx(20 / 300)
    assert (training.betas, training.weight_decay, training.clip_norm) == ((0.9, 0.95), 0.05, 3.0)
    assert training.ema_decay == (0.99995, 0.99999)


def test_overrides_and_round_trip(write):
    recipe = load_recipe(
        write(MINIMAL), ["training.lr=1e-3", "masking.strategy=spans", "model={size: tiny}", "data.cache=/c"]
    )
    assert recipe.training.lr == recipe.training.peak_lr == 1e-3
    assert recipe.masking.strategy == "spans"
    assert recipe.model_config(None, (0.0, 1.0)).embed_dim == 192
    again = load_recipe(write(recipe.to_yaml()))
    assert again == recipe
    assert recipe.differences(again.to_dict()) == []


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL + "epochs: 3\n", [], "unknown key 'epochs'"),
        (MINIMAL.replace("steps: 10", "steps: 10, stepz: 1"), [], "training: unknown key 'stepz'"),
        (MINIMAL.replace("steps: 10", "steps: ten"), [], "training: 'steps' must be int, not 'ten'"),
        (MINIMAL.replace("steps: 10", "steps: 1.5"), [], "'steps' must be int"),
        (MINIMAL.replace("steps: 10", "steps: true"), [], "'steps' must be int"),
        (MINIMAL.replace("steps: 10", "log_every: 1"), [], "give one of them"),
        (MINIMAL.replace("steps: 10", "steps: 10, epochs: 2"), [], "give one of them"),
        (MINIMAL.replace("steps: 10", "steps: -1"), [], "training.steps must be positive"),
        (MINIMAL.replace("steps: 10", "steps: 10, steps: 11"), [], "'steps' is there twice"),
        (MINIMAL.replace("objective: m2d", "objective: m2e"), [], "'objective' must be"),
        (MINIMAL.replace("name: run", "name: a/b"), [], "name 'a/b'"),
        (MINIMAL.replace("objective: m2d", "objective: m2d_x"), [], "offline.teacher"),
        (MINIMAL + "offline: {teacher: bundled}\n", [], "has no teacher"),
        (MINIMAL + "masking: {mask_ratio: 1.5}\n", [], "mask_ratio"),
        (MINIMAL + "predictor: {dim: 30}\n", [], "predictor.dim"),
        (MINIMAL.replace("source: sounds", "workers: 1"), [], "data.source is missing"),
        ("- a\n- b\n", [], "mapping"),
        ("a: [1\n", [], "not valid YAML"),
        (MINIMAL, ["training.stepz=1"], "there is no key 'training.stepz'"),
        (MINIMAL, ["steps=1"], "did you mean training.steps"),
        (MINIMAL, ["training.steps"], "key=value"),
        (MINIMAL, ["training.steps=[1"], "not valid YAML"),
        (MINIMAL, ["model.sample_rate=44100"], "no front end for 44100"),
        (MINIMAL, ["training.betas=[1.0, 1.0]"], "training.betas"),
        (MINIMAL, ["training.optimizer=lion"], "'optimizer' must be"),
        (MINIMAL, ["training.optimizer=muon", "training.precision=fp16"], "muon goes with .* bf16 or fp32"),
        (MINIMAL, ["training.lr=.inf"], "training.lr must be positive"),
        (MINIMAL, ["training.patience=2"], "training.patience needs probe.data"),
        (MINIMAL, ["training.micro_batch=0"], "training.micro_batch must be positive"),
        (MINIMAL, ["training.average_decay=1"], "training.average_decay must be 0 or more"),
        (MINIMAL, ["training.seed=100000000000000000000000000"], "training.seed"),
        (MINIMAL, ["predictor.mlp_ratio=0.001"], "predictor.mlp_ratio"),
        (MINIMAL, ["offline.joint_dim=0"], "offline.joint_dim"),
        (MINIMAL, ["offline.weights=[-1, .nan]"], "offline.weights"),
        (MINIMAL, ["data.source=a.tar", "training={epochs: 1}"], "cannot be counted with tar shards"),
    ],
)
def test_mistakes_are_named(write, text, overrides, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_recipe(write(text), overrides).model_config(None, (0.0, 1.0))


def test_yaml_cannot_make_objects(write):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(write(MINIMAL + "about: !!python/object/apply:os.getcwd []\n"))


def test_what_begins_like_a_number_is_text(write):
    assert load_recipe(write(MINIMAL.replace("source: sounds", "source: 7e0f32"))).data.source == "7e0f32"


def test_text_of_overrides_is_taken_as_it_is(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for value, wanted in (
        ("*.tar", "*.tar"),
        ("{a,b}.tar", "{a,b}.tar"),
        ("123", "123"),
        ("~/x", "/home/me/x"),
        ("a: b #c", "a: b #c"),
    ):
        assert load_recipe(write(MINIMAL), [f"data.source={value}"]).data.source == wanted
    assert load_recipe(write(MINIMAL + "probe: {data: x}\n"), ["probe.data=null"]).probe.data is None


def test_a_folder_does_not_hide_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "debug").mkdir()
    assert load_recipe("debug", ["data.source=x"]).name == "debug"


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_recipe(str(tmp_path / "run.yaml"))


def test_no_such_recipe():
    with pytest.raises(ConfigError, match="tiny-cpu"):
        load_recipe("tiny-cqu", ["data.source=x"])
    with pytest.raises(ConfigError, match="no such recipe file"):
        load_recipe("nowhere/run.yaml")


def test_shape_comes_from_the_checkpoint_unless_stated(write):
    start = ModelConfig(name="old", embed_dim=64, depth=2, num_heads=2, input_size=(80, 208), norm_stats=(-3.0, 2.0))
    recipe = load_recipe(write(MINIMAL), ["model.input_size=[80, 304]"])
    config = recipe.model_config(start, (-7.0, 4.0))
    assert (config.embed_dim, config.depth, config.input_size) == (64, 2, (80, 304))
    assert (config.name, config.norm_stats) == ("run", (-7.0, 4.0))
    with pytest.raises(ConfigError, match="embed_dim is 768, but old has 64"):
        load_recipe(write(MINIMAL), ["model.size=base"]).model_config(start, (0.0, 1.0))


def test_differences_leave_out_what_may_change(write):
    recipe = load_recipe(write(MINIMAL))
    free = ["data.workers=7", "training.keep=9", "output=/elsewhere", "probe.every=3", "training.micro_batch=64"]
    assert load_recipe(write(MINIMAL), free).differences(recipe.to_dict()) == []
    changed = load_recipe(write(MINIMAL), ["training.steps=11", "masking.mask_ratio=0.6"])
    assert sorted(changed.differences(recipe.to_dict())) == [
        "masking.mask_ratio: 0.7 -> 0.6",
        "training.steps: 10 -> 11",
    ]
    patient = [load_recipe(write(MINIMAL), ["probe.data=x", "training.patience=2", f"probe.every={n}"]) for n in (1, 2)]
    assert patient[1].differences(patient[0].to_dict()) == ["probe.every: 1 -> 2"]
    shards = [load_recipe(write(MINIMAL), ["data.source=a.tar", f"data.workers={n}"]) for n in (1, 2)]
    assert shards[1].differences(shards[0].to_dict()) == ["data.workers: 1 -> 2"]


def test_recipes_are_plain_yaml():
    for name in NAMES:
        assert isinstance(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()), dict)


def test_both_kinds_of_training_have_the_same_names():
    kinds = [known_keys(Recipe), known_keys(FinetuneRecipe)]
    shared = {key for key in kinds[0] if key in kinds[1]}
    assert {"data.source", "start.model", "output", "about"} < shared
    assert {f"training.{field.name}" for field in dataclasses.fields(TrainingSection)} < shared
    for key in shared - {"data", "model", "start", "training"}:
        assert kinds[0][key] == kinds[1][key], key


@pytest.mark.parametrize("name", sorted(known_recipes(FINETUNE_RECIPES)))
def test_packaged_recipes_of_fine_tuning_load(name):
    recipe = load_finetune_recipe(name, ["data.source=sounds"])
    assert recipe.about
    assert (
        recipe.differences(load_finetune_recipe("full", ["data.source=sounds"]).to_dict())
        == {
            "full": [],
            "head": ["model.freeze_encoder: False -> True"],
            "lora": ["lora.rank: 0 -> 8"],
        }[name]
    )
