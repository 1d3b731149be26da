from __future__ import annotations

import dataclasses
import math
import re

import pytest

from tasks.config import FigureSpec, Reported
from tasks.errors import ConfigError
from tasks.render import render_experiment
from tasks.render.figures import draw_figure
from tasks.render.picture import to_png, to_svg

LINES = FigureSpec("lines", "n", "fwd_ms", xlabel="Length", ylabel="Forward", xscale="log", yscale="log")
HEAT = FigureSpec("heatmap", "head", "layer", xlabel="Head", ylabel="Layer", metric="ratio", panel="system")
BARS = FigureSpec("bars", "task", "accuracy", xlabel="Task")
PAPER = [("softmax", "fwd_ms", 64, 1.5), ("softmax", "fwd_ms", 128, 3.0), ("entmax", "fwd_ms", 128, "oom")]


@pytest.fixture
def timings(make_record):
    records = [
        make_record(system, base * n / 64 * (1 + 0.1 * seed), metric="fwd_ms", unit="ms", seed=seed, n=n)
        for system, base in (("softmax", 1.0), ("entmax", 2.0)) for n in (64, 128, 256) for seed in (0, 1)]
    return [*records, make_record("entmax", None, metric="fwd_ms", status="oom", n=512)]


@pytest.fixture
def shares(make_record):
    return [make_record(system, 1 / (1 + layer + head), metric="ratio", unit="", head=head, layer=layer)
            for system in ("softmax", "entmax") for head in range(4) for layer in range(3)]


@pytest.fixture
def scores(make_record):
    return [make_record(system, value, metric="accuracy", unit="%", task=task)
            for system, value in (("softmax", 80.0), ("entmax", 85.0)) for task in ("sst2", "cola")]


