"""The figures: each is read from what it draws, and held to the laws of every figure."""

import io
import itertools
import json
import re
from unittest import mock

import archive
import numpy as np
import pytest
import redraw
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

import processes
from jvitmoe.commands import report
from jvitmoe.reports import figures, run_figures
from tested_runs import MODELS, write_tested_run

RESULTS = processes.ROOT / "results"
UNIT = re.compile(
    "^(step|layer|GPUs|(true|predicted) class)$|, (nats|%|ms|points|GB|PFLOP)|^images/s|^time / time of dense|"
    "^distance / size of the mean"
)


@pytest.fixture
def drawn():
    """Collects each figure where it would be written, and writes a picture of one pixel."""
    found, pixel = [], io.BytesIO()
    Image.new("RGBA", (1, 1)).save(pixel, "png")
    with mock.patch.object(figures, "png", lambda figure: found.append(figure) or pixel.getvalue()):
        yield found


def shown_ticks(axis):
    """Returns the tick labels that are drawn."""
    low, high = sorted(axis.get_view_interval())
    labels = [t.label1 for t in axis.get_major_ticks() + axis.get_minor_ticks() if low <= t.get_loc() <= high]
    return [label for label in labels if label.get_text() and label.get_visible()]


def check(figure):
    """The laws of every figure: texts lie in it and apart, ticks are plain and differ, axes have units, marks lie in
    their axes, the lines of a panel are few and differ, and none is a dot."""
    figure.draw_without_rendering()
    texts = [figure._suptitle, *figure.legends]
    for axes in figure.axes:
        texts += [axes.title, axes.get_legend(), *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            ticks = shown_ticks(axis)
            texts += [axis.label, *ticks]
            values = [tick.get_text() for tick in ticks if re.fullmatch(r"[\d.,%]+", tick.get_text())]
            assert not [tick for tick in ticks if re.search(r"10\^|\de", tick.get_text())]
            assert len(set(values)) == len(values)
            assert not values or UNIT.search(axis.label.get_text()), axis.label
        check_marks(axes)
        lines = [line for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xdata())]
        named = [line for line in lines if np.ptp(line.get_xdata()) > 0 and line.get_color() != "0.5"]
        assert len({(line.get_color(), line.get_linestyle()) for line in named}) == len(named) <= 7
    texts = [text for text in texts if text and (not hasattr(text, "get_text") or text.get_text())]
    boxes = [(text, text.get_window_extent().padded(-1)) for text in texts]
    for text, box in boxes:
        assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1), text  # noqa: PT018
        assert figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1), text  # noqa: PT018
    for (text, box), (other, another) in itertools.combinations(boxes, 2):
        assert not box.overlaps(another), (text, other)


def marks(axes):
    """Returns the centre and the radius of every mark, in pixels."""
    for line in axes.lines:
        if line.get_marker() not in ("None", "", None):
            radius = line.get_markersize() / 2 * axes.figure.dpi / 72 * (2**0.5 if line.get_marker() == "D" else 1)
            for at in line.get_transform().transform(line.get_xydata()):
                yield at, radius


def check_marks(axes):
    for at, radius in marks(axes):
        assert (at - radius >= axes.bbox.min - 1).all(), at
        assert (at + radius <= axes.bbox.max + 1).all(), at
    for bars in axes.collections:
        if isinstance(bars, LineCollection):  # whiskers
            for segment in bars.get_segments():
                ends = axes.transData.transform(segment)
                assert (ends >= axes.bbox.min - 1).all()
                assert (ends <= axes.bbox.max + 1).all()


def test_twenty_two_groups_of_curves_and_their_comparison_can_be_told_apart(tmp_path, drawn):
    folders = []
    for number, seed in itertools.product(range(22), range(2)):
        name = tmp_path / f"a_name_as_long_as_real_ones_are_{chr(ord('a') + number)}_s{seed}"
        fields = {"train__seed": seed, "optim__learning_rate": 1e-3 * (number + 1), "routing__experts": 1 + number % 2}
        tested = 0.95 + 0.002 * number + 0.001 * seed, None, MODELS if number % 2 else ("dense",)
        folders.append(write_tested_run(name, *tested, **fields))
    report.main(["report", *map(str, folders), f"--out={tmp_path / 'report'}"])
    comparison, curves = drawn
    assert [axes.get_title() for axes in curves.axes[:2]] == ["Training loss", "Test error"]
    labels = [text.get_text() for axes in curves.axes if (key := axes.get_legend()) for text in key.get_texts()]
    assert len(set(labels)) == 22
    assert curves._suptitle.get_text().startswith("Lowest test error at the end: 77.8 %\na_name_as_long")
    assert "2 seeds" in curves._suptitle.get_text()
    check(curves)
    check(comparison)
    (axes,) = comparison.axes
    for (at, radius), (other, _) in itertools.combinations(marks(axes), 2):
        assert np.abs(at - other).max() >= 2 * radius  # no mark hides another
    assert "± sample deviation over 2 seeds" in comparison._suptitle.get_text()
    colours = {line.get_color() for panel in curves.axes for line in panel.lines}
    assert {line.get_color() for line in axes.lines if len(line.get_xdata()) == 1} == colours  # of runs in both


