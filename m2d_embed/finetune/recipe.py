"""Settings of fine-tuning: what is trained on which clips, and how. Strict, in one YAML file or as ``key=value``.

``RECIPES`` are the ones that come with the package; ``m2d-embed finetune --list`` shows them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from m2d_embed.checkpoints.registry import BUNDLED_NAME
from m2d_embed.config import ModelConfig, ScenePooling
from m2d_embed.errors import ConfigError
from m2d_embed.training.settings import RunRecipe, TrainingSection, read_recipe, require

RECIPES = Path(__file__).parent / "recipes"
ALL_FOLDS = "all"
NO_FOLD = "none"

#: What may differ when a run is resumed: it changes neither the data, whose contents are compared, nor the steps.
_FREE_ON_RESUME = re.compile(r"about|data\.source|output|training\.(log_every|save_every|keep|eval_batch_size)")
_LORA_TARGETS = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class SpecAugmentSection:
    """Stripes of a log-mel that are blanked (Park et al., arXiv 1904.08779): how many, and how wide at most.

    ``max_freq`` is a share of the mel bands, ``max_time`` of the crop.
    """

    freq_masks: int = 2
    max_freq: float = 0.25
    time_masks: int = 2
    max_time: float = 0.2

    def __post_init__(self) -> None:
        for name in ("freq_masks", "time_masks"):
            value = getattr(self, name)
            require(value >= 0, f"spec_augment.{name} must not be negative, not {value}")
        for name in ("max_freq", "max_time"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"spec_augment.{name} is a share, 0 to 1, not {value}")


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters instead of the blocks' weights (Hu et al., arXiv 2106.09685), by ``peft``.

    ``rank`` 0 means none. The product of both matrices is scaled by ``alpha / rank``. ``targets`` are the matrices of a
    block that get one: qkv, proj (of attention), fc1, fc2 (of the MLP).
    """

    rank: int = 0
    alpha: int = 16
    targets: tuple[str, ...] = _LORA_TARGETS

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank must not be negative, not {self.rank}")
        require(self.alpha > 0, f"lora.alpha must be positive, not {self.alpha}")
        unknown = [name for name in self.targets if name not in _LORA_TARGETS]
        require(not unknown, f"lora.targets are among {', '.join(_LORA_TARGETS)}, not {', '.join(unknown)}")
        require(bool(self.targets), "lora.targets is empty; name at least one, or set lora.rank=0")


@dataclass(frozen=True)
class DataSection:
    """The labelled clips, and what of them is trained on.

    Attributes:
        source: a folder with a sub-folder a label, a CSV of labelled clips, or a CSV of events.
        label_column: of the CSV, if it is not ``label`` or ``labels``.
        fold: the fold that is tested; null is the lowest, "all" each in turn, "none" trains on everything.
        crop_seconds: length of the random crops; null is the window, or the longest clip if that is shorter.
        balanced: draw clips so that labels come equally often.
    """

    source: str
    label_column: str = ""
    fold: str | None = None
    crop_seconds: float | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        require(bool(self.source.strip()), "data.source is empty; name a folder of labels or a .csv")
        known = self.fold in (None, ALL_FOLDS, NO_FOLD) or (self.fold is not None and self.fold.isdecimal())
        require(known, f"data.fold is a number, {ALL_FOLDS!r} or {NO_FOLD!r}, not {self.fold!r}")
        _check_seconds("data.crop_seconds", self.crop_seconds)


@dataclass(frozen=True)
class StartSection:
    """What the weights start from.

    ``model`` is what ``load_model`` takes, the bundled model if empty. ``head`` "probe": it is the linear probe of the
    encoder as it is (LP-FT; Kumar et al., arXiv 2202.10054), or "random"; null is "probe" for clips and "random" for
    events, which have no other.
    """

    model: str = ""
    head: Literal["probe", "random"] | None = None