def words(figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_lines_have_labels_band_paper_points_and_the_lost_run(make_experiment, timings, metrics):
    figure = draw_figure(make_experiment(rows=PAPER, figure=LINES), timings, "lab", metrics)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Length", "Forward (ms)")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert len(axes.collections) == 2  # the bands
    drawn = {}
    for line in axes.get_lines():
        points = [(x, round(float(y), 6)) for x, y in zip(*line.get_data(), strict=True) if math.isfinite(y)]
        drawn[tuple(zip(*points, strict=True))] = line
    ours = drawn[(64.0, 128.0, 256.0), (1.05, 2.1, 4.2)]
    paper = drawn[(64.0, 128.0), (1.5, 3.0)]
    assert paper.get_alpha() < 1 and paper.get_linestyle() == "None"
    assert paper.get_color() == ours.get_color()
    assert [list(x.get_xdata()) for x in axes.get_lines() if x.get_gid() == "oom"] == [[512.0]]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [
        "Softmax", "Entmax 1.5", "paper", "out of memory"]
    for expected in ("AdaSplash, Table 4: A title", "Scale lab", "hardware Some GPU", "The paper, Table 4"):
        assert expected in words(figure)


def test_a_band_that_leaves_a_logarithmic_axis_is_cut(make_experiment, make_record, metrics):
    values = {1: (1.0, 9.0), 2: (0.01, 2.0), 4: (3.0, 3.5)}  # at 2 the mean less its deviation is negative
    records = [make_record("softmax", v, metric="fwd_ms", unit="ms", seed=s, n=n)
               for n, pair in values.items() for s, v in enumerate(pair)]
    figure = draw_figure(make_experiment(figure=LINES), records, "lab", metrics)
    corners = figure.axes[0].collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(1.005)
    assert {1.0, 2.0, 4.0} <= set(corners[:, 0])


def test_series_differ_in_more_than_colour(make_experiment, timings, metrics):
    lines = draw_figure(make_experiment(figure=LINES), timings, "lab", metrics).axes[0].get_lines()[:2]
    for trait in ("get_color", "get_marker", "get_linestyle"):
        assert len({getattr(line, trait)() for line in lines}) == 2


def test_ten_systems_differ_in_colour_and_in_marker(make_experiment, make_record, metrics):
    systems = {f"s{i}": f"System {i}" for i in range(10)}
    records = [make_record(s, 1.0 + i, metric="fwd_ms", unit="ms", n=64) for i, s in enumerate(systems)]
    axes = draw_figure(make_experiment(figure=LINES, systems=systems), records, "lab", metrics).axes[0]
    shown = axes.get_legend().get_lines()
    assert len({line.get_color() for line in shown}) == len({line.get_marker() for line in shown}) == 10
    assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1  # it hides nothing


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_runs_without_a_result_leave_gaps_and_crosses_above_the_data(make_experiment, make_record, metrics, scale):
    def values(system, results):
        return [make_record(system, r if isinstance(r, float) else None, metric="fwd_ms", unit="ms", n=64 << i,
                            status="ok" if isinstance(r, float) else r) for i, r in enumerate(results)]

    records = [*values("softmax", [1.0, "failed", 30.0, "oom"]), *values("entmax", [2.0, 4.0, "not_applicable", "oom"])]
    spec = dataclasses.replace(LINES, yscale=scale)
    axes = draw_figure(make_experiment(figure=spec), records, "lab", metrics).axes[0]
    softmax = next(line for line in axes.get_lines() if 30.0 in line.get_ydata())
    assert [math.isfinite(y) for y in softmax.get_ydata()] == [True, False, True, False]
    crosses = [line for line in axes.get_lines() if line.get_gid()]
    assert sorted((line.get_gid(), list(line.get_xdata())) for line in crosses) == [
        ("failed", [128.0]), ("oom", [512.0]), ("oom", [512.0])]
    heights = [line.get_ydata()[0] for line in crosses]
    highest = (axes.transData + axes.transAxes.inverted()).transform((64, 30.0))[1]
    assert len(set(heights)) == 2 and highest < min(heights) and max(heights) < 1
    assert [t.get_text() for t in axes.get_legend().get_texts()][2:] == ["out of memory", "failed"]


def test_values_that_crowd_a_logarithmic_axis_stand_in_a_row(make_experiment, make_record, metrics):
    spec = dataclasses.replace(LINES, panel="sweep")
    records = [make_record("softmax", 1.0, metric="fwd_ms", unit="ms", n=n, sweep=sweep)
               for sweep, ns in (("share", (50, 90, 99, 99.9)), ("length", (512, 1024, 2048)),
                                 ("step", range(60, 541, 60))) for n in ns]  # fmt: skip
    share, length, step = draw_figure(make_experiment(figure=spec), records, "lab", metrics).axes
    assert list(share.get_lines()[0].get_xdata()) == [0.0, 1.0, 2.0, 3.0]
    assert [t.get_text() for t in share.get_xticklabels()] == ["50", "90", "99", "99.9"]
    assert (share.get_xscale(), share.get_xlabel()) == ("linear", "Length (evenly spaced)")
    assert list(length.get_lines()[0].get_xdata()) == [512.0, 1024.0, 2048.0]
    assert (length.get_xscale(), length.get_xlabel()) == ("log", "Length")
    assert list(step.get_lines()[0].get_xdata()) == list(range(9))
    assert [t.get_text() for t in step.get_xticklabels()] == [str(n) for n in range(60, 541, 60)]


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0.21, 3.4, ["0.5", "1", "2"]), (0.3, 400.0, ["1", "10", "100"]), (1.1, 1.9, ["1.2", "1.4", "1.6"]),
    (1e-8, 1e-3, [r"$\mathdefault{10^{-6}}$"]),
])
def test_logarithmic_ticks_are_plain_where_short(make_experiment, make_record, metrics, low, high, expected):
    records = [make_record("softmax", v, metric="fwd_ms", unit="ms", n=n) for n, v in ((64, low), (128, high))]
    figure = draw_figure(make_experiment(figure=LINES), records, "lab", metrics)
    figure.canvas.draw()
    axis = figure.axes[0].yaxis
    bottom, top = figure.axes[0].get_ylim()
    shown = [tick.label1.get_text() for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
             if bottom <= tick.get_loc() <= top]
    assert set(expected) <= set(shown)
    assert len([t for t in shown if t]) <= 12


def test_a_system_looks_the_same_whether_or_not_others_ran(make_experiment, timings, metrics):
    alone = [r for r in timings if r.system == "entmax"]
    experiment = make_experiment(figure=LINES)
    both, one = (draw_figure(experiment, records, "lab", metrics).axes[0].get_legend().get_lines()
                 for records in (timings, alone))
    assert one[0].get_color() == both[1].get_color()
    assert one[0].get_marker() == both[1].get_marker()


