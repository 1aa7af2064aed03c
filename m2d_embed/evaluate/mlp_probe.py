"""The MLP probe: the shallow network of the HEAR benchmark (Turian et al., arXiv 2203.03022, section 4).

The settings are those of its published evaluation kit (hear-eval-kit 2021.1.3): one or two hidden layers of 1024 units
(Linear, BatchNorm, Dropout 0.1, ReLU) on embeddings as they are, Xavier weights, Adam, batches of 1024 clips in one
fixed order, at most 500 epochs. Every third epoch it is scored on held-out clips (accuracy, or mAP if a clip may have
several labels); training stops after 20 such scores without a better one, and the weights of the best are kept. Eight
of the 16 settings, drawn at random, are tried for the first test fold; the best one is used for the other folds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from m2d_embed.errors import ConfigError
from m2d_embed.evaluate.features import FoldPrediction, Scores, Vectors, check_embeddings
from m2d_embed.evaluate.scores import mean_average_precision
from m2d_embed.labelled.clips import Integers, LabelledClips

_HIDDEN = 1024
_DROPOUT = 0.1
_BATCH = 1024
_MAX_EPOCHS = 500
_VALIDATE_EVERY = 3  # epochs
_PATIENCE = 20  # validations
_GRID_POINTS = 8

_INITIALISATIONS = {"xavier_uniform": nn.init.xavier_uniform_, "xavier_normal": nn.init.xavier_normal_}


@dataclass(frozen=True)
class MlpSettings:
    """What HEAR chooses among: 1 or 2 hidden layers, Adam's learning rate, and how weights are drawn."""

    hidden_layers: int
    learning_rate: float
    initialisation: str


GRID = tuple(
    MlpSettings(*values) for values in itertools.product((1, 2), (3.2e-3, 1e-3, 3.2e-4, 1e-4), _INITIALISATIONS)
)


@dataclass(frozen=True, eq=False)
class _Trained:
    """A network with the weights of its best epoch, and what they score on the held-out clips."""

    network: nn.Module
    settings: MlpSettings
    score: float
    epoch: int


@dataclass(frozen=True, eq=False)
class _Part:
    """Embeddings (n, D) float32, and labels, (n,) int64 or (n, L) float32."""

    x: Tensor
    y: Tensor


def mlp_predictions(
    embeddings: Vectors,
    clips: LabelledClips,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_trained: Callable[[], None] = lambda: None,
) -> Iterator[FoldPrediction]:
    """Yield what the MLP says of each test fold: softmax, or sigmoid if a clip may have several labels.

    The clips held out (``LabelledClips.hold_out``) are never trained on.

    Args:
        embeddings: (n, D) float32, one row a clip; not standardised, as in HEAR.
        clips: what they are.
        seed: of the settings tried, the weights, the dropout and the order of the clips.
        device: where to train; the CPU stands in for devices other than CUDA's.
        on_trained: called after each of the ``num_trainings``.

    Raises:
        ConfigError: if ``embeddings`` do not fit ``clips`` or are not finite, a fold has too few training clips to
            hold any out, or none of those held out has a label.
    """
    check_embeddings(embeddings, clips)
    for fold in clips.test_folds():
        train, held_out = clips.hold_out(fold)
        if len(train) < 2 or len(held_out) == 0:
            raise ConfigError(
                f"the MLP probe: fold {fold} has too few training clips to hold any out for validation; "
                "use the linear and the nearest-neighbour probe."
            )
        if not clips.targets[held_out].any():
            raise ConfigError(
                f"the MLP probe: no clip held out for validation of fold {fold} has a label, so nothing can be chosen "
                "on them; use the linear and the nearest-neighbour probe."
            )
    target = torch.device(device)
    return _predict(embeddings, clips, seed, target if target.type == "cuda" else torch.device("cpu"), on_trained)


def num_trainings(clips: LabelledClips) -> int:
    """How many networks the probe trains."""
    return min(_GRID_POINTS, len(GRID)) + len(clips.test_folds()) - 1