@dataclass(frozen=True)
class ModelSection:
    """The model that is trained.

    Attributes:
        features: what the head sees: "stacked" patches of a time column (``F * d``), or their mean, "flat" (``d``).
        scene_pooling: what it sees of a clip: their "mean" over time, or "mean_std", followed by the standard
            deviation; null is as the model's scene embeddings. Of events it sees single columns, so it is "mean".
        window_seconds: another window than the model's; positions are computed anew.
        freeze_encoder: train the head alone.
        freeze_patch_embed: keep the patch embedding (Kumar et al., arXiv 2211.09359).
    """

    features: Literal["stacked", "flat"] = "stacked"
    scene_pooling: ScenePooling | None = None
    window_seconds: float | None = None
    freeze_encoder: bool = False
    freeze_patch_embed: bool = False

    def __post_init__(self) -> None:
        _check_seconds("model.window_seconds", self.window_seconds)


@dataclass(frozen=True)
class AugmentSection:
    """What is done to crops, besides ``spec_augment``.

    Attributes:
        mixup: parameter of the Beta distribution of mixup (arXiv 1710.09412); 0 is none.
        gain_db: clips get louder or softer by at most so many dB.
        freq_warp: frequencies are scaled by at most such a share, up or down (Jaitly and Hinton, 2013).
        patch_dropout: how many rows (flat features only) and columns of patches are left out at each step (Koutini et
            al., arXiv 2110.05069, section 2.2).
    """

    mixup: float = 0.0
    gain_db: float = 0.0
    freq_warp: float = 0.0
    patch_dropout: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name in ("mixup", "gain_db", "freq_warp"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"augment.{name} must not be negative, not {value}")
        require(min(self.patch_dropout) >= 0, f"augment.patch_dropout must not be negative, not {self.patch_dropout}")


@dataclass(frozen=True)
class FinetuningSection(TrainingSection):
    """Settings of the training.

    ``steps``, if given, count instead of ``epochs``. ``lr`` is the head's; null is 3e-4 for a head that begins as a
    probe, 1e-3 for one that begins at random. ``layer_decay``: each layer's learning rate is this share of that of the
    layer above it (Clark et al., arXiv 2003.10555, section 3; as in BEiT, arXiv 2106.08254); 1 is the same rate for
    all. ``label_smoothing`` is the share of a target that is spread over all labels. The head normalises over a
    micro-batch, of all processes. After each epoch whole clips are validated, ``eval_batch_size`` windows at a time,
    if there are any to validate on.
    """

    epochs: float | None = 20.0
    layer_decay: float = 0.75
    label_smoothing: float = 0.1
    eval_batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps is not None or self.epochs is not None, "training.steps or training.epochs: give one")
        smallest = min(self.batch_size, self.micro_batch or self.batch_size)
        require(smallest > 1, "training.batch_size must be 2 or more, and micro_batch: the head normalises over it")
        size = self.eval_batch_size
        require(size > 0, f"training.eval_batch_size must be positive, not {size}")
        require(0 < self.layer_decay <= 1, f"training.layer_decay is above 0, at most 1, not {self.layer_decay}")
        require(
            0 <= self.label_smoothing < 1,
            f"training.label_smoothing is a share, below 1, not {self.label_smoothing}",
        )


