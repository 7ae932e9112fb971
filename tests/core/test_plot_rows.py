"""The heat map, the histogram and the comparison show the right numbers."""

import numpy as np
import pytest

from autoclip_core import ClipLog, Fixed, Quantile, decide, replay
from autoclip_core.planning.plot import draw_comparison, draw_replay


def log_of_rows(rows, steps=100, every=1):
    log = ClipLog([f"layer.{row}" for row in range(rows)], every=every)
    for step in range(steps):
        norms = np.where(np.arange(rows) == step % rows, 4.0, 1.0)
        observed = np.arange(rows) != 1
        log.record(
            decide(Fixed(2.0), Fixed(2.0).init(rows), norms, observed=observed)[1]
        )
    return log


def test_the_heat_map_shows_each_row_s_rate(tmp_path):
    figure = log_of_rows(4).plot_rows(tmp_path / "rows.png")
    axes, bar = figure.axes
    cells = axes.collections[0].get_array()
    assert cells.shape == (4, 100)
    assert cells[0, :8].tolist() == [100, 0, 0, 0, 100, 0, 0, 0]
    assert cells.mask[1].all()  # never observed
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        f"layer.{row}" for row in range(4)
    ]
    assert "%" in bar.get_ylabel()
    assert "step" in axes.get_xlabel()
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_the_heat_map_shows_the_40_most_clipped_rows():
    figure = log_of_rows(60, steps=90).plot_rows()
    assert figure.axes[0].collections[0].get_array().shape == (40, 90)
    assert "the 40 most clipped" in figure.axes[0].get_title()


def test_steps_that_were_not_recorded_still_count_on_the_axis():
    figure = log_of_rows(4, steps=100, every=10).plot_rows()
    assert figure.axes[0].get_xlim() == (0, 100)


def test_metrics_of_one_step_in_ten_count_on_the_axis():
    log = ClipLog()
    for step in range(1, 100, 10):
        metrics = {"clip/norm": 5.0, "clip/threshold": 2.0, "clip/steps": step}
        for row, norm in {"encoder": 4.0, "head": 1.0}.items():
            metrics |= {f"clip/norm/{row}": norm, f"clip/threshold/{row}": 2.0}
            metrics |= {f"clip/scale/{row}": min(1.0, 2.0 / norm)}
        log.record(metrics)
    axes = log.plot_rows().axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["encoder", "head"]
    assert axes.collections[0].get_array()[:, 0].tolist() == [100.0, 0.0]
    assert axes.get_xlim() == (0, 90)


def test_a_heat_map_without_rows_is_refused():
    log = ClipLog()
    log.record(norm=1.0, threshold=1.0)
    with pytest.raises(ValueError, match="steps of several rows, got none"):
        log.plot_rows()


def test_the_histogram_counts_every_norm(tmp_path):
    log = ClipLog()
    norms = [*np.exp(np.random.default_rng(0).normal(size=500)), 0.0, float("nan")]
    for norm in norms:
        log.record(norm=norm, threshold=2.0)
    axes = log.plot_histogram(tmp_path / "hist.svg").axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 500
    assert axes.lines[0].get_xdata()[0] == 2.0
    above = 100 * np.mean(np.array(norms[:500]) > 2.0)
    assert f"{above:.3g} % above" in axes.get_legend().get_texts()[0].get_text()
    assert "2 of 0, NaN" in axes.get_title()
    assert ClipLog().plot_histogram() is not None


def test_a_replay_is_drawn_like_a_log(tmp_path):
    norms = [1.0] * 50 + [9.0] + [1.0] * 50
    figure = draw_replay(replay(norms, Fixed(2.0)), tmp_path / "a.png")
    assert "spikes caught: 1 of 1" in figure.axes[0].get_title()


@pytest.mark.parametrize("steps", [1, 500, 5000])
def test_a_comparison_has_a_line_and_a_strip_for_each_policy(tmp_path, steps):
    norms = np.exp(np.random.default_rng(0).normal(size=steps))
    policies = {"fixed": Fixed(1.5), "quantile": Quantile(0.5, history_length=50)}
    reports = {name: replay(norms, policy) for name, policy in policies.items()}
    figure = draw_comparison(reports, tmp_path / "a.png")
    above, below, _ = figure.axes
    labels = [line.get_label() for line in above.lines]
    assert labels[-2:] == ["fixed", "quantile"]
    assert set(above.lines[-2].get_ydata()) == {1.5}
    rates = below.collections[0].get_array()
    assert rates.shape[0] == 2
    if steps > 1:
        assert rates[0].mean() == pytest.approx(100 * np.mean(norms > 1.5), abs=1)


def test_a_thinned_log_still_shows_its_spikes(monkeypatch):
    from autoclip_core.record import store as log_store

    for name, value in dict(RECENT=256, BLOCK=128, INTERVALS=64, PENDING=32).items():
        monkeypatch.setattr(log_store, name, value)
    log = ClipLog()
    for step in range(8000):
        log.record(norm=500.0 if step == 3333 else 1.0, threshold=2.0)
    axes = log.plot().axes[0]
    drawn = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    assert drawn["clipped"].get_ydata().tolist() == [500.0]
    assert abs(drawn["clipped"].get_xdata()[0] - 3333) <= 8


def test_the_histogram_of_several_rows_has_no_threshold():
    policy = Fixed(2.0)
    for rows, lines in [(1, 1), (2, 0)]:
        log = ClipLog()
        for norm in [1.0, 3.0]:
            log.record(decide(policy, policy.init(rows), [norm] * rows)[1])
        assert len(log.plot_histogram().axes[0].lines) == lines


def test_a_histogram_can_show_norms_of_any_size(tmp_path):
    log = ClipLog()
    for norm in [1e300, 1e-300, 1.0]:
        log.record(norm=norm, threshold=2.0)
    log.plot_histogram(tmp_path / "wide.png")


def test_a_dollar_sign_in_a_name_is_drawn_as_it_is(tmp_path):
    log = ClipLog([r"$\frac$", "b"])
    log.record(decide(Fixed(2.0), Fixed(2.0).init(2), [1.0, 3.0])[1])
    log.plot_rows(tmp_path / "rows.png")
