"""`jvitmoe report`: which runs are averaged, the table of many runs, the page, and result.json that they come from."""

import html.parser
import json
import os
import statistics

import pytest

import processes
from jvitmoe.commands import report
from jvitmoe.errors import UserError
from jvitmoe.reports import comparison, page, results, run_figures
from jvitmoe.runs import safe_io
from tested_runs import MODELS, write_tested_run

HOSTILE = "<script>&amp;\"'{{vega}}<!--  two "  # a name that is no markup; its spaces count
NAMES = (HOSTILE, "__proto__", "tab\tand\nline", "caf\udce9", " $x_2$ ", "_under", "中文")


@pytest.fixture
def make_run(tmp_path):
    return lambda name, *arguments, **fields: write_tested_run(tmp_path / name, *arguments, **fields)


def read(*folders):
    return comparison.group_runs([comparison.read_run(folder) for folder in folders])


def test_runs_that_differ_in_the_seed_become_one_row_of_mean_and_deviation(make_run):
    values = (0.5, 0.6, 0.8)
    runs = [
        make_run(f"random_s{s}", v, 100.0 * (s + 1), routing__experts=4, train__seed=s, train__devices=s)
        for s, v in enumerate(values)
    ]
    ((name, group),) = read(*reversed(runs)).items()
    assert (name, [run.folder for run in group]) == ("random", runs)
    rows = comparison.group_rows(name, group)
    assert [row["model"] for row in rows] == list(MODELS)
    cells = {"run": "random", "model": "merged", "seeds": "3", "accuracy": "63.33% ± 15.28%", "top5": "-"}
    cells |= {"nll": "1.2667 ± 0.3055", "ece": "0.1000 ± 0.0000", "parameters": "5", "total": "9"}
    assert rows[0] == cells | {"FLOPs/image": "-", "images/s": "200", "hardware": "1 x cpu"}
    assert statistics.stdev(values) == pytest.approx(0.15275, abs=1e-5)
    assert (rows[2]["FLOPs/image"], rows[2]["accuracy"]) == ("2.5 M", "63.33% ± 15.28%")  # over seeds
    (one,) = read(runs[0]).values()
    assert comparison.group_rows("one", one)[2]["accuracy"] == "50.00% ± 25.00%"  # over paths
    diverged = make_run("random_s3", float("inf"), routing__experts=4, train__seed=3)
    ((name, group),) = read(runs[0], diverged).items()
    assert "nan" in comparison.group_rows(name, group)[0]["nll"]


def test_seeds_that_start_from_runs_of_their_own_seeds_are_one_group_and_others_are_not(make_run):
    sources = {1: "runs/half-seed1", 2: "runs/half-seed2", 10: "runs/half-seed10", 3: "runs/half-seed1"}
    runs = [make_run(f"up_s{seed}", train__seed=seed, init__source=source) for seed, source in sources.items()]
    assert [[run.config.train.seed for run in group] for group in read(*runs).values()] == [[1, 2, 10], [3]]
    one = [make_run(f"one_s{seed}", train__seed=seed, init__source="runs/pre-seed0") for seed in (0, 1, 2)]
    (group,) = read(*one).values()
    assert [run.config.train.seed for run in group] == [0, 1, 2]


def test_seeds_of_other_pictures_of_equal_number_and_classes_are_no_seeds_of_one_run(make_run):
    runs = [make_run(f"cats_s{seed}", train__seed=seed) for seed in (0, 1, 2)]
    for run, pictures in zip(runs, ("a1", "b2", "a1"), strict=True):
        (run / "images.json").write_text(json.dumps({"train": 24, "hash of train images and labels": pictures}))
    assert [[run.config.train.seed for run in group] for group in read(*runs).values()] == [[0, 2], [1]]


def test_a_difference_is_said_in_images_and_decided_only_beyond_its_error_and_by_six_images(make_run):
    def line(dense, merged, images=360):
        made = {}
        for kind, rights, experts in (("dense", dense, 1), ("random", merged, 4)):
            made[kind] = []
            for seed, right in enumerate(rights):
                folder = make_run(f"{kind} {dense} {merged} s{seed}", models=(kind,), routing__experts=experts)
                run = comparison.read_run(folder)
                run.config.train.seed = seed
                run.result["rows"][0] |= {"accuracy": right / images, "images": images}
                made[kind].append(run)
        (found,) = comparison.differences({"b": made["random"], "a": made["dense"]})
        return found

    interval = "95 % interval -1.81 to +2.36 (+1 of 360 images, one seed)"
    one = f"b (random) is 0.28 points above a: not decided, {interval}"
    assert line([352], [353]) == one
    assert line([180], [340]).startswith("b (random) is 44.44 points above a: decided, 95 %")
    assert "is 0.28 points above a: not decided" in line([350, 351, 352], [351, 352, 353])  # no deviation
    assert "is 2.50 points above a: decided, 95 % interval +1.81 to" in line([340, 341, 342], [350, 350, 350])
    assert "is 2.50 points below a: not decided" in line([350, 350, 350], [330, 345, 348])
    assert "is 1.94 points below a: not decided" in line([350, 351], [343, 344])  # equal by chance
    assert "is 44.44 points above a: decided" in line([180, 181], [340, 341])
    assert not comparison.differences({"a": [comparison.read_run(make_run("alone"))]})


def test_equal_experts_and_what_is_made_of_them_are_one_row(make_run):
    models = ("merged", "expert 0", "expert 1", "2 random paths", "ensemble")
    run = comparison.read_run(make_run("equal", models=models))
    (run.result["rows"][3])["accuracy_std"] = 0.0
    assert [row["model"] for row in comparison.group_rows("equal", [run])] == ["merged", "2 experts, equal"]
    assert [row["model"] for row in results.result_rows(run.result)] == ["merged", "2 experts, equal"]
    run.result["rows"][2]["nll"] += 0.001
    assert [row["model"] for row in comparison.group_rows("other", [run])] == list(models)


def test_the_best_run_is_marked_only_where_it_is_decided_against_every_other_on_the_same_data(make_run):
    accuracies = {"a": 0.9, "b": 0.1, "c": 0.8}
    runs = [make_run(name, value, optim__eps=1.0 + value) for name, value in accuracies.items()]
    groups = read(*runs)
    assert "(best)" not in str(comparison.overview(groups))  # 10 images: a is not decided against c
    for group in groups.values():
        group[0].result["rows"][0]["images"] = 1000
    assert [row["accuracy"] for row in comparison.overview(groups)] == ["90.00% (best)", "10.00%", "80.00%"]
    groups["c"][0].config.data.name, groups["c"][0].config.data.dir = "folder", "shapes"
    overview = comparison.overview(groups)
    assert [row["data"] for row in overview] == ["digits, 1,000 images"] * 2 + ["folder shapes, 1,000 images"]
    assert "(best)" not in str(overview)


def test_the_dense_run_of_the_same_config_stands_first(make_run):
    other = make_run("other", routing__experts=4, optim__learning_rate=0.5)
    many = make_run("many", routing__experts=8, routing__pull=0.1, optim__mlp_rate=4.0)
    dense, few = make_run("dense", models=("dense",)), make_run("few", routing__experts=4)
    assert list(comparison.in_order(read(other, many, dense, few))) == ["other", "dense", "many", "few"]


def test_the_overview_is_the_mean_over_experts_and_seeds_and_the_worst_layer(make_run):
    runs = [make_run(f"run_s{seed}", models=("expert 0", "expert 1"), train__seed=seed) for seed in (0, 1)]
    group = [comparison.read_run(folder) for folder in runs]
    for number, run in enumerate(group):
        for expert, row in enumerate(run.result["rows"]):
            row["accuracy"] = 0.5 + 0.1 * expert + 0.2 * number
        run.result["mergeability"] = {"barrier": {"height": 0.1 + 0.2 * number}, "gap": [0.3, 0.1 + 0.4 * number]}
    row = comparison.overview_row("run", group)
    assert (row["experts"], row["barrier"], row["gap"]) == ("65.00%", "0.2000", "0.400")


def test_runs_that_may_not_be_averaged_are_apart_and_a_line_says_why_where_their_settings_are_equal(
    make_run, tmp_path, capsys
):
    first = make_run("a_0")
    cats, dogs = (make_run(f"a_{number}", train__seed=number) for number in (5, 6))
    for folder, names in ((cats, ["tabby", "lynx"]), (dogs, ["pug", "husky"])):
        (folder / "classes.json").write_text(json.dumps(names))  # image folders of two sets
    (tmp_path / "more").mkdir()
    others = {
        make_run("a_1", train__log_every=7): "both of seed 0",
        make_run("a_2", models=("merged",), train__seed=1): "different models",
        make_run("a_3", train__seed=1, step=1): "steps 2 and 1",
        make_run("more/a_0", optim__learning_rate=0.5, train__seed=1): "",
        dogs: "",
    }
    for other, fault in others.items():
        two = read(first, other)
        assert len(two) == 2
        assert len({"a_0", "a_0 (2)"} & two.keys()) == (2 if other.name == "a_0" else 1)
        said = capsys.readouterr().out
        assert fault in said if fault else not said


def test_the_command_leaves_out_other_folders_and_says_why(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    a, b, dense = make_run("mine1", train__seed=1), make_run("mine2", train__seed=2), make_run("z=1", optim__eps=1.0)
    out, gone, damaged = tmp_path / "report", tmp_path / "gone", make_run("damaged")
    (damaged / "result.json").write_text("{}")
    interrupted, picture, loop = make_run("interrupted"), tmp_path / "a.png", tmp_path / "loop"
    (interrupted / "result.json").unlink()
    picture.write_bytes(b"")
    loop.symlink_to(loop)
    left_out = gone, damaged, picture, interrupted, loop
    for _ in range(2):  # the second time the folder of the report is there, as in runs/*
        report.main(["report", "~/mine1", "~/mine2", *map(str, (dense, out, *left_out)), f"--out={out}"])
        printed = capsys.readouterr().out
        assert printed.count("left out") == len(left_out)
        assert all(str(path) in printed for path in left_out)
    text = (out / "report.md").read_text()
    assert text.count("| mine |") == text.count("| z=1 |") == 1 + len(MODELS)
    assert "| mine | merged | 50.00% ± 0.00% | 2 | dense | 50.00% ± 0.00% | 50.00% |" in text
    assert f"~/mine2' {dense} " in text  # the command
    for picture in ("curves", "comparison"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![{picture}]({picture}.png)" in text
    record = json.loads((out / "runs.json").read_text())["mine"]
    assert record["seeds"]["2"] == comparison.read_run(b).result
    assert record["config"]["train.batch_size"] == 128
    for arguments in ([str(tmp_path)], [], [str(b), f"--out={a}"], ["a" * 300]):
        with pytest.raises(UserError):
            report.main(["report", f"--out={out}", *arguments])


def test_a_group_that_was_tested_before_its_end_is_named_and_each_test_split_has_its_size(make_run, tmp_path, capsys):
    early, done = make_run("early", optim__eps=1.0, train__epochs=3), make_run("done", train__epochs=1)
    for folder in (early, done):
        (folder / "images.json").write_text(json.dumps({"train": 300}))  # two steps of 128 images
    result = json.loads((early / "result.json").read_text())
    result["rows"][0]["images"] = 12
    safe_io.save_result(early, result)
    report.main(["report", str(early), str(done), f"--out={tmp_path / 'report'}"])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "split of digits, 12 images; digits, 10 images." in text or "10 images; digits, 12 images." in text
    for shown in (text, capsys.readouterr().out):
        assert "early was tested at step 2 of 6." in shown
        assert "done was tested" not in shown


class Seen(html.parser.HTMLParser):
    """What a browser sees of a page: tags, addresses, and texts between tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.texts = set(), [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.add(data)


def test_a_page_needs_nothing_else_and_shows_every_name_as_it_is(make_run, tmp_path):
    runs, out = [make_run(name, optim__eps=1.0 + n) for n, name in enumerate(NAMES)], tmp_path / "report"
    barrier = {"share": [0.0, 1.0], "losses": [[0.1, 0.2], [0.1, float("nan")]], "height": 0.1}
    result = safe_io.read_result(runs[0])
    result["rows"][0]["confusion"] = [[4, 1], [2, 3]]
    result["mergeability"] = {"layers": [0, 1], "gap": [0.1, 0.2], "spread": [0.1, 0.2], "barrier": barrier}
    safe_io.save_result(runs[0], result)
    for run in runs:
        (run / "classes.json").write_text(json.dumps([HOSTILE, "caf\udce9"]))
    (runs[0] / "samples.png").write_bytes(b"\x89PNG")
    code, _, err = processes.call(report.main, *runs, "--html", f"--out={out}")
    assert (code, err) == (0, "")
    text = (out / "report.html").read_text()
    seen = Seen(text)
    assert not seen.tags & {"script", "a", "link", "iframe", "object", "form"}
    assert len(seen.addresses) == 5  # comparison, curves, mergeability, confusion, samples
    assert all(address.startswith("data:image/png;base64,") for address in seen.addresses)
    assert "default-src 'none'" in text
    assert all(
        finding in text for finding in ('alt="Lowest test error: 50.00 %, ', "red: wrong", "rises by 0.1000 nats")
    )
    assert text.index(" is 0.00 points above ") < text.index("<img ") < text.index("<table>") < text.index("<details>")
    assert "<code>routing</code>" in text
    assert text.count("<div") == text.count("<div tabindex=0 ") == text.count("<table>")
    written = {name.encode("utf-8", "backslashreplace").decode() for name in NAMES}
    assert written | {f"{HOSTILE}, seed 0", "optim.eps", f"{float(len(NAMES))}"} <= seen.texts


def test_a_page_embeds_pictures_of_the_run_folder_and_no_target_of_a_link(tmp_path):
    picture, secret = tmp_path / "samples.png", tmp_path / "secret"
    secret.write_bytes(b"\x89PNG secret")
    wrong = (lambda: picture.symlink_to(secret), lambda: os.mkfifo(picture), lambda: picture.write_text("no picture"))
    for make in wrong:
        assert page.own_picture(picture, "") is None
        make()
        assert page.own_picture(picture, "") is None
        picture.unlink()
    picture.write_bytes(b"\x89PNG")
    assert page.own_picture(picture, "") == page.Picture("samples", b"\x89PNG")


def test_a_result_that_is_not_as_it_was_written_is_refused(make_run):
    path = make_run("run") / "result.json"
    text = path.read_text()
    for edit in (("0.5", "0.6"), ("9", "null"), ('"digits"', "3"), ('"checksum"', '"sum"'), ("{", "[")):
        path.write_text(text.replace(*edit))
        with pytest.raises(UserError, match="checksum"):
            comparison.read_run(path.parent)


@pytest.mark.parametrize("value", [None, "x", []])
def test_values_of_other_types_are_left_out_even_where_their_checksum_fits(make_run, tmp_path, value):
    whole, runs = safe_io.read_result(make_run("whole")), [make_run("sound", optim__eps=1.0)]
    row = whole["rows"][0]
    changes = {name: {name: value} for name in ("rows", "seed", "data")}
    changes |= {name: {"rows": [row | {name: value}]} for name in ("accuracy", "images", "parameters")}
    changes |= {"files": {"files": {"metrics.jsonl": value}}, "hardware": {"rows": [{}]}}
    for name, change in changes.items():
        runs.append(make_run(name, optim__eps=2.0))
        safe_io.save_result(runs[-1], whole | change)
    for name, text in (("config.json", '{"train": {"seed": %s}}'), ("metrics.jsonl", '{"step": %s, "kind": "test"}\n')):
        runs.append(make_run(f"of {name}", optim__eps=3.0))
        (runs[-1] / name).write_text(text % json.dumps(value))
    out = processes.succeed(report.main, *runs, "--html", f"--out={tmp_path / 'report'}")
    left = [line for line in out.splitlines() if line.startswith("left out")]
    assert all(f"{run}/" in line for line, run in zip(left, runs[1:-1], strict=True)), left
    assert json.loads((tmp_path / "report" / "runs.json").read_text()).keys() == {"sound", "of metrics.jsonl"}


def test_a_run_whose_seed_data_history_or_classes_are_not_those_of_its_test_is_left_out(make_run, tmp_path):
    out = tmp_path / "report"
    sound, seed, data, history, names = (make_run(name) for name in ("sound", "seed", "data", "history", "names"))
    for run, edit in ((seed, ('"seed": 0', '"seed": 1')), (data, ('"name": "digits"', '"name": "cifar10"'))):
        (run / "config.json").write_text((run / "config.json").read_text().replace(*edit))
    for run in (sound, history, names):
        (run / "classes.json").write_text('["cat", "dog"]')
        safe_io.save_result(run, safe_io.read_result(run) | {"files": safe_io.checksums(run, 2)})
    path = history / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 1.0', '"loss": 9.0'))
    (names / "classes.json").write_text('["dog", "cat"]')
    printed = processes.succeed(report.main, sound, seed, data, history, names, f"--out={out}")
    left = [line for line in printed.splitlines() if line.startswith("left out")]
    faults = seed / "config.json", data / "config.json", history / "metrics.jsonl", names / "classes.json"
    assert all(str(path) in line for line, path in zip(left, faults, strict=True)), left
    assert json.loads((out / "runs.json").read_text()).keys() == {"sound"}
    (history / "metrics.jsonl").unlink()
    assert comparison.read_run(history).result["step"] == 2


def test_the_hardware_of_training_is_that_of_no_later_test(tmp_path):
    trained = {"hardware": "GPU", "versions": {}}
    tested = {"hardware": "laptop", "trained_with": {"jax": "1"}}  # no result of training was left
    several = trained, tested, tested | {"trained_on": "GPU"}, {}
    assert [results.trained_on(result) for result in several] == ["GPU", "", "GPU", ""]
    safe_io.save_result(tmp_path, tested)
    assert results.of_training(tmp_path, {"jax": "1"}) == {"images_per_second": None, "trained_with": {"jax": "1"}}


def test_a_result_is_written_after_its_report_because_it_marks_a_tested_run(make_run, monkeypatch):
    folder = make_run("run")
    result = safe_io.read_result(folder)
    (folder / "result.json").unlink()
    monkeypatch.setattr(results, "show_table", lambda *_: 1 / 0)  # standard output is full
    with pytest.raises(ZeroDivisionError):
        results.write_result(folder, result)
    assert not (folder / "result.json").exists()
    monkeypatch.undo()
    results.write_result(folder, result)
    assert {"result.json", "report.md"} <= {path.name for path in folder.iterdir()}


def test_the_report_of_a_run_has_a_row_per_class_and_why_averaging_works(make_run, capsys):
    folder = make_run("run")
    result = safe_io.read_result(folder)
    result["rows"][0]["confusion"] = [[8, 2, 0], [0, 0, 0], [1, 3, 0]]
    why = {name: [0.1, 0.2] for name in ("spread", "cosine", "difference_cosine", "gap")}
    result["mergeability"] = {"images": 10, "layers": [1, 3], **why, "barrier": {"height": 0.5}}
    (folder / "classes.json").write_text(json.dumps(["caf\udce9", "a|b", "dog"]))
    for drawn in (True, False):
        results.write_result(folder, result, drawn)
        text = (folder / "report.md").read_text()
        assert ("![confusion](confusion.png)" in text) == drawn
    for line in (
        r"| caf\udce9 | 10 | 80.00% | a\|b (20.00%) |",
        r"| a\|b | 0 | - | - |",
        r"| dog | 4 | 0.00% | a\|b (75.00%) |",
        "![mergeability](mergeability.png)",
        "| 3 | 0.2000 | 0.2000 | 0.2000 | 0.2000 |",
    ):
        assert line in text
    assert "0.5000 nats" in capsys.readouterr().out
    equal = result["mergeability"] | {"spread": [0.0, 0.0]}
    results.write_result(folder, result | {"mergeability": equal})
    assert "experts of each layer" not in (said := capsys.readouterr().out)
    assert results.EQUAL in said
    assert results.EQUAL in (folder / "report.md").read_text()
    assert run_figures.of_run(result | {"mergeability": equal}, folder).keys() == {"confusion.png"}
    assert safe_io.read_result(folder)["rows"] == result["rows"]
    assert results.class_names(folder, 4) == ("0", "1", "2", "3")
