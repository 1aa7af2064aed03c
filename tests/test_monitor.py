"""Signs of collapse, the log of a run through kills and resumes, and its picture."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from m2d_embed.errors import ConfigError, UnsupportedError
from m2d_embed.training import monitor
from m2d_embed.training.monitor import RunLog, mean_variance, plot_curve, rank_me

pytest.importorskip("tensorboard")

# --- signs of collapse ------------------------------------------------------------------------------------------------


def orthogonal(n: int, d: int) -> torch.Tensor:
    """Columns of unit length at right angles."""
    return torch.linalg.qr(torch.randn(n, d, generator=torch.Generator().manual_seed(0)))[0]


def test_rank_of_known_spectra():
    basis = orthogonal(100, 16)
    assert rank_me(basis) == pytest.approx(16, rel=1e-3)
    assert rank_me(1000 * basis) == pytest.approx(16, rel=1e-3)
    assert rank_me(basis[:, :4] @ orthogonal(16, 4).T) == pytest.approx(4, rel=1e-3)
    # Singular values 3 and 1: shares of 3/4 and 1/4.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rank_me(basis[:, :2] * torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(entropy), rel=1e-3)


def test_rank_of_collapsed_vectors():
    assert rank_me(torch.ones(50, 32)) == pytest.approx(1, abs=1e-3)
    assert rank_me(torch.zeros(50, 32)) == pytest.approx(1, abs=1e-3)
    assert math.isnan(rank_me(torch.tensor([[1.0, math.nan]])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_dtype_and_no_gradient(dtype):
    vectors = orthogonal(100, 16)
    given = vectors.to(dtype).requires_grad_()
    assert rank_me(given) == pytest.approx(rank_me(vectors), rel=0.01)
    assert mean_variance(given) == pytest.approx(mean_variance(vectors), rel=0.02)


def test_many_rows_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(monitor, "_MAX_ROWS", 10)
    vectors = torch.zeros(1000, 10)
    vectors[torch.arange(1000), torch.arange(1000) * 10 // 1000] = 1  # a direction of its own in each tenth
    assert rank_me(vectors) == pytest.approx(10, rel=1e-3)
    seen = []
    monkeypatch.setattr(torch.linalg, "svdvals", lambda x: seen.append(x.shape) or torch.ones(1))
    rank_me(vectors)
    rank_me(vectors[:7])
    assert seen == [(10, 10), (7, 10)]


def test_mean_variance():
    vectors = torch.tensor([[0.0, 10.0], [2.0, 10.0]])
    assert mean_variance(vectors) == 0.5
    assert mean_variance(vectors[:1]) == 0


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("function", [rank_me, mean_variance])
def test_other_shapes_are_refused(function, shape):
    with pytest.raises(ConfigError, match=r"shape \(n, d\)"):
        function(torch.zeros(shape))


# --- log --------------------------------------------------------------------------------------------------------------


def logged(folder: Path, steps, first_step=0, offset=0.0) -> None:
    log = RunLog(folder, first_step)
    for step in steps:
        log.write(step, {"loss": step + offset, "lr": 1e-3})
    log.close()


def events(folder: Path, tag="loss") -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_what_is_written_is_read(tmp_path):
    folder = tmp_path / "runs" / "one"
    assert RunLog.read(folder) == []
    log = RunLog(folder, 0)
    log.write(10, {"loss": 0.1 + 0.2, "probe/knn": torch.tensor(0.5)})
    # Before it is closed: another process may look at it, or this one be killed.
    assert RunLog.read(folder) == [{"step": 10, "loss": 0.1 + 0.2, "probe/knn": 0.5}]
    log.write(20, {"loss": 1.0})
    log.close()
    assert [row["step"] for row in RunLog.read(folder)] == [10, 20]
    assert events(folder) == [(10, pytest.approx(0.3)), (20, 1.0)]
    assert events(folder, "probe/knn") == [(10, 0.5)]


def test_a_value_that_is_not_finite_is_null(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(1, {"loss": math.nan, "grad_norm": -math.inf, "lr": 0.5})
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}
    (row,) = RunLog.read(tmp_path)
    assert math.isnan(row["loss"]) and row["lr"] == 0.5


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    logged(tmp_path, range(10, 60, 10))
    logged(tmp_path, [30, 40], first_step=30, offset=0.5)
    assert [(row["step"], row["loss"]) for row in RunLog.read(tmp_path)] == [(10, 10), (20, 20), (30, 30.5), (40, 40.5)]
    assert events(tmp_path) == [(10, 10), (20, 20), (30, 30.5), (40, 40.5)]
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "tensorboard"}


@pytest.mark.parametrize("torn", ['{"step": 30, "lo', '{"step": 30', '{"loss"', "\0\0\0", "3"])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, torn):
    logged(tmp_path, [10, 20])
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write(torn)
    assert [row["step"] for row in RunLog.read(tmp_path)] == [10, 20]
    logged(tmp_path, [40], first_step=40)
    assert [row["step"] for row in RunLog.read(tmp_path)] == [10, 20, 40]
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 3


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path):
    logged(tmp_path, [10, 20])
    file = tmp_path / "log.jsonl"
    file.write_text(file.read_text().rstrip("\n"))
    logged(tmp_path, [30], first_step=30)
    assert [row["step"] for row in RunLog.read(tmp_path)] == [10, 20, 30]


def test_a_damaged_log_is_not_touched(tmp_path):
    logged(tmp_path, [10, 20, 30])
    file = tmp_path / "log.jsonl"
    damaged = file.read_text().replace('{"step": 20', "####")
    file.write_text(damaged)
    with pytest.raises(ConfigError, match="line 2: damaged"):
        RunLog.read(tmp_path)
    with pytest.raises(ConfigError, match="line 2: damaged"):
        RunLog(tmp_path, 10)
    assert file.read_text() == damaged


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UnsupportedError, match=r"m2d-embed\[pretrain\]"):
        RunLog(tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()


# --- curve ------------------------------------------------------------------------------------------------------------


def example_rows(count: int, **more: float) -> list[dict[str, float]]:
    return [{"step": 10 * i, "loss": 1 / i, "lr": 1e-4, "target_rank": 20.0, **more} for i in range(1, count + 1)]


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are saved."""
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return saved