def test_values_that_a_logarithmic_axis_cannot_show_are_told(make_experiment, make_record, metrics):
    records = [make_record("softmax", v, metric="fwd_ms", unit="ms", n=n) for n, v in ((1, 1.0), (2, 0.0))]
    figure = draw_figure(make_experiment(figure=LINES), records, "lab", metrics)
    assert "1 value of 0 or less not on the logarithmic axis" in words(figure).replace("\n", " ")


def test_heatmap_has_a_panel_a_system_and_one_colour_bar(make_experiment, shares, metrics):
    figure = draw_figure(make_experiment(figure=HEAT), shares, "lab", metrics)
    *panels, bar = figure.axes
    assert [p.get_title() for p in panels] == ["Softmax", "Entmax 1.5"]
    assert [p.get_xlabel() for p in panels] == ["Head", "Head"] and panels[0].get_ylabel() == "Layer"
    assert bar.get_ylabel() == "Non-zero ratio"
    assert [t.get_text() for t in panels[0].get_xticklabels()] == ["0", "1", "2", "3"]
    assert len({p.collections[0].norm for p in panels}) == 1
    written = {tuple(t.get_position()): t.get_text() for t in panels[1].texts}
    assert written[0.5, 0.5] == "1.00" and written[3.5, 2.5] == f"{1 / 6:.2f}"
    assert len(written) == 12


def test_heatmap_says_why_a_cell_is_empty_and_shows_the_papers_beside(make_experiment, make_record, metrics):
    spec = FigureSpec("heatmap", "n", "m", metric="ratio")
    reported = Reported("the paper", ("system", "metric", "n", "m", "value"),
                        (("entmax", "ratio", 1, 1, 0.5),))
    records = [make_record("entmax", 0.25, metric="ratio", unit="", n=1, m=1),
               make_record("entmax", None, metric="ratio", unit="", n=2, m=1, status="failed")]
    experiment = make_experiment(figure=spec, reported=reported)
    panels = draw_figure(experiment, records, "lab", metrics).axes[:2]
    assert [p.get_title() for p in panels] == ["measured", "paper"]
    assert [[t.get_text() for t in p.texts] for p in panels] == [["0.25", "failed"], ["0.50"]]


def test_a_large_heatmap_has_no_numbers_and_few_ticks(make_experiment, make_record, metrics):
    records = [make_record("softmax", math.sin(h + y), metric="ratio", unit="", head=h, layer=y)
               for h in range(64) for y in range(64)]
    axes = draw_figure(make_experiment(figure=HEAT), records, "lab", metrics).axes[0]
    assert not axes.texts
    assert 4 <= len(axes.get_xticklabels()) <= 32


def test_bars_have_labels_values_and_the_papers_number(make_experiment, make_record, scores, metrics):
    reported = Reported("the paper", ("system", "metric", "task", "value"),
                        (("softmax", "accuracy", "sst2", 90.0),))
    records = [*scores, make_record("entmax", None, metric="accuracy", unit="%", task="rte", status="oom")]
    axes = draw_figure(make_experiment(figure=BARS, reported=reported), records, "lab", metrics).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Task", "Accuracy (%)")
    assert sorted(bar.get_height() for bar in axes.patches) == [80.0, 80.0, 85.0, 85.0]
    assert len({bar.get_hatch() for bar in axes.patches}) == 2
    assert sorted(t.get_text() for t in axes.texts) == ["80.0", "80.0", "85.0", "85.0", "OOM"]
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[90.0]]
    assert axes.get_ylim()[1] > 90


def test_bars_show_on_a_logarithmic_axis(make_experiment, scores, metrics):
    spec = dataclasses.replace(BARS, yscale="log")
    axes = draw_figure(make_experiment(figure=spec), scores, "lab", metrics).axes[0]
    low, high = axes.get_ylim()
    assert 0 < low < 80 and high > 85
    corners = [(axes.transData + axes.transAxes.inverted()).transform(bar.get_path().vertices * (1, bar.get_height())
               + (bar.get_x(), 0))[:, 1] for bar in axes.patches]
    assert all(math.isfinite(c) for bar in corners for c in bar)


