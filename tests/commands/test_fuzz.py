"""Anything at all as a config, a command line or a picture: one clear line, or a run. Never a traceback, never half a
folder.

JVITMOE_FUZZ=10 tries ten times as many inputs.
"""

import collections
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from jvitmoe import config as config_lib
from jvitmoe import routing, rules
from jvitmoe.commands import cli, train
from jvitmoe.config import Config
from jvitmoe.data import pictures
from jvitmoe.data.pictures import Picture
from jvitmoe.errors import UserError
from jvitmoe.models.routers import ROUTERS
from jvitmoe.routing import ROUTINGS
from jvitmoe.training.optimizer import OPTIMIZERS
from processes import call

TIMES = int(os.environ.get("JVITMOE_FUZZ", "1"))
pytestmark = pytest.mark.long if TIMES > 1 else []
DIGITS = str(Path(__file__).parents[2] / "configs" / "digits_random.py")
FIELDS = config_lib.flatten(Config())
CHOICES = {path: field.metadata["choices"] for path, field in config_lib.SETTINGS.items()}


def tries(count: int) -> Callable:
    """Returns Hypothesis's settings: the same inputs each time, so that what passes here passes elsewhere."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count * TIMES, derandomize=True, deadline=None, database=None, suppress_health_check=slow
    )


OUTCOMES: collections.Counter[str] = collections.Counter()


def both_ways(fuzz: Callable[[], None]) -> Callable[[], None]:
    """Returns the test, which fails as well where no input was accepted, or none refused."""

    def test(tally: Callable[[str, int], None]) -> None:
        OUTCOMES.clear()
        fuzz()
        assert OUTCOMES.keys() >= {"accepted", "refused"}
        tally("tries of hostile inputs, a picture in five ways", OUTCOMES.total())
        tally("of these refused in one line, the others sound", OUTCOMES["refused"])

    test.__name__ = fuzz.__name__
    return test


def assert_one_line(text: str, about: str = "") -> None:
    assert len(text.splitlines()) == 1, text
    assert about in text


# What a run may be made of, mostly sound, so that many of them train: sizes that are small, do not go together, or are
# absurd. Every other setting has the values at the edges of its rule.
CHOSEN = {
    "data.validation": (0, 0, 100, 1436, 1437),
    "data.crop": ("exact", "centre"),
    "data.mean": ((0.5,), (0.0,), (0.1, 0.2)),
    "data.std": ((0.5,), (1.0,), (0.0,)),
    "model.width": (4, 8, 6),
    "model.hidden": (1, 8),
    "model.depth": (1, 2, 2),
    "model.heads": (1, 2, 3),
    "model.patch": (2, 4, 8, 3),
    "model.init": ("independent", "original"),
    "routing.experts": (1, 2, 2, 4),
    "routing.kind": (*ROUTINGS, *ROUTINGS, *ROUTERS),
    "optim.name": tuple(OPTIMIZERS),
    "optim.learning_rate": (1e-3, 1e-3, 1e38, 1e-300),
    "optim.freeze_layers": (0, 0, 1, 2, 3),
    "train.epochs": (1, 1, 2, 2**31 - 1),
    "train.batch_size": (400, 400, 1, 1437, 2000),
    "train.seed": (0, 2**31 - 1),
    "train.devices": (1, 1, 2, 0),
    "train.expert_devices": (1, 1, 2),
    "train.accumulate": (1, 2, 3),
    **dict.fromkeys(("train.log_every", "train.eval_every", "train.checkpoint_every"), (1, 2, 2**31 - 1)),
}
WITHIN = {"above": (1, 1e-300), "at_least": (0, 0.0), "below": (-1, -1e-3), "at_most": (0, 0.0)}  # of int, of float


def edges(path: str) -> tuple[object, ...]:
    """Returns a setting's default and the values at the edges of its rule."""
    default, about = FIELDS[path], config_lib.SETTINGS[path].metadata
    if isinstance(default, bool):
        return False, True
    bounds = about["bounds"].items() if path.startswith(("data.", "routing.", "optim.", "train.")) else ()
    return (default, *about["choices"], *(limit + WITHIN[name][isinstance(default, float)] for name, limit in bounds))


CHOSEN |= {path: edges(path) for path in FIELDS if path not in (*CHOSEN, "data.name", "data.dir", "init.source")}

scalars = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 10**400, 1e300, 5e-324, -0.0]),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=20),
    st.sampled_from(sorted({option for options in (*CHOICES.values(), CHOSEN["routing.kind"]) for option in options})),
)
sound = st.sampled_from([(name, value) for name, found in CHOSEN.items() for value in found])
values = scalars | st.lists(scalars | st.just("experts") | st.just("dense"), max_size=4) | st.just({})


anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)
overrides = st.lists(sound | st.tuples(st.sampled_from(sorted(FIELDS)), values), min_size=1, max_size=3)


def as_json(pairs: list[tuple[str, object]]) -> str:
    nested: dict = {}
    for path, value in dict(pairs).items():
        section, _, name = path.partition(".")
        nested.setdefault(section, {})[name] = value
    return json.dumps(nested)


