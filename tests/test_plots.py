"""The figures, and the table of many runs that they stand beside."""

import itertools
import json
import re
import statistics

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import LineCollection

import processes
from jvitmoe import config as config_lib
from jvitmoe import report
from jvitmoe.config import Config
from jvitmoe.errors import UserError
from jvitmoe.runs import files, groups, plots, results, tables

MODELS = ("merged", "expert 0", "2 random paths", "ensemble")
RESULTS = processes.ROOT / "results"
UNIT = re.compile(
    "^(step|layer|GPUs|(true|predicted) class)$|, (nats|%|ms|points|GB)|^images/s|^time / time of dense|"
    "^distance / size of the mean"
)


@pytest.fixture
def make_run(tmp_path):
    """Returns a maker of run folders: config.json, result.json, metrics.jsonl."""

    def make(name, accuracy=0.5, rate=None, models=MODELS, **fields):
        folder, config = tmp_path / name, Config()
        for path, value in fields.items():
            section, field = path.split("__")
            setattr(getattr(config, section), field, value)
        folder.mkdir()
        (folder / "config.json").write_text(config_lib.dumps(config))
        rows = [
            {"model": model, "accuracy": accuracy, "nll": 2 * accuracy, "ece": 0.1, "images": 10, "parameters": 5}
            for model in models
        ]
        if "2 random paths" in models:
            rows[2] |= {"accuracy_std": 0.25, "flops_per_image": 2.5e6}
        result = {
            "rows": rows,
            "step": 2,
            "seed": config.train.seed,
            "active_parameters": 5,
            "total_parameters": 9,
            "data": "digits",
            "hardware": "1 x cpu",
        }
        (folder / "result.json").write_text(json.dumps(result | {"images_per_second": rate}))
        lines = [{"step": s, "kind": k, "loss": 2.0 / s, "accuracy": s / 9} for s in (1, 2) for k in ("train", "test")]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def read(*folders):
    return groups.group_runs([groups.read_run(folder) for folder in folders])


def test_runs_that_differ_in_the_seed_become_one_group_with_mean_and_deviation(make_run):
    values = (0.5, 0.6, 0.8)
    runs = [
        make_run(f"random_s{s}", v, 100.0 * (s + 1), routing__experts=4, train__seed=s, train__devices=s)
        for s, v in enumerate(values)
    ]
    ((name, group),) = read(*reversed(runs)).items()
    assert name == "random"
    assert [run.folder for run in group] == runs
    rows = groups.group_rows(name, group)
    assert [row["model"] for row in rows] == list(MODELS)
    assert rows[0] == {
        "run": "random",
        "model": "merged",
        "seeds": "3",
        "accuracy": "63.33% ± 15.28%",
        "top5": "-",
        "nll": "1.2667 ± 0.3055",
        "ece": "0.1000 ± 0.0000",
        "parameters": "5",
        "total": "9",
        "FLOPs/image": "-",
        "images/s": "200",
        "hardware": "1 x cpu",
    }
    assert statistics.stdev(values) == pytest.approx(0.15275, abs=1e-5)
    assert rows[2]["FLOPs/image"] == "2.5 M"
    assert rows[2]["accuracy"] == "63.33% ± 15.28%"  # over seeds
    (one,) = read(runs[0]).values()
    assert groups.group_rows("one", one)[2]["accuracy"] == "50.00% ± 25.00%"  # over paths


def test_the_dense_run_of_the_same_config_stands_first(make_run):
    other = make_run("other", routing__experts=4, optim__learning_rate=0.5)
    many = make_run("many", routing__experts=8, routing__pull=0.1)
    dense = make_run("dense", models=("dense",))
    few = make_run("few", routing__experts=4)
    assert list(groups.in_order(read(other, many, dense, few))) == ["other", "dense", "many", "few"]


