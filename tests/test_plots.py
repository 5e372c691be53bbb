from __future__ import annotations

import sys

import pytest
import torch

from cnf import plots
from cnf.data import toy

pytest.importorskip("matplotlib")

PLANE = ((-2.0, 2.0), (-1.0, 3.0))


def panel(title: str, features: int, *, density: bool, scale: float = 1.0) -> plots.Panel:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(50, features, generator=generator)
    shape = (20,) * features
    return plots.Panel(title, samples, scale * torch.rand(shape) if density else None, "note")


def test_the_grid_is_stored_as_a_picture() -> None:
    points = plots.grid(PLANE, 4)
    assert points.shape == (4, 4, 2)
    assert (points[0, :, 1] == points[0, 0, 1]).all()  # a row has one height
    assert (points[:, 0, 0] == -1.5).all()
    assert points[0, 0, 1] < points[1, 0, 1]  # and rows go up


def test_a_grid_has_one_or_two_features() -> None:
    with pytest.raises(ValueError, match="one or two features, got bounds for 3"):
        plots.grid(((0.0, 1.0),) * 3)


def test_a_known_density_integrates_to_one_on_the_grid() -> None:
    target = toy("8gaussians")
    (left, right), (low, high) = target.bounds
    values = plots.evaluate(target.log_prob, target.bounds, size=100, chunk=999)
    cell = (right - left) * (high - low) / 100**2
    assert values.shape == (100, 100)
    assert values.sum().item() * cell == pytest.approx(1.0, abs=1e-3)


def test_evaluation_follows_the_dtype_it_is_told() -> None:
    seen = []

    def log_prob(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return x[:, 0]

    plots.evaluate(log_prob, PLANE, size=5, like=torch.zeros(1, dtype=torch.float64))
    assert seen == [torch.float64]


def test_densities_share_one_colour_scale_and_the_limits() -> None:
    panels = [
        panel("data", 2, density=True),
        panel("high", 2, density=True, scale=3.0),
        panel("low", 2, density=True, scale=0.1),
    ]
    figure = plots.comparison(panels, [plots.Curve("low", [(0.0, 3.0), (1.0, 2.0)])], bounds=PLANE)
    pictures = [ax for ax in figure.axes if ax.images]
    assert len(pictures) == 3
    assert len({ax.images[0].get_clim() for ax in pictures}) == 1
    assert all(ax.get_xlim() == PLANE[0] and ax.get_ylim() == PLANE[1] for ax in pictures)
    assert [ax.get_title() for ax in pictures] == ["data\nnote", "high\nnote", "low\nnote"]
    assert figure.axes[0].get_aspect() == 1.0


def test_the_truth_is_a_line_below_the_curves() -> None:
    curve = plots.Curve("model", [(1.0, 9.0), (2.0, 2.5), (3.0, 2.0)])
    figure = plots.comparison([panel("data", 2, density=True)], [curve], bounds=PLANE, truth=1.5)
    below = next(ax for ax in figure.axes if ax.get_xlabel() == "training time (s)")
    assert [text.get_text() for text in below.get_legend().get_texts()] == [
        "model",
        "truth (entropy)",
    ]
    assert below.get_ylim()[0] < 1.5
    assert below.get_ylabel() == "held-out nll (nats)"


@pytest.mark.parametrize(("features", "panels"), [(1, 2), (3, 2), (6, 2), (6, 5)])
def test_tables_of_any_width_have_a_picture(features: int, panels: int, tmp_path) -> None:
    columns = [f"column {i}" for i in range(features)]
    shown = [panel(f"model {i}", features, density=features == 1) for i in range(panels)]
    figure = plots.comparison(shown, bounds=((-3.0, 3.0),) * features, columns=columns)
    pairs = 1 if features == 1 else 3
    assert len(figure.axes) == pairs * panels
    labels = {ax.get_xlabel() for ax in figure.axes}
    assert labels <= set(columns)
    path = plots.write(figure, tmp_path / "deep" / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in path.parent.iterdir()] == ["picture.png"]


def test_two_columns_with_context_show_samples_only() -> None:
    shown = [panel(name, 2, density=False) for name in ("data", "model")]
    figure = plots.comparison(shown, bounds=PLANE, columns=["a", "b"])
    assert len(figure.axes) == 2


def test_nothing_to_show_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        plots.comparison([], bounds=PLANE)


def test_density_and_history_have_pictures(tmp_path) -> None:
    target = toy("moons")
    picture = plots.density(target.log_prob, target.bounds, title="moons", size=20)
    assert picture.axes[0].get_title() == "moons"
    assert picture.axes[1].get_ylabel() == "density"
    plots.write(picture, tmp_path / "density.png")
    picture = plots.history([(0.0, 3.0), (1.0, 2.0)], loss=[(0.0, 4.0)], truth=1.0)
    plots.write(picture, tmp_path / "history.png")
    assert len(picture.axes[0].lines) == 3


def test_without_matplotlib_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "cnf\[plot\]"'):
        plots.history([(0.0, 1.0)])


def test_panels_of_images_wrap():
    panels = {name: torch.zeros(3, 1, 2, 2) for name in "abc"}
    figure = plots.images(panels, columns=2, across=2)
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in shown] == ["a", "b", "c"]
    # two images of 2x2 pixels in a row, each with a line of grey after it
    assert shown[0].images[0].get_array().shape == (6, 6)
    assert len(figure.axes) == 4