@pytest.mark.parametrize("accuracies", [(0.961, 0.972), (1.0, 0.1)])
def test_a_few_runs_of_one_seed_make_sound_figures(tmp_path, drawn, accuracies):
    dense = write_tested_run(tmp_path / "$dense_1$\n", accuracies[0], models=("dense",))
    random = write_tested_run(tmp_path / ("_random" * 30), accuracies[1], routing__experts=4)
    report.main(["report", str(dense), str(random), f"--out={tmp_path / 'report'}"])
    for figure in drawn:
        check(figure)
    title = drawn[0]._suptitle.get_text()
    best = "$dense_1$\\n, dense" if accuracies[0] > accuracies[1] else ", merged"
    assert f"{100 * (1 - max(accuracies)):.2f} %" in title
    assert f"{best}\none seed ± standard error over 10 images" in title


def test_the_standard_error_of_each_run_is_of_its_own_images(tmp_path):
    table = {"few": {"dense": [0.8]}, "many": {"dense": [0.8]}}
    (axes,) = (figure := figures.comparison(table, {"few": 10, "many": 1000})).axes
    whiskers = [bars.get_segments()[0] for bars in axes.collections if isinstance(bars, LineCollection)]
    found = [segment[1, 0] - 0.2 for segment in whiskers]
    assert found == pytest.approx([(0.2 * 0.8 / 10) ** 0.5, (0.2 * 0.8 / 1000) ** 0.5])
    assert "standard error over 10 or 1,000 images" in figure._suptitle.get_text()


def test_curves_leave_out_what_was_recorded_once_or_is_not_finite_and_name_their_split(tmp_path):
    def axes_of(**figures_of):
        """Returns the panels of the curves of {kind: {step: figures}}."""
        lines = [{"step": s, "kind": kind, **found} for kind, steps in figures_of.items() for s, found in steps.items()]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        figure = figures.curves({"a": [tmp_path]})
        return figure and figure.axes

    losses = {1: {"loss": 2.0}, 2: {"loss": None}, 3: {"loss": 0.0}, 4: {"loss": "x"}, 5: {}, 6: {"loss": 1e400}}
    (axes,) = axes_of(train=losses, validation={2: {"accuracy": 0.5}})
    assert axes.get_title() == "Training loss"
    assert axes.lines[0].get_xdata().tolist() == [1, 3]
    errors = {1: {"accuracy": 0.0}, 2: {"accuracy": None}, 3: {"accuracy": 1}}
    (axes,) = axes_of(train={1: {"loss": 1.0}}, validation=errors)
    assert axes.get_title() == "Validation error"
    assert axes.lines[0].get_ydata().tolist() == [1, figures.LEAST]
    assert axes_of(train={1: {"loss": 1.0}}, test={1: {"accuracy": 0.5}}) is None


@pytest.mark.parametrize("limits", [(0.24968, 0.24974), (0.525301, 0.525699), (1e-3, 0.9), (0.2, 0.21), (1, 1e5)])
def test_the_ticks_of_a_logarithmic_axis_tell_values_apart(limits):
    figure = Figure()
    axes = figure.subplots()
    axes.set(yscale="log", ylim=limits)
    figures.plain_ticks(axes.yaxis)
    figure.draw_without_rendering()
    ticks = [(label.get_text(), label.get_position()[1]) for label in shown_ticks(axes.yaxis)]
    assert 2 < len({text for text, _ in ticks}) == len(ticks)
    assert [float(text) for text, _ in ticks] == pytest.approx([value for _, value in ticks])