def test_what_may_not_be_averaged_is_refused(make_run):
    first, again = make_run("a_0"), make_run("a_1", train__keep=7)
    with pytest.raises(UserError, match=r"a_0 and \S+a_1 are both of seed 0; leave one out"):
        read(first, again)
    with pytest.raises(UserError, match="tested as different models"):
        read(first, make_run("a_2", models=("merged",), train__seed=1))
    early = groups.read_run(make_run("a_4", train__seed=1))
    with pytest.raises(UserError, match=r"tested at steps 2 and 1; run jvitmoe.evaluate"):
        groups.check_group("mine", [groups.read_run(first), early._replace(result=early.result | {"step": 1})])
    faster = groups.read_run(make_run("a_3", optim__learning_rate=0.5, train__seed=1))
    with pytest.raises(UserError, match=r"differ in optim.learning_rate \(0.001 and 0.5\); only seeds may differ"):
        groups.check_group("mine", [groups.read_run(first), faster])
    cats, dogs = (make_run(name, train__seed=seed) for seed, name in enumerate(("pets_0", "pets_1"), start=5))
    assert len(read(cats, dogs)) == 1
    for folder, names in ((cats, ["tabby", "lynx"]), (dogs, ["pug", "husky"])):
        (folder / "classes.json").write_text(json.dumps(names))
    assert len(read(cats, dogs)) == 2  # image folders of two sets, whose place is no part of what a run is
    with pytest.raises(UserError, match="trained on other images or classes"):
        groups.check_group("mine", [groups.read_run(cats), groups.read_run(dogs)])
    (first.parent / "more").mkdir()
    with pytest.raises(UserError, match="two groups are called"):
        read(first, make_run("more/a_0", optim__learning_rate=0.5))
    (first / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        read(first)


def test_the_command_names_groups_skips_other_folders_and_writes_both_files(make_run, tmp_path, capsys):
    a, b, dense = make_run("x", train__seed=1), make_run("y", train__seed=2), make_run("z=1", optim__eps=1.0)
    out, other = tmp_path / "report", tmp_path / "demo"
    other.mkdir()  # of `runs/*`
    for _ in range(2):  # the second time the folder is there
        report.main(["report", f"mine={a},{b}", str(dense), str(out), str(other), f"--out={out}"])
        assert f"left out    {other}: no run folder" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(UserError, match=r"holds no result\.json"):
        report.main(["report", str(other), f"--out={out}"])
    text = (out / "report.md").read_text()
    assert text.count("| mine |") == text.count("| z=1 |") == 1 + len(MODELS)
    for picture in ("curves.png", "comparison.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert "| mine | 2 | - | 50.00% ± 0.00% | - | - | 50.00% ± 0.00% | 50.00% | - | - |" in text
    record = json.loads((out / "runs.json").read_text())["mine"]
    assert record["seeds"]["2"] == groups.read_run(b).result
    assert record["config"]["train.batch_size"] == 128
    with pytest.raises(UserError, match="two groups are called 'mine'"):
        report.main(["report", f"mine={a}", f"mine={b}", f"--out={out}"])
    with pytest.raises(UserError, match="both of seed 1"):
        report.main(["report", f"mine={a},{a}", f"--out={out}"])


@pytest.mark.parametrize("names", [["r_seed10", "r_seed11"], ["r-1", "r-2"], ["r_s0", "r_s1"], ["r"], ["r", "r_2"]])
def test_a_group_is_called_what_its_folders_share(names):
    assert groups._shared_name(names) == "r"


def test_numbers_in_three_digits():
    wanted = {999: "999", 5_462_046: "5.46 M", 17.6e9: "17.6 G", 1234: "1.23 k", 1.33e12: "1.33 T", 2e15: "2 P"}
    wanted |= {999.6e6: "1 G", 999.4e6: "999 M"}
    assert {number: tables.quantity(number) for number in wanted} == wanted


@pytest.mark.parametrize("experts", [2, 9])
def test_the_mergeability_figure_and_report(make_run, capsys, experts):
    folder = make_run("run", routing__experts=experts)
    result = results.read_result(folder) | {"step": 3, "seed": 0, "versions": {"jax": "1"}}
    why = {name: [0.1, 0.2] for name in ("spread", "cosine", "difference_cosine", "gap")}
    barrier = {"share": [0.0, 0.5, 1.0], "losses": [[1.0 + e, 3.0, 2.0] for e in range(experts)], "height": 0.5}
    result["mergeability"] = {"images": 10, "layers": [1, 3], **why, "barrier": barrier}
    plots.mergeability(result, folder / files.MERGEABILITY)
    assert (folder / "mergeability.png").read_bytes().startswith(b"\x89PNG")
    results.write_result(folder, result)
    text = (folder / "report.md").read_text()
    assert "![mergeability](mergeability.png)" in text
    assert "| 3 | 0.2000 | 0.2000 | 0.2000 | 0.2000 |" in text
    assert "0.5000 nats" in capsys.readouterr().out


def confused(classes, images=60):
    """Returns a result of a merged model that classifies about 80 % of the images of each class right."""
    rng = np.random.default_rng(0)
    wrong = [0.2 / (classes - 1)] * (classes - 1)
    counts_CC = np.stack([np.roll(rng.multinomial(images, [0.8, *wrong]), c) for c in range(classes)])
    row = {"model": "merged", "accuracy": np.trace(counts_CC) / counts_CC.sum(), "images": int(counts_CC.sum())}
    return {"rows": [{"model": "routed"}, row | {"confusion": counts_CC.tolist()}]}


@pytest.mark.parametrize("classes", [2, 10, 20, 21, 100])
@pytest.mark.parametrize("name", ["", "a [name] $b$ as long as ImageNet's"])
def test_the_confusion_matrix_names_its_classes_and_counts_up_to_20(tmp_path, figures, classes, name):
    if name:
        (tmp_path / "classes.json").write_text(json.dumps([f"{n} {name}" for n in range(classes)]))
    result = confused(classes, 10_000)
    assert plots.confusion(result, tmp_path)
    check(figures[0])
    axes = figures[0].axes[0]
    counts_CC = np.array(result["rows"][1]["confusion"])
    texts = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    cells = {(d, c): str(counts_CC[c, d]) for c, d in zip(*np.nonzero(counts_CC), strict=True)}
    assert texts == (cells if classes <= 20 else {})
    (picture,) = axes.get_images()
    np.testing.assert_allclose(picture.get_array().sum(1), 100)
    assert axes.get_yticklabels()[0].get_text() == ("0 a [name] $b$ as l…" if name else "0")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_a_class_whose_name_the_font_lacks_is_shown_by_number():
    assert plots._axis_names(["Löwe", "中", "a\nb", "\udcff", "x" * 21]) == ["Löwe", "1", "2", "3", "x" * 19 + "…"]


def test_no_confusion_matrix_of_more_than_100_classes_or_of_an_old_result_is_drawn(tmp_path, make_run):
    assert not plots.confusion(confused(101), tmp_path)
    folder = make_run("old")
    assert not plots.confusion(results.read_result(folder), folder)
    assert not [*tmp_path.rglob("*.png")]


def test_the_report_of_a_run_has_a_row_per_class(make_run, tmp_path):
    folder = make_run("run")
    result = results.read_result(folder) | {"seed": 0}
    result["rows"][0]["confusion"] = [[8, 2, 0], [0, 0, 0], [1, 3, 0]]
    (folder / "classes.json").write_text('["cat", "a|b", "dog"]')
    for drawn in (True, False):
        results.write_result(folder, result, drawn)
        text = (folder / "report.md").read_text()
        assert ("![confusion](confusion.png)" in text) == drawn
    assert "| cat | 10 | 80.00% | a\\|b (20.00%) |" in text
    assert "| a\\|b | 0 | - | - |" in text
    assert "| dog | 4 | 0.00% | a\\|b (75.00%) |" in text
    assert results.read_result(folder)["rows"][0]["confusion"] == result["rows"][0]["confusion"]
    assert results.class_names(folder, 4) == ("0", "1", "2", "3")


def test_top5_of_new_runs_stands_beside_old_runs_without_it(make_run):
    old, new = make_run("old"), make_run("new", optim__learning_rate=0.5)
    result = json.loads((new / "result.json").read_text())
    for row in result["rows"]:
        row["top5"] = 0.9
    (new / "result.json").write_text(json.dumps(result))
    rows = [row for name, group in read(old, new).items() for row in groups.group_rows(name, group)]
    assert [row["top5"] for row in rows] == ["-"] * 4 + ["90.00%"] * 4
    assert len({tuple(row) for row in rows}) == 1  # one order of columns


@pytest.fixture
def figures(monkeypatch):
    """Collects each figure where it would be closed."""
    found = []
    monkeypatch.setitem(plt.rcParams, "figure.max_open_warning", 0)  # pyplot keeps all of them until the test ends
    monkeypatch.setattr(plt, "close", found.append)
    yield found
    monkeypatch.undo()
    for figure in found:
        plt.close(figure)


def numbers(*path):
    return json.loads(RESULTS.joinpath(*path).read_text())


def shown_ticks(axis):
    """Returns the tick labels that are drawn."""
    low, high = sorted(axis.get_view_interval())
    labels = [t.label1 for t in axis.get_major_ticks() + axis.get_minor_ticks() if low <= t.get_loc() <= high]
    return [label for label in labels if label.get_text() and label.get_visible()]


def check(figure):
    """The laws of every figure: texts lie in it and apart, ticks are plain, axes have units, marks lie in their axes,
    and the lines of a panel are few and differ."""
    figure.draw_without_rendering()
    texts = [figure._suptitle, *figure.legends]
    for axes in figure.axes:
        texts += [axes.title, axes.get_legend(), *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            ticks = shown_ticks(axis)
            texts += [axis.label, *ticks]
            assert not [tick for tick in ticks if re.search(r"10\^|\de", tick.get_text())]
            if [tick for tick in ticks if re.fullmatch(r"[\d.,%]+", tick.get_text())]:
                assert UNIT.search(axis.label.get_text()), axis.label
        check_marks(axes)
        lines = [line for line in axes.lines if line.get_linestyle() != "None" and np.ptp(line.get_xdata()) > 0]
        looks = {(line.get_color(), line.get_linestyle()) for line in lines}
        assert len(looks) == len(lines) <= 7
    texts = [text for text in texts if text and (not hasattr(text, "get_text") or text.get_text())]
    boxes = [(text, text.get_window_extent().padded(-1)) for text in texts]
    for text, box in boxes:
        assert figure.bbox.containsx(box.x0), text
        assert figure.bbox.containsx(box.x1), text
        assert figure.bbox.containsy(box.y0), text
        assert figure.bbox.containsy(box.y1), text
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


def test_twenty_two_groups_of_curves_and_their_comparison_can_be_told_apart(make_run, tmp_path, figures):
    routers = ("switch", "topk", "expert_choice", "soft")
    routings = [{}, *({"routing__experts": 4, "routing__router": router} for router in routers)]
    for granularity, scope, init, pull in itertools.product(
        ("batch", "sample"), ("shared", "layer"), ("shared", "independent"), (0.0, 0.1)
    ):
        routings.append({"routing__experts": 4, "routing__granularity": granularity, "routing__scope": scope})
        routings[-1] |= {"routing__init": init, "routing__pull": pull}
    routings.append({"routing__experts": 8})
    folders = []
    for number, routing in enumerate(routings):
        for seed in range(2):
            models = MODELS if routing else ("dense",)
            name = f"a_name_as_long_as_real_ones_are_{'abcdefghijklmnopqrstuvwxyz'[number]}_s{seed}"
            folder = make_run(name, 0.95 + 0.002 * number + 0.001 * seed, models=models, train__seed=seed, **routing)
            folders.append(str(folder))
    report.main(["report", *folders, f"--out={tmp_path / 'report'}"])
    curves, comparison = figures
    assert [axes.get_title() for axes in curves.axes[:2]] == ["Training loss", "Test error"]
    labels = [text.get_text() for axes in curves.axes if (key := axes.get_legend()) for text in key.get_texts()]
    assert len(set(labels)) == 22
    assert "2 seeds" in curves._suptitle.get_text()
    (axes,) = comparison.axes
    for (at, radius), (other, _) in itertools.combinations(marks(axes), 2):
        assert np.abs(at - other).max() >= 2 * radius  # no mark hides another
    assert "± sample deviation over 2 seeds" in axes.get_title()
    for figure in figures:
        check(figure)


@pytest.mark.parametrize("accuracies", [(0.961, 0.972), (1.0, 0.1)])
def test_a_few_runs_of_one_seed_make_sound_figures(make_run, tmp_path, figures, accuracies):
    dense = make_run("dense", accuracies[0], models=("dense",))
    random = make_run("random", accuracies[1], routing__experts=4)
    report.main(["report", str(dense), str(random), f"--out={tmp_path / 'report'}"])
    for figure in figures:
        check(figure)
    assert "one seed ± standard error over 10 images" in figures[1].axes[0].get_title()


def test_the_standard_error_of_each_run_is_of_its_own_images(make_run, tmp_path, figures):
    runs = [make_run("few", 0.8, models=("dense",)), make_run("many", 0.8, models=("dense",), optim__eps=1.0)]
    result = json.loads((runs[1] / "result.json").read_text())
    result["rows"][0]["images"] = 1000
    (runs[1] / "result.json").write_text(json.dumps(result))
    report.main(["report", *map(str, runs), f"--out={tmp_path / 'report'}"])
    (axes,) = figures[1].axes
    whiskers = [bars.get_segments()[0] for bars in axes.collections if isinstance(bars, LineCollection)]
    found = [segment[1, 0] - 0.2 for segment in whiskers]
    assert found == pytest.approx([(0.2 * 0.8 / 10) ** 0.5, (0.2 * 0.8 / 1000) ** 0.5])
    assert "standard error over 10 or 1,000 images" in axes.get_title()


def test_the_overview_is_the_mean_over_experts_and_seeds_and_the_worst_layer(make_run):
    runs = [make_run(f"run_s{seed}", models=("expert 0", "expert 1"), train__seed=seed) for seed in (0, 1)]
    group = [groups.read_run(folder) for folder in runs]
    for number, run in enumerate(group):
        for expert, row in enumerate(run.result["rows"]):
            row["accuracy"] = 0.5 + 0.1 * expert + 0.2 * number
        run.result["mergeability"] = {"barrier": {"height": 0.1 + 0.2 * number}, "gap": [0.3, 0.1 + 0.4 * number]}
    row = groups.overview_row("run", group)
    assert (row["experts"], row["barrier"], row["gap"]) == ("65.00%", "0.2000", "0.400")


def test_a_result_is_written_after_its_report_because_it_marks_a_tested_run(make_run, monkeypatch):
    folder = make_run("run")
    result = results.read_result(folder)
    (folder / "result.json").unlink()
    monkeypatch.setattr(results, "show", lambda *_: 1 / 0)  # standard output is full
    with pytest.raises(ZeroDivisionError):
        results.write_result(folder, result)
    assert not (folder / "result.json").exists()
    monkeypatch.undo()
    results.write_result(folder, result)
    assert {"result.json", "report.md"} <= {path.name for path in folder.iterdir()}


def test_a_class_named_by_bytes_that_are_no_text_is_in_the_report(make_run):
    folder = make_run("run")
    result = results.read_result(folder)
    result["rows"][0]["confusion"] = [[1, 0], [0, 1]]
    (folder / "classes.json").write_text(json.dumps(["caf\udce9", "dog"]))
    results.write_result(folder, result)
    assert r"| caf\udce9 | 1 |" in (folder / "report.md").read_text()


def test_a_report_on_a_name_too_long_for_a_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds no result\.json"):
        report.main(["report", "group=" + ",".join(["a" * 90] * 4), f"--out={tmp_path / 'report'}"])


def test_accuracies_of_96_and_97_percent_are_seen_to_differ(tmp_path, figures):
    result = numbers("digits", "runs.json")["batch_shared_shared"]["seeds"]["0"]
    rows = [{"model": f"expert {e}", "accuracy": a, "images": 10_000} for e, a in enumerate((0.961, 0.972))]
    plots.mergeability(result | {"rows": rows}, tmp_path / "mergeability.png")
    axes = figures[0].axes[-1]
    check(figures[0])
    (first, _), (second, _) = marks(axes)
    assert second[0] - first[0] > 0.5 * axes.bbox.width
    assert "10,000 test images" in axes.get_title()
    assert len(axes.containers) == 2  # whiskers


@pytest.mark.parametrize("name", ["benchmark", "benchmark_amx", "benchmark_epyc", "benchmark_fast", "benchmark_small"])
def test_a_panel_of_the_benchmark_shows_one_quantity(tmp_path, figures, monkeypatch, name):
    monkeypatch.syspath_prepend(processes.ROOT / "scripts")
    import benchmark

    rows = numbers(name, "benchmark.json")["rows"]
    benchmark.draw(rows, tmp_path / "benchmark.png")
    check(figures[0])
    speed, time = figures[0].axes
    assert all(re.fullmatch(r"[\d,.]+", text.get_text()) for text in speed.texts)
    assert [at[0] for at in time.transData.inverted().transform([at for at, _ in marks(time)])] == pytest.approx(
        [row["times_dense"] for row in rows]
    )
    benchmark.draw([row for row in rows if row["model"] != "dense"], tmp_path / "alone.png")
    assert len(figures[1].axes) == 1


@pytest.mark.slow
def test_the_pictures_in_results_can_be_drawn_again(tmp_path, figures, monkeypatch):
    monkeypatch.syspath_prepend(processes.ROOT / "scripts")
    import redraw

    monkeypatch.setattr("sys.argv", ["redraw.py", f"--out={tmp_path}"])
    redraw.main()
    committed = {
        str(path.relative_to(RESULTS))
        for path in RESULTS.glob("**/*.png")
        if path.name not in ("curves.png", "sheet.png", "differences.png", "bytes.png")
    }
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("**/*.png")} == committed
    for figure in figures:
        check(figure)


WRONG = {
    "rows": (
        *([], 3, [{"model": "merged"}], [{"model": [], "accuracy": 0.5}], [{"model": "merged", "accuracy": "0.5"}]),
        *([{"model": "merged", "accuracy": 0.5, "confusion": wrong}] for wrong in (3, [], [[0.5]])),
    ),
    "probes": ([], [{"probe": "5-nn", "accuracy": 0.5}]),
    "step": ("2", None, 1e400),
    "active_parameters": ("5", 10**400),
    "total_parameters": ("9", None, []),
    "hardware": (7, ["cpu"], None),
    "images_per_second": ("fast", [1]),
    "mergeability": ([], {"gap": []}, {"gap": [0.1], "barrier": 3}, {"gap": ["x"], "barrier": {"height": 1.0}}),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_result_of_wrong_types_is_refused_in_one_line_by_the_report(make_run, name, value):
    folder = make_run("run")
    result = json.loads((folder / "result.json").read_text()) | {name: value}
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"result\.json is not a result: ") as caught:
        groups.read_run(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_loss_that_is_not_finite_has_no_deviation(make_run):
    runs = [make_run(f"random_s{s}", value, train__seed=s) for s, value in enumerate((0.5, float("inf")))]
    ((name, group),) = read(*runs).items()
    assert "nan" in groups.group_rows(name, group)[0]["nll"]
