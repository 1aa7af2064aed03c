"""A run in one YAML file: what is trained, on what, how. Unknown keys and values of the wrong type are errors.

``RECIPES`` are the ones that come with the package; ``m2d-embed pretrain --list`` shows them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from m2d_embed.config import FRONT_ENDS, VIT_SIZES, ModelConfig
from m2d_embed.errors import ConfigError
from m2d_embed.pretrain.batches import DataConfig
from m2d_embed.pretrain.masking import MaskingConfig
from m2d_embed.pretrain.predictor import PredictorConfig
from m2d_embed.pretrain.sources import is_shards
from m2d_embed.training.settings import RunRecipe, TrainingSection, read_recipe, require

RECIPES = Path(__file__).parent / "recipes"

Size = Literal["tiny", "small", "base", "large"]
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
class PretrainingSection(TrainingSection):
    """Settings of the training; the defaults are the published ones.

    Exactly one of ``steps`` and ``epochs`` is given. ``lr`` null is ``3e-4 * batch_size / 256``. ``optimizer`` is
    adamw, or muon for the matrices of transformer blocks and adamw for the rest; ``betas`` are AdamW's. ``ema_decay``,
    of the target network, rises linearly from its first to its second value. Validation is the probe's, by its linear
    accuracy.
    """

    batch_size: int = 2048
    micro_batch: int | None = 128
    warmup: float = 20 / 300
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    ema_decay: tuple[float, float] = (0.99995, 0.99999)
    average_decay: float | None = 0.0
    export: Literal["best", "last"] = "last"
    save_every: int | None = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.steps is None) != (self.epochs is None),
            "training.steps or training.epochs: give one of them, and null for the other",
        )
        require(
            self.optimizer == "adamw" or self.precision != "fp16",
            "training.optimizer muon goes with training.precision bf16 or fp32; loss scaling takes one optimiser",
        )
        decays = self.ema_decay
        require(all(0 <= v <= 1 for v in decays), f"training.ema_decay must lie between 0 and 1, not {decays}")
        require(all(0 <= v < 1 for v in self.betas), f"training.betas must be 0 or more, below 1, not {self.betas}")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr if self.lr is not None else 3e-4 * self.batch_size / 256


@dataclass(frozen=True)
class ProbeSection:
    """A kNN and a linear probe every ``every`` steps, on at most ``clips`` clips of a labelled folder or CSV."""

    data: str | None = None
    every: int = 1000
    clips: int = 500

    def __post_init__(self) -> None:
        require(self.every > 0 and self.clips > 1, "probe.every must be positive, and probe.clips at least 2")


@dataclass(frozen=True)
class Recipe(RunRecipe):
    """Everything about a run of pre-training. ``license`` is what the model card says about the weights."""

    kind: ClassVar[str] = "pre-training"

    name: str
    objective: ObjectiveName
    data: DataConfig
    training: PretrainingSection
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
        require(
            self.training.patience is None or self.probe.data is not None,
            "training.patience needs probe.data, by which the run is validated",
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

    def may_change(self, key: str) -> bool:
        """As in ``RunRecipe``.

        With tar shards the number of workers and the micro-batch may not: each worker reads shards of its own. Nor may
        the micro-batch of m2d_clap, from which it takes its negatives, or with drop path, whose random numbers
        are keyed by it; nor a probe that decides when the run ends.
        """
        if key.startswith("probe.") and self.training.patience is not None:
            return False
        bound = {"data.workers", "training.micro_batch"} if is_shards(self.data.source) else set()
        by_micro_batch = self.objective == "m2d_clap" or self.training.drop_path > 0
        bound |= {"training.micro_batch"} if by_micro_batch else set()
        return key not in bound and _FREE_ON_RESUME.fullmatch(key) is not None


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides, e.g. ``training.steps=1000``.

    Args:
        name: a YAML file, or the name of a recipe that comes with the package.
        overrides: dotted keys; values are YAML.

    Raises:
        ConfigError: if there is no such recipe, it is not YAML, or a key or value is wrong; it names the key.
    """
    return read_recipe(Recipe, name, RECIPES, overrides, "training.steps=1000")