@pytest.mark.parametrize("experts", [2, 9])
def test_mergeability_shows_small_differences_of_accuracy_and_no_mountain_of_rounding_errors(experts):
    losses = [[0.52530 + 1e-5 * e, 0.52570, 0.52548] for e in range(experts)]
    why = {"layers": [1, 3], "spread": [1e-7, 2e-7], "gap": [1e-7, 1e-7]}
    why["barrier"] = {"share": [0.0, 0.5, 1.0], "losses": losses, "height": 0.0004}
    rows = [{"model": f"expert {e}", "accuracy": a, "images": 10_000} for e, a in enumerate((0.961, 0.972))]
    check(figure := run_figures.mergeability({"mergeability": why, "rows": rows}))
    layers, loss, accuracy = figure.axes
    assert np.ptp(loss.get_ylim()) > 50 * np.ptp(losses)
    assert layers.get_ylim()[1] > 1e4 * max(why["spread"])
    (first, _), (second, _) = marks(accuracy)
    assert second[0] - first[0] > 0.5 * accuracy.bbox.width
    assert "10,000 test images" in accuracy.get_title()
    assert loss.get_title() == "Loss from expert to mean: rises by 0.0004 nats"
    colours = {line.get_color() for axes in figure.axes for line in axes.lines}
    assert not colours & set(figures.COLOURS)  # which are those of runs
    why["barrier"]["height"] = 0.0
    loss = run_figures.mergeability({"mergeability": why, "rows": rows}).axes[1]
    assert loss.get_title() == "Loss from expert to mean: no rise"
    assert len(accuracy.containers) == 2  # whiskers


LONG = " a [name] $b$ as long as ImageNet's"


def confused(classes, images=60):
    """Returns a row of a model that classifies about 80 % of the images of each class right."""
    rng, wrong = np.random.default_rng(0), [0.2 / (classes - 1)] * (classes - 1)
    counts_CC = np.stack([np.roll(rng.multinomial(images, [0.8, *wrong]), c) for c in range(classes)])
    row = {"model": "merged", "accuracy": np.trace(counts_CC) / counts_CC.sum(), "images": int(counts_CC.sum())}
    return row | {"confusion": counts_CC.tolist()}


@pytest.mark.parametrize(("classes", "name"), [(2, ""), (20, LONG), (21, ""), (100, LONG)])
def test_the_confusion_matrix_names_its_classes_and_counts_up_to_20(classes, name):
    row = confused(classes, 10_000)
    check(figure := run_figures.confusion(row, [f"{n}{name}" for n in range(classes)]))
    axes, counts_CC = figure.axes[0], np.array(row["confusion"])
    texts = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    cells = {(d, c): str(counts_CC[c, d]) for c, d in zip(*np.nonzero(counts_CC), strict=True)}
    assert texts == (cells if classes <= 20 else {})
    np.testing.assert_allclose(axes.get_images()[0].get_array().sum(1), 100)
    assert np.ptp(axes.get_images()[0].cmap([0.0, 0.5, 1.0])[:, :3], axis=1).max() < 0.01  # greys: a colour is a run
    assert axes.get_yticklabels()[0].get_text() == ("0 a [name]…mageNet's" if name else "0")


def test_no_confusion_matrix_of_more_than_100_classes_or_that_was_not_counted_is_drawn():
    assert run_figures.confusion(confused(101), ["x"] * 101) is None
    assert run_figures.confusion({"model": "routed"}, ()) is None


def test_a_name_is_shown_in_the_font_s_characters_and_cut_in_the_middle():
    assert figures.shown("Löwe é ß Ж Ω") == "Löwe é ß Ж Ω"
    assert figures.shown("中\n😀\udcff") == r"\u4e2d\n😀\udcff"
    assert figures.shown("a" * 15 + "b" * 15, 11) == "aaaaa…bbbbb"


def test_a_picture_of_256_colours_is_the_same_to_the_eye(tmp_path):
    path = tmp_path / "curves.png"
    redraw.draw_curves(redraw.grouped(archive.kept(RESULTS / "routers_again")), tmp_path)
    before, size = np.asarray(Image.open(path).convert("RGB"), int), path.stat().st_size
    redraw.reduce_colours(path)
    apart = np.abs(np.asarray(Image.open(path).convert("RGB")) - before)
    assert path.stat().st_size < size / 2
    assert apart.mean() < 0.5  # of 255
    assert apart[(before == 255).all(-1)].max() == 0  # the background stays white
    reduced = path.read_bytes()
    redraw.reduce_colours(path)
    assert path.read_bytes() == reduced


@pytest.mark.slow
def test_the_pictures_in_results_can_be_drawn_again(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr("sys.argv", ["redraw.py", f"--out={tmp_path}"])
    redraw.main()
    committed = {str(path.relative_to(RESULTS)) for path in RESULTS.glob("**/*.png")}
    without_history = {f"{name}/curves.png" for name in ("cifar10_small", "digits", "digits_demo")}
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("**/*.png")}
    records = {name for name in committed if re.fullmatch(r"study/(\w+/differences|bytes)\.png", name)}
    assert made == committed - without_history - records - {"augment/sheet.png"}
    for figure in drawn:
        check(figure)