def _predict(
    embeddings: Vectors, clips: LabelledClips, seed: int, device: torch.device, on_trained: Callable[[], None]
) -> Iterator[FoldPrediction]:
    tried = [GRID[i] for i in np.random.default_rng(seed).permutation(len(GRID))[:_GRID_POINTS]]
    for fold in clips.test_folds():
        indices = clips.hold_out(fold)
        train, held_out = (_part(embeddings, clips, part, device) for part in indices)
        best: _Trained | None = None
        for settings in tried:
            trained = _train(train, held_out, len(clips.label_names), settings, seed)
            on_trained()
            if best is None or trained.score > best.score:
                best = trained
        assert best is not None
        tried = [best.settings]
        test = clips.split(fold)[1]
        scores = _probabilities(best.network, torch.from_numpy(embeddings[test]).to(device), clips.multi_label)
        chosen = {**asdict(best.settings), "epoch": best.epoch, "validation_score": best.score}
        yield FoldPrediction(fold, test, scores, chosen)


def _part(embeddings: Vectors, clips: LabelledClips, indices: Integers, device: torch.device) -> _Part:
    labels = torch.from_numpy(clips.labels[indices])
    labels = labels.float() if clips.multi_label else labels.long()
    return _Part(torch.from_numpy(embeddings[indices]).to(device), labels.to(device))


def _network(dim: int, num_labels: int, settings: MlpSettings) -> nn.Sequential:
    initialise = _INITIALISATIONS[settings.initialisation]
    layers: list[nn.Module] = []
    width, gain = dim, nn.init.calculate_gain("linear")
    for _ in range(settings.hidden_layers):
        hidden = nn.Linear(width, _HIDDEN)
        initialise(hidden.weight, gain=gain)
        layers += [hidden, nn.BatchNorm1d(_HIDDEN), nn.Dropout(_DROPOUT), nn.ReLU()]
        width, gain = _HIDDEN, nn.init.calculate_gain("relu")
    output = nn.Linear(width, num_labels)
    initialise(output.weight, gain=gain)
    return nn.Sequential(*layers, output)


def _train(train: _Part, held_out: _Part, num_labels: int, settings: MlpSettings, seed: int) -> _Trained:
    """Train until the held-out clips are scored no better for a while; reproducible, and no other draw is disturbed."""
    device = train.x.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network = _network(train.x.shape[1], num_labels, settings).to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
        order = torch.randperm(len(train.x)).to(device)
        x, y = train.x[order], train.y[order]
        best_score, best_epoch, best_weights, waited = -np.inf, 0, _copy(network), 0
        for epoch in range(1, _MAX_EPOCHS + 1):
            _epoch(network, optimizer, x, y)
            if epoch % _VALIDATE_EVERY:
                continue
            score = _validate(network, held_out)
            waited += 1
            if score > best_score:
                best_score, best_epoch, best_weights, waited = score, epoch, _copy(network), 0
            if waited == _PATIENCE:
                break
        network.load_state_dict(best_weights)
    return _Trained(network, settings, float(best_score), best_epoch)


def _epoch(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    loss_of = nn.functional.cross_entropy if y.ndim == 1 else nn.functional.binary_cross_entropy_with_logits
    network.train()
    for rows in _batches(len(x)):
        optimizer.zero_grad()
        loss_of(network(x[rows]), y[rows]).backward()
        optimizer.step()


def _batches(count: int) -> list[slice]:
    """Consecutive batches; a last one of a single clip, of which batch norm can make nothing, joins the one before."""
    edges = [*range(0, count, _BATCH), count]
    if len(edges) > 2 and count - edges[-2] == 1:
        del edges[-2]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _validate(network: nn.Module, held_out: _Part) -> float:
    """Accuracy, or mAP over the labels there."""
    multi_label = held_out.y.ndim == 2
    scores = _probabilities(network, held_out.x, multi_label)
    if multi_label:
        return mean_average_precision(held_out.y.cpu().numpy().astype(bool), scores)
    return float((scores.argmax(axis=1) == held_out.y.cpu().numpy()).mean())


def _probabilities(network: nn.Module, x: Tensor, multi_label: bool) -> Scores:
    network.eval()
    with torch.no_grad():
        logits = network(x).double()
    scores: Scores = (logits.sigmoid() if multi_label else logits.softmax(dim=1)).cpu().numpy()
    return scores


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}