@pytest.mark.parametrize("kind", ["timings", "shares", "scores"])
def test_the_same_records_give_the_same_bytes(make_experiment, metrics, request, kind):
    spec = {"timings": LINES, "shares": HEAT, "scores": BARS}[kind]
    records = request.getfixturevalue(kind)
    first, second = (draw_figure(make_experiment(figure=spec), records, "lab", metrics) for _ in range(2))
    svg = to_svg(first)
    assert svg == to_svg(second)
    assert to_png(first) == to_png(second)
    assert b"<text" in svg and b"Some GPU" in svg  # text stays text
    assert b"dc:date" not in svg


def test_rendering_again_leaves_every_file_alone(make_experiment, timings, results, store):
    experiment = make_experiment(rows=PAPER, figure=LINES)
    store(experiment, timings)
    first = render_experiment(experiment, results, lambda e: True)
    assert [p.name for p in first] == ["table4.lab.png", "table4.lab.svg"]
    assert all(p.stat().st_size > 5000 for p in first)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in first}
    assert render_experiment(experiment, results, lambda e: True) == first
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in first} == before
    assert not [p for p in results.rglob(".*")]  # no temporary file stays


def test_without_records_the_papers_points_are_drawn_alone(make_experiment, timings, results, store, metrics):
    experiment = make_experiment(rows=PAPER, figure=LINES)
    figure = draw_figure(experiment, [], None, metrics)
    assert "(not run here)" in words(figure)
    assert figure.axes[0].get_lines()[0].get_alpha() is None  # in full strength
    alone = render_experiment(experiment, results, lambda e: True)
    assert [p.name for p in alone] == ["table4.reported.png", "table4.reported.svg"]
    store(experiment, timings)
    render_experiment(experiment, results, lambda e: True)
    assert not any(p.exists() for p in alone)


def test_nothing_is_drawn_of_nothing(make_experiment, make_record, results, store):
    experiment = make_experiment(figure=LINES)
    store(experiment, [make_record("softmax", None, metric="fwd_ms", status="failed", n=64)])
    assert render_experiment(experiment, results, lambda e: True) == []


@pytest.mark.parametrize(("spec", "message"), [
    (FigureSpec("lines", "n", "fwd_ms", yscale="square"), "render.figure.yscale: got 'square'"),
    (FigureSpec("heatmap", "n", "m"), "render.figure.metric: missing"),
    (FigureSpec("lines", "n", "fwd_ms", series="dtype"), "render.figure: several systems share a place"),
])
def test_a_spec_that_does_not_fit_is_named(make_experiment, timings, metrics, spec, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        draw_figure(make_experiment(figure=spec), timings, "lab", metrics)


@pytest.mark.parametrize("panels", [1, 2, 4, 5])
def test_lines_split_into_panels_share_one_scale(make_experiment, make_record, metrics, panels):
    spec = FigureSpec("lines", "n", "fwd_ms", panel="alpha")
    records = [make_record("softmax", float(n * a), metric="fwd_ms", unit="ms", n=n, alpha=a)
               for n in (1, 2) for a in range(1, panels + 1)]
    figure = draw_figure(make_experiment(figure=spec), records, "lab", metrics)
    shown = [a for a in figure.axes if a.get_visible()]
    assert [a.get_title() for a in shown] == [f"alpha = {a}" for a in range(1, panels + 1)]
    assert len({a.get_ylim() for a in shown}) == 1


def test_a_panel_in_which_nothing_applies_is_left_out(make_experiment, make_record, metrics):
    spec = FigureSpec("lines", "n", "fwd_ms", panel="alpha")
    records = [make_record("softmax", value, metric="fwd_ms", unit="ms", status=status, n=1, alpha=alpha)
               for alpha, value, status in ((1, 2.0, "ok"), (2, None, "not_applicable"), (3, None, "oom"))]
    figure = draw_figure(make_experiment(figure=spec), records, "lab", metrics)
    assert [a.get_title() for a in figure.axes if a.get_visible()] == ["alpha = 1", "alpha = 3"]


def test_a_long_title_stays_inside_the_figure(make_experiment, timings, metrics):
    experiment = make_experiment(rows=PAPER, figure=LINES, title="MMMMM WWWWW $a $ " * 12)
    figure = draw_figure(experiment, timings, "lab", metrics)
    figure.set_dpi(150)
    figure.canvas.draw()
    right = max(text.get_window_extent().x1 for text in figure.texts)
    assert right <= figure.bbox.x1
    bottom = min(text.get_window_extent().y0 for text in figure.texts)
    assert bottom >= figure.axes[0].get_window_extent().y1
