"""A run in one YAML file: what is trained, on what, how. Unknown keys and values of the wrong type are errors.

``RECIPES`` are the ones that come with the package; ``m2d-embed pretrain --list`` shows them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from m2d_embed.config import FRONT_ENDS, VIT_SIZES, ModelConfig, from_dict
from m2d_embed.errors import ConfigError
from m2d_embed.pretrain.batches import DataConfig
from m2d_embed.pretrain.masking import MaskingConfig
from m2d_embed.pretrain.predictor import PredictorConfig
from m2d_embed.pretrain.sources import is_shards
from m2d_embed.training.settings import flatten, override, read_yaml, require, to_plain, to_yaml

RECIPES = Path(__file__).parent / "recipes"

Size = Literal["tiny", "small", "base", "large"]
Precision = Literal["fp32", "bf16", "fp16"]
ObjectiveName = Literal["m2d", "m2d_x", "m2d_s", "m2d_as", "m2d_clap", "msm_mae", "msm_mae_s", "data2vec", "salt"]

#: Objectives with a frozen model as the teacher.
WITH_TEACHER = ("m2d_x", "salt")
#: Objectives that learn precomputed frame features.
WITH_FEATURES = ("m2d_s", "msm_mae_s")

#: What may differ when a run is resumed: it changes neither the data nor the steps.
_FREE_ON_RESUME = re.compile(
    r"about|output|license|data\.workers|training\.(micro_batch|log_every|save_every|keep)|probe\..*"
)


@dataclass(frozen=True)
class ModelSection:
    """Shape of the encoder. What is null comes from the checkpoint in ``start``, else is the published ViT-Base's.

    ``size`` is tiny, small, base or large; ``embed_dim``, ``depth`` and ``num_heads`` override it. ``input_size`` and
    ``patch_size`` are (mels, frames).
    """

    size: Size | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    input_size: tuple[int, int] | None = None
    patch_size: tuple[int, int] | None = None
    sample_rate: int | None = None

    def given(self) -> dict[str, Any]:
        """Fields of ``ModelConfig`` that this section states."""
        stated: dict[str, Any] = {}
        if self.size is not None:
            stated |= dict(zip(("embed_dim", "depth", "num_heads"), VIT_SIZES[self.size], strict=True))
        if self.sample_rate is not None:
            if self.sample_rate not in FRONT_ENDS:
                raise ConfigError(f"model.sample_rate: no front end for {self.sample_rate} Hz, only {[*FRONT_ENDS]}.")
            stated |= FRONT_ENDS[self.sample_rate]
        names = ("embed_dim", "depth", "num_heads", "input_size", "patch_size", "sample_rate")
        stated |= {name: value for name in names if (value := getattr(self, name)) is not None}
        return stated


@dataclass(frozen=True)
class StartSection:
    """What the weights start from; fresh ones if ``model`` is empty.

    ``model`` is anything that ``load_model`` takes, a full upstream ``.pth``, or a checkpoint of a run of ours.
    ``parts`` "encoder" takes the encoder alone; "predictor" the predictor too, for an additional task with other
    targets, whose head is new; "all" also the target network and such heads. What is asked for must be there.
    """

    model: str = ""
    parts: Literal["encoder", "predictor", "all"] = "encoder"


@dataclass(frozen=True)
class OfflineSection:
    """The additional task of m2d_x, m2d_s, m2d_as, m2d_clap and msm_mae_s; the teacher of salt.

    ``weights`` are those of the loss over masked patches and of the additional one. ``teacher`` (m2d_x, salt) is
    anything that ``load_model`` takes. ``labels`` (m2d_as) is a file with one label a line; null takes the labels that
    the manifest has. ``text_encoder`` (m2d_clap) is a repository or folder of transformers, ``joint_dim`` the size of
    the common space.
    """

    weights: tuple[float, float] = (1.0, 1.0)
    teacher: str = ""
    labels: str | None = None
    text_encoder: str = "thenlper/gte-base"
    text_pooling: Literal["mean", "cls"] = "mean"
    joint_dim: int = 768

    def __post_init__(self) -> None:
        sensible = all(0 <= weight < math.inf for weight in self.weights)
        require(sensible, f"offline.weights must not be negative, not {self.weights}")
        require(self.joint_dim > 0, f"offline.joint_dim must be positive, not {self.joint_dim}")


@dataclass(frozen=True)
class TrainingSection:
    """Length, batch, optimiser and bookkeeping of a run. Defaults are the published settings.

    Exactly one of ``steps`` and ``epochs`` is given. ``effective_batch`` crops make one optimiser step, whatever the
    number of devices; ``micro_batch`` of them are on a device at a time. The peak learning rate is
    ``base_lr * effective_batch / 256``, after a warm-up over the share ``warmup`` of the run. ``optimizer`` is adamw,
    or muon for the matrices of transformer blocks and adamw for the rest; ``betas`` are AdamW's. ``ema_decay`` rises
    linearly from its first to its second value.
    """

    steps: int | None = None
    epochs: float | None = None
    effective_batch: int = 2048
    micro_batch: int = 128
    optimizer: Literal["adamw", "muon"] = "adamw"
    base_lr: float = 3e-4
    warmup: float = 20 / 300
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 3.0
    ema_decay: tuple[float, float] = (0.99995, 0.99999)
    precision: Precision = "bf16"
    compile: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        require(
            (self.steps is None) != (self.epochs is None),
            "training.steps or training.epochs: give one of them, and null for the other",
        )
        for name in (
            "steps",
            "epochs",
            "effective_batch",
            "micro_batch",
            "clip_norm",
            "log_every",
            "save_every",
            "keep",
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"training.{name} must be positive, not {value}")
        require(0 < self.base_lr < math.inf, f"training.base_lr must be positive, not {self.base_lr}")
        require(self.weight_decay >= 0, f"training.weight_decay must not be negative, not {self.weight_decay}")
        require(
            self.optimizer == "adamw" or self.precision != "fp16",
            "training.optimizer muon goes with training.precision bf16 or fp32; loss scaling takes one optimiser",
        )
        require(0 <= self.warmup < 1, f"training.warmup is a share of the run, 0 <= warmup < 1, not {self.warmup}")
        require(0 <= self.seed < 2**63, f"training.seed must not be negative, and fit 63 bits, not {self.seed}")
        decays = self.ema_decay
        require(all(0 <= v <= 1 for v in decays), f"training.ema_decay must lie between 0 and 1, not {decays}")
        require(all(0 <= v < 1 for v in self.betas), f"training.betas must be 0 or more, below 1, not {self.betas}")


@dataclass(frozen=True)
class ProbeSection:
    """A kNN and a linear probe every ``every`` steps, on at most ``clips`` clips of a labelled folder or CSV."""

    data: str | None = None
    every: int = 1000
    clips: int = 500

    def __post_init__(self) -> None:
        require(self.every > 0 and self.clips > 1, "probe.every must be positive, and probe.clips at least 2")


@dataclass(frozen=True)
class Recipe:
    """Everything about a run. ``license`` is what the model card says about the weights."""

    name: str
    objective: ObjectiveName
    data: DataConfig
    training: TrainingSection
    about: str = ""
    license: str = ""
    output: str = ""
    model: ModelSection = field(default_factory=ModelSection)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    start: StartSection = field(default_factory=StartSection)
    offline: OfflineSection = field(default_factory=OfflineSection)
    probe: ProbeSection = field(default_factory=ProbeSection)

    def __post_init__(self) -> None:
        require(re.fullmatch(r"[\w.-]+", self.name) is not None, f"name {self.name!r}: letters, digits, '.', '_', '-'")
        teacher = self.objective in WITH_TEACHER
        require(
            not teacher or bool(self.offline.teacher),
            f"objective {self.objective} needs offline.teacher, a model's name or folder",
        )
        require(
            self.training.steps is not None or not is_shards(self.data.source),
            "training.epochs cannot be counted with tar shards; give training.steps",
        )
        require(teacher or not self.offline.teacher, f"offline.teacher: objective {self.objective} has no teacher")

    @property
    def folder(self) -> Path:
        """Where the run is kept; ``runs/<name>`` unless ``output`` says otherwise."""
        return Path(self.output or f"runs/{self.name}")

    def model_config(self, start: ModelConfig | None, norm_stats: tuple[float, float]) -> ModelConfig:
        """The encoder's configuration, given that of the checkpoint it starts from.

        Raises:
            ConfigError: if the section ``model`` contradicts the checkpoint in more than the window.
        """
        stated = self.model.given()
        base = start or ModelConfig()
        for name, value in stated.items():
            if start is not None and name != "input_size" and value != getattr(start, name):
                raise ConfigError(
                    f"model: {name} is {value}, but {start.name or self.start.model} has {getattr(start, name)}; "
                    "leave it out to take the checkpoint's."
                )
        begun = f", begun from {start.name}" if start is not None and start.name else ""
        return dataclasses.replace(
            base,
            **stated,
            name=self.name,
            norm_stats=norm_stats,
            head=None,
            clap=None,
            source=f"m2d_embed.pretrain, recipe {self.name}{begun}",
            license=self.license or (start.license if start is not None else ""),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML or JSON hold them."""
        return to_plain(self)

    def to_yaml(self) -> str:
        """The whole recipe, defaults included."""
        return to_yaml(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What differs from the recipe another run was begun with, as ``key: theirs -> ours``; what may is left out.

        With tar shards the number of workers and the micro-batch may not: each worker reads shards of its own. Nor may
        the micro-batch of m2d_clap, from which it takes its negatives.
        """
        mine, theirs = flatten(self.to_dict()), flatten(dict(other))
        bound = ["data.workers", "training.micro_batch"] if is_shards(self.data.source) else []
        bound += ["training.micro_batch"] if self.objective == "m2d_clap" else []
        keys = [key for key in {**theirs, **mine} if key in bound or not _FREE_ON_RESUME.fullmatch(key)]
        return [f"{k}: {theirs.get(k)!r} -> {mine.get(k)!r}" for k in keys if theirs.get(k) != mine.get(k)]


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides, e.g. ``training.steps=1000``.

    Args:
        name: a YAML file, or the name of a recipe that comes with the package.
        overrides: dotted keys; values are YAML.

    Raises:
        ConfigError: if there is no such recipe, it is not YAML, or a key or value is wrong; it names the key.
    """
    file = _find(name)
    content = read_yaml(file)
    for text in overrides:
        override(content, text, Recipe, "training.steps=1000")
    for key, how in (("data", "data.source=FOLDER"), ("training", "training.steps=1000")):
        require(isinstance(content.get(key, {}), dict), f"{file}: {key} is a section, e.g. {how}")
    if "source" not in content.setdefault("data", {}):
        raise ConfigError(f"{file}: data.source is missing; say what to train on: data.source=FOLDER, a .csv or *.tar.")
    try:
        recipe: Recipe = from_dict(Recipe, content)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return recipe


def known_recipes() -> dict[str, str]:
    """Names of the recipes that come with the package, and what each is about."""
    return {file.stem: str(read_yaml(file).get("about", "")).strip() for file in sorted(RECIPES.glob("*.yaml"))}


def _find(name: str) -> Path:
    file = Path(name)
    if file.suffix in (".yaml", ".yml") or file.is_file():
        require(file.is_file(), f"{name}: no such recipe file")
        return file
    packaged = RECIPES / f"{name}.yaml"
    known = [f.stem for f in sorted(RECIPES.glob("*.yaml"))]
    if name not in known:
        close = difflib.get_close_matches(name, known) or known
        raise ConfigError(f"{name!r} is neither a YAML file nor a known recipe; known: {', '.join(close)}.")
    return packaged
