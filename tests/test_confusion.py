"""The picture of a confusion matrix: what is drawn, how large, and what is refused."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from m2d_embed.errors import ConfigError
from m2d_embed.evaluate.confusion import font_families, plot_confusion


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


def counts_in(figure):
    axes = figure.axes[0]
    return {(round(text.get_position()[1]), round(text.get_position()[0])): int(text.get_text()) for text in axes.texts}


def diagonal(labels, count=10):
    return count * np.eye(labels, dtype=np.int64)


def names(labels):
    return [f"label {i}" for i in range(labels)]


def test_cells_counts_and_accuracy(tmp_path, drawn):
    matrix = np.array([[6, 2, 0], [1, 1, 2], [0, 0, 0]])
    plot_confusion(matrix, ["dog", "cat", "cow"], tmp_path / "out.png", "a title")
    axes = drawn[0].axes[0]
    image = axes.images[0]
    shares = np.array([[0.75, 0.25, 0], [0.25, 0.25, 0.5], [0, 0, 0]])
    np.testing.assert_allclose(image.get_array(), shares)
    assert counts_in(drawn[0]) == {(0, 0): 6, (0, 1): 2, (1, 0): 1, (1, 1): 1, (1, 2): 2}
    assert axes.get_title() == "a title\naccuracy 58.3% (7 of 12 clips)"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["dog", "cat", "cow"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["dog", "cat", "cow"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert axes.yaxis_inverted(), "the first label is on top"


def test_counts_stand_out_from_their_cells(tmp_path, drawn):
    plot_confusion(np.array([[9, 1], [5, 5]]), ["a", "b"], tmp_path / "out.png", "")
    image, texts = drawn[0].axes[0].images[0], drawn[0].axes[0].texts
    for text in texts:
        column, row = (round(v) for v in text.get_position())
        cell = image.cmap(image.norm(image.get_array()[row, column]))[:3]
        ink = 1.0 if text.get_color() == "white" else float(text.get_color())
        assert abs(np.mean(cell) - ink) > 0.35


def test_size_grows_and_pixels_have_the_colours(tmp_path):
    sizes = []
    for labels in (2, 10, 60):
        plot_confusion(diagonal(labels), names(labels), tmp_path / "out.png", "title")
        picture = matplotlib.image.imread(tmp_path / "out.png")
        sizes.append(picture.shape[1])
        dark = (picture[..., 0] < 0.2) & (picture[..., 2] > 0.35)
        assert 0.2 / labels < dark.mean() < 1.2 / labels
    assert 400 < sizes[0] <= sizes[1] < sizes[2] / 2 < 2000
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize(("labels", "largest", "written"), [(50, 10, True), (50, 100_000_000, False), (600, 10, False)])
def test_counts_are_written_while_they_fit(tmp_path, drawn, labels, largest, written):
    plot_confusion(diagonal(labels, largest), names(labels), tmp_path / "out.png", "")
    assert bool(drawn[0].axes[0].texts) == written


@pytest.mark.parametrize("labels", [2, 10, 50, 200, 600])
def test_names_do_not_overlap(tmp_path, drawn, labels):
    plot_confusion(diagonal(labels), names(labels), tmp_path / "out.png", "")
    axes, cell = drawn[0].axes[0], drawn[0].get_figheight() * 72 / labels  # points
    for axis in (axes.xaxis, axes.yaxis):
        places, shown = axis.get_ticklocs(), axis.get_ticklabels()
        assert [text.get_text() for text in shown] == [f"label {round(place)}" for place in places]
        assert len(shown) == labels if labels <= 200 else len(shown) >= labels / 3
        assert np.diff(places).min() * cell > 1.2 * shown[0].get_fontsize() >= 6
    lying = axes.get_xticklabels()
    assert {text.get_rotation() for text in lying} == {0 if labels == 2 else 90}
    if labels == 2:
        assert lying[0].get_window_extent().x1 < lying[1].get_window_extent().x0


def test_only_names_that_do_not_fit_are_shortened(tmp_path, drawn):
    given = ["Male speech, man speaking", "x" * 300, "costs $5 or $6"]
    plot_confusion(diagonal(3), given, tmp_path / "out.png", "between $1 and $2")
    shown = drawn[0].axes[0].get_yticklabels()
    assert [shown[0].get_text(), shown[2].get_text()] == [given[0], given[2]]
    assert shown[1].get_text().startswith("xxxxxxxxxxxxxxxxxxxx") and shown[1].get_text().endswith("x…")
    assert not any(text.get_parse_math() for text in (*shown, *drawn[0].axes[0].get_xticklabels()))
    assert not drawn[0].axes[0].title.get_parse_math()
    assert drawn[0].get_tightbbox().width < 10  # inches


def test_letters_that_the_usual_font_lacks_come_from_other_fonts(tmp_path, recwarn):
    assert font_families("dog, œuf, собака") == ["DejaVu Sans"]
    assert font_families("dog \u24b6") == ["DejaVu Sans", "STIXGeneral"]  # both come with matplotlib
    plot_confusion(diagonal(2), ["dog", "\u24b6"], tmp_path / "out.png", "a title")
    assert not [warning for warning in recwarn if "missing from font" in str(warning.message)]


def test_refusals(tmp_path):
    out, good = tmp_path / "out.png", diagonal(3)
    with pytest.raises(ConfigError, match=r"square.* not \(2, 3\)"):
        plot_confusion(good[:2], names(3), out, "")
    with pytest.raises(ConfigError, match=r"square.* not \(9,\)"):
        plot_confusion(good.ravel(), names(9), out, "")
    with pytest.raises(ConfigError, match="3 labels needs as many names, not 2"):
        plot_confusion(good, names(2), out, "")
    with pytest.raises(ConfigError, match="holds float64"):
        plot_confusion(good / 2, names(3), out, "")
    with pytest.raises(ConfigError, match="down to -10"):
        plot_confusion(-good, names(3), out, "")
    with pytest.raises(ConfigError, match="not one clip"):
        plot_confusion(0 * good, names(3), out, "")
    with pytest.raises(ConfigError, match=r"out\.jpg: plots are PNG files"):
        plot_confusion(good, names(3), out.with_suffix(".jpg"), "")
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        plot_confusion(good, names(3), tmp_path / "nowhere" / "out.png", "")
    assert not list(tmp_path.iterdir())