@dataclass(frozen=True)
class FinetuneRecipe(RunRecipe):
    """Everything about a run of fine-tuning.

    ``output`` is the folder of the run; ``runs/finetune-<data>-<model>`` if empty.
    """

    kind: ClassVar[str] = "fine-tuning"

    data: DataSection
    about: str = ""
    output: str = ""
    start: StartSection = field(default_factory=StartSection)
    model: ModelSection = field(default_factory=ModelSection)
    lora: LoraSection = field(default_factory=LoraSection)
    augment: AugmentSection = field(default_factory=AugmentSection)
    spec_augment: SpecAugmentSection = field(default_factory=SpecAugmentSection)
    training: FinetuningSection = field(default_factory=FinetuningSection)

    def __post_init__(self) -> None:
        rows, columns = self.augment.patch_dropout
        require(
            rows == 0 or self.model.features == "flat",
            f"augment.patch_dropout leaves out {rows} rows, but stacked features need every row; set "
            f"model.features=flat, or augment.patch_dropout=[0, {columns}]",
        )
        require(
            not (self.model.freeze_encoder and self.lora.rank),
            "model.freeze_encoder and lora contradict one another: adapters train the encoder; leave one of them out",
        )
        require(
            self.data.fold != NO_FOLD or self.training.patience is None,
            "training.patience needs clips to validate on, and data.fold none trains on all; leave one of them out",
        )

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return Path(self.output or f"runs/finetune-{self.data_name}-{self.model_name}")

    @property
    def data_name(self) -> str:
        """A short name of the data: the folder's, or that of the CSV's folder where the CSV has a general name."""
        path = Path(self.data.source).absolute()
        if path.suffix.lower() != ".csv":
            return path.name
        return path.parent.name if path.stem in ("metadata", "labels", "data", "events") else path.stem

    @property
    def model_name(self) -> str:
        """A short name of the model that it starts from."""
        return Path(self.start.model).name if self.start.model else BUNDLED_NAME

    def model_config(self, base: ModelConfig) -> ModelConfig:
        """The model's configuration with this recipe's window, and without heads.

        Raises:
            ConfigError: if the window is shorter than a patch.
        """
        input_size = base.input_size
        if self.model.window_seconds is not None:
            input_size = (input_size[0], whole_columns(self.model.window_seconds, base) * base.patch_size[1])
        return dataclasses.replace(base, input_size=input_size, head=None, clap=None)

    @classmethod
    def from_plain(cls, content: dict[str, Any]) -> FinetuneRecipe:
        """As in ``RunRecipe``; YAML has folds as numbers."""
        data = content["data"]
        fold = data.get("fold")
        return super().from_plain({**content, "data": {**data, "fold": str(fold) if isinstance(fold, int) else fold}})

    def for_fold(self, fold: int) -> FinetuneRecipe:
        """The run of one fold, in a folder of its own below that of this one."""
        data = dataclasses.replace(self.data, fold=str(fold))
        return dataclasses.replace(self, data=data, output=str(self.folder / f"fold-{fold}"))

    def may_change(self, key: str) -> bool:
        """As in ``RunRecipe``; what the data's files hold is compared by their contents."""
        return _FREE_ON_RESUME.fullmatch(key) is not None


def whole_columns(seconds: float, config: ModelConfig) -> int:
    """Patch columns that hold so many seconds, the last one perhaps in part.

    Raises:
        ConfigError: if it is not even one patch.
    """
    frames = 1 + round(seconds * config.sample_rate) // config.hop_length  # as the log-mel of a clip so long
    patch_frames = config.patch_size[1]
    if frames < patch_frames:
        raise ConfigError(f"{seconds:g} s are less than a patch, {config.column_ms / 1000:g} s.")
    return -(-frames // patch_frames)


def load_recipe(name: str = "", overrides: Iterable[str] = ()) -> FinetuneRecipe:
    """Read a recipe and apply ``key=value`` overrides, e.g. ``training.epochs=10`` or ``lora.rank=8``.

    Args:
        name: a YAML file, or the name of a recipe that comes with the package; "" is one of defaults alone.
        overrides: dotted keys; values are YAML.

    Raises:
        ConfigError: if there is no such recipe, it is not YAML, or a key or value is wrong; it names the key.
    """
    return read_recipe(FinetuneRecipe, name, RECIPES, overrides, "training.epochs=10")


def _check_seconds(name: str, seconds: float | None) -> None:
    require(seconds is None or 0 < seconds < math.inf, f"{name} must be positive, not {seconds}")
