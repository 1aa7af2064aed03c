"""Fixtures: a tiny model with random weights, real clips, and the reference numbers beside the repository."""

import importlib.util
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generic_kernels import COMPILER, compile_generic

from m2d_embed.backends.native import library
from m2d_embed.config import ModelConfig
from m2d_embed.m2d import M2D

# Threads of small operations wait for one another: on a machine that does something else besides, for very long.
torch.set_num_threads(1)

# A shell has what it starts in the background ignore SIGINT, and all that this starts, too; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared"
ORACLE = SHARED / "oracle"

TINY = ModelConfig(
    name="m2d_vit_test-80x64p16x16",
    embed_dim=32,
    depth=3,
    num_heads=2,
    input_size=(80, 64),
    patch_size=(16, 16),
)


def random_model(config: ModelConfig, seed: int = 0, **fields: Any) -> M2D:
    """A model whose weights are random but not trivial: biases and norms differ from their initial values."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = M2D(config, **fields).eval()
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model


def assert_same_npz(first: Path, second: Path) -> None:
    """Two files of ``embed`` hold the same: embeddings up to rounding, everything else exactly."""
    one, other = np.load(first), np.load(second)
    assert set(one) == set(other)
    for key in set(other) - {"embeddings"}:
        assert np.array_equal(one[key], other[key])
    assert np.abs(one["embeddings"] - other["embeddings"]).max() <= 1e-5


@pytest.fixture(scope="session")
def generic_kernels(pytestconfig) -> library.Kernels:
    """The kernels in generic vectors, the matrix unit emulated: they run, slowly, on any processor."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    try:
        return library.load(compile_generic(pytestconfig.cache.mkdir("kernels")))
    except library.LoadError as error:
        pytest.skip(str(error))  # no OpenMP


@pytest.fixture
def tiny() -> M2D:
    return random_model(TINY)


@pytest.fixture(scope="session")
def bundled() -> M2D:
    return M2D.from_pretrained()


@pytest.fixture
def noise() -> Callable[..., torch.Tensor]:
    """``noise(seconds, batch=1)``: white noise in [-1, 1] at 16 kHz, the same each time."""

    def make(seconds: float, batch: int = 1, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, round(seconds * 16_000), generator=generator) * 2 - 1

    return make


@dataclass
class OracleCase:
    """One case of the reference numbers: its description, its weights, and what the reference computed."""

    folder: Path

    @property
    def info(self) -> dict[str, Any]:
        return json.loads((self.folder / "case.json").read_text())

    @property
    def expected(self) -> Any:
        return np.load(self.folder / "expected.npz")

    def state_dict(self) -> dict[str, torch.Tensor]:
        spec = importlib.util.spec_from_file_location("synthetic_weights", ORACLE / "synthetic_weights.py")
        weights = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(weights)
        layout = {name: shape for name, shape in weights.load_layout(self.folder).items() if shape != "sincos"}
        arrays = weights.synthetic_state_dict(layout)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def write_pth(self, folder: Path) -> Path:
        """Save the weights as the published file would be: ``<folder>/<name>/<file>``."""
        file = folder / self.info["name"] / self.info["file"]
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": self.state_dict()}, file)
        return file


ORACLE_CASES = sorted(p.name for p in (ORACLE / "cases").iterdir()) if ORACLE.exists() else []


def oracle_cases() -> Any:
    """Parametrise a test over every case; skip it where the reference numbers are not there."""
    if not ORACLE_CASES:
        return pytest.mark.parametrize(
            "case", [pytest.param(None, marks=pytest.mark.skip(reason="needs ../shared/oracle"))]
        )
    return pytest.mark.parametrize("case", [OracleCase(ORACLE / "cases" / n) for n in ORACLE_CASES], ids=ORACLE_CASES)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "barks", "rain", "on", "the", "roof"]


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A folder like a repository of the Hub: a BERT of width 32 and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder
