"""The configuration: every rule is checked, every message is one line that names value, rule and remedy."""

import importlib.util
import inspect
import json
import operator
import subprocess
import sys
from pathlib import Path

import pytest

from jvitmoe import config as config_lib
from jvitmoe import errors, routing, rules
from jvitmoe.config import Config, DataConfig, InitConfig, ModelConfig, OptimConfig, RoutingConfig
from jvitmoe.errors import ConfigError, UserError

CONFIGS = Path(__file__).parents[1] / "configs"


def refused(**fields: object) -> str:
    """Returns the line that refuses a config with these settings: refused(model__depth=0)."""
    config = Config()
    for path, value in fields.items():
        section, name = path.split("__")
        setattr(getattr(config, section), name, value)
    with pytest.raises(ConfigError) as caught:
        routing.find(rules.check(config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


OUTSIDE = {"above": 0, "at_least": -1, "below": 0, "at_most": 1}  # added to a bound: a value beyond it


@pytest.mark.parametrize("path", config_lib.SETTINGS)
def test_a_setting_is_described_takes_its_default_and_refuses_what_is_outside_of_its_rule(path):
    field = config_lib.SETTINGS[path]
    about, name = field.metadata, path.replace(".", "__")
    assert len(about["doc"]) > 10
    assert "|" not in about["doc"]  # it would end a cell of the table
    assert not rules.broken_rule(field, field.default)
    for bound, limit in about["bounds"].items():
        value = type(field.default)(limit + OUTSIDE[bound])
        assert refused(**{name: value}) == f"config.{path} is {value!r}; it must be {about['rule']}"
    if about["choices"]:
        assert f"is 'zzz'; it must be {about['rule']}" in refused(**{name: "zzz"})
    assert f"config.{path} is None; it must be of type" in refused(**{name: None})
    if isinstance(field.default, float):
        assert refused(**{name: float("nan")}).endswith("must be finite")
    if isinstance(field.default, int):
        assert "must be of type" in refused(**{name: 2.5})


RANDOM, SAMPLE = {"routing__experts": 2}, {"routing__experts": 4, "routing__kind": "sample"}
TUNED = {"model__lora": 2, "init__source": "x", "routing__experts": 4}
FIXED = {"model__positions": "sincos2d"}
PATTERNED = RANDOM | {"routing__kind": "topk", "routing__pattern": ("dense", "experts")}
TOGETHER = [  # settings that do not go together, and the one that is named
    ({"model__width": 63}, "model.width"),
    ({"model__patch": 3}, "model.patch"),
    ({"model__stem": "conv", "model__image_size": 9, "model__patch": 3}, "model.patch"),
    ({"model__stem": "conv", "model__patch": 1}, "model.patch"),
    (FIXED | {"model__width": 6, "model__heads": 3}, "model.width"),
    (FIXED | {"model__image_size": 30_000}, "model.image_size"),
    ({"model__width": 2**31 - 4}, "model.width"),
    ({"model__cls_position": True, "model__pool": "mean"}, "model.cls_position"),
    ({"train__devices": 3}, "train.batch_size"),
    ({"train__devices": 2, "train__expert_devices": 4}, "train.expert_devices"),
    ({"optim__freeze_layers": 13}, "optim.freeze_layers"),
    (RANDOM | {"optim__freeze_layers": 1, "routing__pull": 0.1}, "optim.freeze_layers"),
    ({"optim__schedule": "epoch", "optim__warmup_epochs": 1.0}, "optim.warmup_epochs"),
    ({"data__crop": "resized"}, "data.crop"),
    ({"data__crop_padding": 9}, "data.crop_padding"),
    *(({"data__mean": mean}, "data.mean") for mean in ((), (0.5, 0.5), (float("nan"),), (1,))),
    ({"data__std": (0.0,)}, "data.std"),
    *(({"routing__pattern": kinds}, "routing.pattern") for kinds in (("dense",), ("experts", "mlp"), "experts")),
    ({"routing__pattern": ("dense", "dense", "experts")}, "routing.pattern"),
    (RANDOM | {"routing__kind": "layer", "routing__pattern": ("experts", "experts")}, "routing.pattern"),
    (RANDOM | {"routing__kind": "layer", "routing__part": "model"}, "routing.part"),
    (RANDOM | {"routing__kind": "switch", "routing__part": "model"}, "routing.part"),
    (RANDOM | {"routing__part": "model", "routing__pattern": ("dense", "experts")}, "routing.pattern"),
    ({"routing__kind": "switch"}, "routing.experts"),
    ({"routing__experts": 3, "routing__kind": "sample"}, "train.batch_size"),
    ({"routing__consistency": 1.0}, "routing.consistency"),
    (RANDOM | {"routing__consistency": 1.5, "routing__consistency_loss": "cosub"}, "routing.consistency"),
    (RANDOM | {"routing__kind": "soft", "routing__consistency": 1.0}, "routing.consistency"),
    (SAMPLE | {"routing__consistency": 1.0, "train__expert_devices": 2}, "train.expert_devices"),
    (SAMPLE | {"routing__kind": "switch", "routing__pull": 1.0}, "routing.pull"),
    ({"model__lora": 4}, "init.source"),
    (TUNED | {"model__shared_hidden": 4}, "model.shared_hidden"),
    (TUNED | {"routing__pattern": ("dense", "experts")}, "routing.pattern"),
    (TUNED | {"routing__part": "model"}, "routing.pattern"),
    (TUNED | {"routing__kind": "switch"}, "routing.part"),
    (RANDOM | {"train__devices": 2, "train__expert_devices": 2}, "train.expert_devices"),
    (SAMPLE | {"train__devices": 3, "train__expert_devices": 3, "train__batch_size": 12}, "train.expert_devices"),
    (SAMPLE | {"routing__kind": "switch", "train__accumulate": 2}, "train.accumulate"),
    (RANDOM | {"routing__kind": "topk", "routing__top_k": 3}, "routing.top_k"),
    ({"model__shared_hidden": 4}, "model.shared_hidden"),
    (SAMPLE | {"model__expert_hidden": 4}, "model.expert_hidden"),
    (PATTERNED | {"model__expert_hidden": 4}, "model.expert_hidden"),
    (SAMPLE | {"routing__kind": "soft", "routing__balance_bias": 0.1}, "routing.balance_bias"),
]


@pytest.mark.parametrize(("fields", "named"), TOGETHER)
def test_settings_that_do_not_go_together_are_refused_and_one_is_named(fields, named):
    value = fields.get(named.replace(".", "__"), operator.attrgetter(named)(Config()))
    assert refused(**fields).startswith(f"config.{named} is {value!r}; it m")  # it must, or it makes


def test_a_learned_router_may_pull_its_experts_together_now_and_then():
    routing.find(rules.check(Config(routing=RoutingConfig(experts=4, kind="switch", pull=1.0, pull_every=8))))


def test_what_is_left_of_lora_and_adapters_is_a_plain_vit():
    config = Config()
    assert config.model.plain() == config.model
    config.model.lora, config.model.adapter = 4, 3
    plain = config.model.plain()
    assert (plain.lora, plain.adapter, plain.hidden) == (0, 0, config.model.hidden + 3)


def test_a_whole_number_and_its_float_are_one_setting():
    config = rules.check(Config(optim=OptimConfig(mlp_rate=2)))
    assert repr(config) == repr(Config(optim=OptimConfig(mlp_rate=2.0)))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", ""), ("[]", ""), ('{"train": {"epoch": 3}}', "did you mean 'train.epochs'"), ('{"trian": {}}', "trian")],
)
def test_a_damaged_saved_config_is_one_line_with_the_name_of_its_file(text, message):
    with pytest.raises(ConfigError, match=f"^runs/x/config.json.*{message}.*$"):
        config_lib.loads(text, "runs/x/config.json")


def test_only_what_changes_numbers_counts_as_a_difference():
    old, new = Config(), Config()
    new.train.log_every, new.train.devices, new.data.dir = 99, 4, "elsewhere"
    assert config_lib.differences(old, new) == {}
    new.train.seed = 1
    assert config_lib.differences(old, new) == {"train.seed": (0, 1)}


def test_a_start_is_the_same_wherever_it_lies():
    old, new, other = (Config(init=InitConfig(f"of/{hash_}", hash_)) for hash_ in ("1a", "1a", "2b"))
    new.init.source = "./of/1a"
    assert config_lib.differences(old, new) == {}
    assert {*config_lib.differences(old, other)} == {"init.source", "init.start"}


def test_a_stream_of_pictures_cut_at_random_cannot_become_a_set_on_the_device():
    old, new = (Config(data=DataConfig(stream=True, crop=crop)) for crop in ("resized", "exact"))
    assert rules.check(old) is old
    assert config_lib.differences(old, new) == {"data.crop": ("resized", "exact")}


def test_a_run_may_resume_with_other_files_devices_and_outputs_only():
    """A setting marked free by mistake would change the numbers of a run without a word."""
    train = "devices expert_devices shard accumulate log_every eval_every checkpoint_every"
    names = {"data.dir", "data.stream", *(f"train.{name}" for name in train.split())}
    assert names == config_lib.FREE_ON_RESUME


@pytest.mark.process
def test_the_page_about_settings_is_what_its_command_writes():
    command = [sys.executable, "-m", "jvitmoe.settings"]
    written = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CONFIGS.parent).stdout
    assert written == (CONFIGS.with_name("docs") / "settings.md").read_text()
    assert all(f"| `{path}` |" in written for path in config_lib.flatten(Config()))


def load_experiment(path, monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS))
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "active", "total"),
    [
        ("cifar10_dense", 12_798_490, 12_798_490),
        ("cifar10_random", 12_798_490, 34_964_554),
        ("cifar10_switch", 12_812_938, 34_979_002),
    ],
)
def test_the_original_has_exactly_its_parameters(name, active, total, monkeypatch):
    config = load_experiment(CONFIGS / f"{name}.py", monkeypatch).get_config()
    assert routing.find(config).count_parameters() == (active, total)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_experiment_is_valid_and_opens_with_its_command(path, monkeypatch):
    module = load_experiment(path, monkeypatch)
    config = rules.check(module.get_config())
    json.loads(config_lib.dumps(config))
    assert f"jvitmoe train --config {path.stem}" in module.__doc__
    assert (config.routing.experts > 1) == path.stem.endswith(("random", "switch"))
    if inspect.signature(module.get_config).parameters:
        assert f"{path.stem}:random" in module.__doc__
        assert rules.check(module.get_config("random")).routing.experts > 1
        assert module.get_config("dense") == config


def test_a_message_shows_control_characters_escaped_and_long_values_cut_between_value_and_remedy():
    for value in ("x" * 20_000, "x y " * 5_000, "\x1b[2J" * 5_000):
        message = str(ConfigError(f"config.data.name is {value!r} of {value}\x1b[31m\r\n; it must be 'digits': set it"))
        assert len(message) < 1300
        assert message.isprintable()
        assert message.startswith("config.data.name is ")
        assert message.endswith("\\x1b[31m ; it must be 'digits': set it")
    assert errors.one_line(ValueError("\x1b]0;title\x07\n" + "x" * 20_000)).startswith("ValueError: \\x1b]0;title")
    assert str(UserError("a class 'é 字' in /a path")) == "a class 'é 字' in /a path"


def test_a_setting_that_is_gone_is_read_where_it_did_nothing_and_else_refused():
    old = {"optim": {"outer_rate": 0.0, "outer_momentum": 0.9}, "routing": {"pull_schedule": "constant"}}
    assert config_lib.from_dict(old) == Config()
    original = {"position_rows": 300, "init_layers": "shared"}
    assert config_lib.from_dict({"model": original}) == Config(model=ModelConfig(init="original"))
    with pytest.raises(ConfigError, match=r"config.optim.outer_rate is 0.7; the setting is gone; commit \w+ has it"):
        config_lib.from_dict({"optim": {"outer_rate": 0.7}})