@pytest.mark.parametrize("count", [1, 3, 5000])
def test_curve(tmp_path, figures, count):
    rows = example_rows(count)
    rows[-1] |= {"probe/knn": 0.5, "probe/linear": 0.75}
    plot_curve(rows, tmp_path / "curve.png", "a run")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    panels = figures[0].axes
    assert [axes.get_ylabel() for axes in panels] == ["loss", "probes (%)", "target rank", "learning rate"]
    loss = panels[0].lines[-1]
    assert loss.get_xdata()[[0, -1]].tolist() == [10, 10 * count]
    assert len(loss.get_xdata()) <= 1000
    assert [line.get_ydata().tolist() for line in panels[1].lines] == [[50], [75]]
    assert [text.get_text() for text in panels[1].get_legend().get_texts()] == ["knn: 50.0%", "linear: 75.0%"]
    low, high = panels[0].get_ylim()
    assert low < 1 / count and high > 1  # nothing lies outside


def test_curve_has_the_panels_it_has_values_for(tmp_path, figures):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 0.25, "probe/knn": math.nan}]
    plot_curve(rows, tmp_path / "curve.png", "a run")
    (panel,) = figures[0].axes
    assert panel.lines[-1].get_xdata().tolist() == [1, 3]


def test_parts_of_the_loss_are_drawn_if_there_are_several(tmp_path, figures):
    plot_curve(example_rows(3, **{"loss/m2d": 0.5}), tmp_path / "one.png", "a run")
    plot_curve(example_rows(3, **{"loss/m2d": 0.5, "loss/offline": 0.25}), tmp_path / "two.png", "a run")
    labels = [[text.get_text() for text in figure.axes[0].get_legend().get_texts()] for figure in figures]
    assert labels == [["loss: 0.333"], ["loss: 0.333", "m2d: 0.500", "offline: 0.250"]]


def test_smoothing_keeps_constants_lines_and_ends():
    import numpy as np

    line = np.arange(1000.0)
    smooth = monitor._smooth(line)
    assert smooth[20:-20] == pytest.approx(line[20:-20])
    assert np.abs(smooth - line).max() <= 2
    assert monitor._smooth(np.full(500, 3.0)) == pytest.approx(np.full(500, 3.0))
    noise = np.random.default_rng(0).normal(size=1000)
    assert monitor._smooth(noise).std() < 0.4
    assert monitor._smooth(line[:3]).tolist() == [0, 1, 2]


def test_what_cannot_be_drawn_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"PNG"):
        plot_curve(example_rows(3), tmp_path / "curve.pdf", "a run")
    with pytest.raises(ConfigError, match="does not exist"):
        plot_curve(example_rows(3), tmp_path / "none" / "curve.png", "a run")
    with pytest.raises(ConfigError, match="none of the 1 rows"):
        plot_curve([{"step": 1, "lr": 0.1}], tmp_path / "curve.png", "a run")
