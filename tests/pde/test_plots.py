"""Pictures: what they show is read back from the figures."""

from pathlib import Path

import numpy as np
import pytest

from thalweg.pde import plots
from thalweg.pde.gains import ScalingCurve


def test_truth_and_prediction_share_one_colour_scale() -> None:
    truth = np.random.default_rng(0).normal(size=(2, 8, 8))
    prediction = truth + np.array([0.5, 0.0])[:, None, None]
    figure = plots.field_panels(truth, prediction, ["rho", "p"], ["kg/m^3", "1"], title="NS")
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert len(images) == 6
    assert images[0].get_clim() == images[1].get_clim() == (truth[0].min(), prediction[0].max())
    assert images[2].get_clim() == pytest.approx((-0.5, 0.5))
    assert images[5].get_clim() == (-1, 1)
    assert figure.axes[0].get_title() == "rho [kg/m^3], truth"
    assert np.array_equal(images[0].get_array(), truth[0].T)


def test_rollout_panels_have_one_column_per_frame() -> None:
    fields = np.ones((4, 8, 8))
    figure = plots.rollout_panels(fields, fields, [0.1, 0.2, 0.3, 0.4], "u")
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["t = 0.1", "t = 0.2", "t = 0.3", "t = 0.4"]


def test_spectra_start_at_wave_number_one() -> None:
    truth = np.array([[100.0, 4.0, 1.0]])
    figure = plots.spectra(truth, 2 * truth, 0 * truth, ["u"])
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [1, 2]
    assert line.get_ydata().tolist() == [4, 1]


def test_scaling_curves_show_points_and_fits(tmp_path: Path) -> None:
    curve = ScalingCurve(name="fno", samples=(1, 4, 16), errors=(4, 2, 1))
    figure = plots.scaling_curves([curve])
    fit, points = figure.axes[0].lines
    assert points.get_ydata().tolist() == [4, 2, 1]
    assert np.asarray(fit.get_ydata()).tolist() == pytest.approx([4, 2, 1])
    assert "0.50" in points.get_label()
    path = plots.save(figure, tmp_path / "deep" / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["curve.png"]


def test_error_over_time_draws_each_quantity() -> None:
    figure = plots.error_over_time([0.1, 0.2], {"uv": [1.0, 2.0], "tracer": [3.0, 4.0]})
    assert [line.get_label() for line in figure.axes[0].lines] == ["uv", "tracer"]
    assert figure.axes[0].get_ylim()[0] == 0


def test_diverged_predictions_are_drawn() -> None:
    truth = np.ones((1, 8, 8))
    diverged = np.full((1, 8, 8), np.nan)
    for figure in (
        plots.field_panels(truth, diverged, ["u"]),
        plots.rollout_panels(truth, diverged, [0.1], "u"),
        plots.error_over_time([0.1, 0.2], {"u": [1.0, np.nan]}),
        plots.error_over_time([0.1], {"u": [np.inf]}),
        plots.spectra(np.ones((1, 4)), np.full((1, 4), np.nan), np.full((1, 4), np.nan), ["u"]),
    ):
        figure.canvas.draw()