@pytest.mark.slow
@both_ways
@tries(500)
@given(overrides.map(as_json) | st.text(max_size=60) | anything.map(json.dumps))
@example(as_json([("model.width", 2**31 - 1), ("model.heads", 1), ("routing.experts", 2**31 - 1)]))
@example(as_json([("model.depth", 2**31 - 1)]))
@example(as_json([("train.seed", 10**400)]))
@example(as_json([("optim.learning_rate", 10**400)]))
@example(as_json([("routing.pattern", [["experts"]])]))
@example('{"__class__": {"train": {}}}')
@example('{"__dict__": {}, "expert_layers": {}}')
@example("[" * 100_000)
@example("9" * 5_000)
def test_any_text_as_a_config_json_is_refused_in_one_line_or_makes_a_model(text):
    before = {name: value for name, value in vars(Config).items() if not name.startswith("_abc")}
    try:
        config = rules.check(config_lib.loads(text, "config.json"))
        active, total = routing.find(config).count_parameters()
    except UserError as error:
        assert_one_line(str(error))
        OUTCOMES["refused"] += 1
    else:
        OUTCOMES["accepted"] += 1
        assert rules.check(config_lib.loads(config_lib.dumps(config), "config.json")) == config
        assert 0 < active <= total
    assert {name: value for name, value in vars(Config).items() if not name.startswith("_abc")} == before


words = st.one_of(
    st.text(max_size=20),
    sound.map(lambda pair: f"--config.{pair[0]}={pair[1]}"),
    st.tuples(st.sampled_from(sorted(FIELDS)), scalars).map(lambda pair: f"--config.{pair[0]}={pair[1]}"),
    st.tuples(st.text(max_size=12), scalars).map(lambda pair: f"--{pair[0]}={pair[1]}"),
)


@both_ways
@tries(300)
@given(st.lists(words, max_size=4))
@example(["--config.data.dir=a\nb", "--config.data.name=folder"])
def test_any_command_line_is_refused_in_one_line_or_gives_a_config(arguments):
    accepted = []

    def main(argv: list[str]) -> None:
        accepted.append(cli.experiment(cli.parse(argv, train.define_flags, config=True)))

    code, out, err = call(main, f"--config={DIGITS}", *arguments)
    OUTCOMES["refused" if code else "accepted"] += 1
    if code == 0:
        assert err == ""
        assert accepted or out.startswith("usage: ")  # --help
    else:
        assert code == 2
        assert err.startswith("error: ")
        assert_one_line(err)


TINY = {
    **{"model.width": 8, "model.depth": 1, "model.patch": 4, "routing.experts": 2, "optim.warmup_epochs": 0.0},
    **{"train.batch_size": 400, "train.epochs": 1},
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's
@both_ways
@tries(4)
@given(
    st.lists(st.sampled_from(sorted(CHOSEN)), min_size=2, max_size=8, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: st.sampled_from(CHOSEN[name]) for name in names})
    )
)
@example({"data.flip": True, "train.ema": 0.9})
@example({"model.width": 8, "model.heads": 3})
def test_any_mix_of_settings_trains_or_is_refused_in_one_line_and_leaves_a_whole_folder_or_none(chosen):
    overrides = [f"--config.{name}={value}" for name, value in {**TINY, **chosen}.items()]
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        arguments = (f"--config={DIGITS}", f"--workdir={workdir}", *overrides)
        code, _, err = call(train.main, *arguments)
        OUTCOMES["refused" if code else "accepted"] += 1
        if code == 0:
            assert err == ""
            assert json.loads((workdir / "result.json").read_text())["rows"]
            return
        assert code == 2, err
        assert_one_line(err)
        if workdir.exists():  # it began, and became sick: the folder can be used again
            assert "must be finite" in err
            rules.check(config_lib.loads((workdir / "config.json").read_text(), "config.json"))
            assert not [path for path in workdir.iterdir() if path.name.endswith(".part")]


def encoded() -> list[bytes]:
    """Returns one small picture of each format and several modes."""
    random, found = np.random.default_rng(0), []
    for kind, modes in {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "GIF": ("P", "RGB"),
        "TIFF": ("1", "L", "RGB", "RGBA", "I;16", "F"),
        "BMP": ("1", "L", "RGB"),
        "PPM": ("L", "RGB"),
        "WEBP": ("RGB", "RGBA"),
    }.items():
        for mode in modes:
            colours = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8))
            image = deep if mode == "I;16" else colours.convert(mode)
            file = io.BytesIO()
            image.save(file, kind)
            found.append(file.getvalue())
    return found


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """Draws a picture with some of its bytes changed, left out or put in, or cut off; or any bytes at all."""
    content = bytearray(draw(st.sampled_from(PICTURES)))
    for kind in draw(st.lists(st.sampled_from(["flip", "set", "lose", "add", "cut"]), max_size=4)):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        if kind == "add" or not content:
            content[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            content[at] = draw(st.sampled_from([0, 1, 127, 128, 255]))
        else:
            del content[at : None if kind == "cut" else at + draw(st.integers(1, 8))]
    return bytes(content)


PICTURES = encoded()


@both_ways
@tries(500)
@given(hostile() | st.binary(max_size=60))
@example(b"")
@example(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(ran) = quit\n")
@example(b"P6 99999 99999 255\n")
@example(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\0\0\0")
def test_any_bytes_as_a_picture_are_pixels_of_the_right_shape_or_one_line_that_names_the_file(content):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "some picture.png"
        path.write_bytes(content)
        for read in (
            lambda: pictures.read(path, 8, 3),
            lambda: pictures.exact(Picture(str(path), path), (8, 8, 3), "all are 8x8"),
            lambda: pictures.exact(Picture(str(path), content), (8, 8, 1), "all are 8x8"),
            lambda: pictures.centre_crop(Picture(str(path), content), 8, 3),
            lambda: pictures.random_crop(Picture(str(path), content), 8, 3, 0),
        ):
            try:
                pixels = read()
            except UserError as error:
                assert_one_line(str(error), path.name)
                OUTCOMES["refused"] += 1
            else:
                OUTCOMES["accepted"] += 1
                assert pixels.dtype == np.uint8
                assert pixels.shape in ((8, 8, 3), (8, 8, 1))
