"""The configuration: every rule is checked, every message is one line that names value, rule and remedy."""

import copy
import dataclasses
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jvitmoe import cli, errors, settings
from jvitmoe import config as config_lib
from jvitmoe.config import Config, DataConfig, ModelConfig, RoutingConfig
from jvitmoe.errors import ConfigError, UserError
from jvitmoe.experts import cost

CONFIGS = Path(__file__).parents[1] / "configs"
RESULTS = CONFIGS.with_name("results")


def set_field(config: Config, path: str, value: object) -> Config:
    section, name = path.split(".")
    setattr(getattr(config, section), name, value)
    return config


def test_defaults_obey_their_own_rules():
    Config().validate()


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("routing.experts", 0, "must be greater than 0"),
        ("model.depth", -1, "must be greater than 0"),
        ("model.image_size", 0, "must be greater than 0"),
        ("train.batch_size", 0, "must be greater than 0"),
        ("data.crop_padding", -2, "must be at least 0"),
        ("train.devices", -1, "must be at least 0"),
        ("optim.learning_rate", 0.0, "must be greater than 0"),
        ("optim.learning_rate", float("nan"), "must be finite"),
        ("optim.learning_rate", float("inf"), "must be finite"),
        ("model.dropout", 1.0, "must be at least 0 and below 1"),
        ("train.label_smoothing", -0.1, "must be at least 0 and below 1"),
        ("model.width", 63, "must be a multiple of model.heads, which is 4"),
        ("model.patch", 3, "must divide model.image_size, which is 8"),
        ("model.position_rows", 5, "must be 0 or at least the number of patches, which is 16"),
        ("model.depth", 2.0, "must be of type int"),
        ("data.flip", 1, "must be of type bool"),
        ("train.devices", 3, "must be a multiple of train.devices, which is 3"),
        ("optim.warmup_epochs", -1, "must be at least 0"),
        ("routing.init", "sharde", "did you mean 'shared'?"),
        ("routing.router", "switch", "must be 'random', or have routing.experts above 1"),
        ("routing.capacity", 0.0, "must be greater than 0"),
        ("routing.consistency", 1.0, "must be 0 with one expert"),
        ("routing.consistency_loss", "kl", "must be one of 'adamix', 'thor', 'cosub'"),
        ("routing.pull", 1.5, "must be at least 0 and at most 1"),
        ("model.depth", 10_001, "must be greater than 0 and at most 10,000"),
        ("routing.tie_last", 1.0, "must be at least 0 and below 1"),
        ("routing.learning_rate", 0.0, "must be greater than 0"),
        ("init.noise", 0.1, "must be 0 without an init.source"),
        ("init.noise", -0.1, "must be at least 0"),
        ("train.distil_last", 1.0, "must be at least 0 and below 1"),
        ("model.lora", 4, "must name a trained ViT for model.lora"),
        ("model.adapter", -1, "must be at least 0"),
        ("model.norm_epsilon", 0.0, "must be greater than 0"),
        ("routing.pattern", ("dense",), "with 'experts' in it"),
        ("routing.pattern", ("experts", "mlp"), "must be a tuple of 'experts' and 'dense'"),
        ("routing.pattern", ("dense", "dense", "experts"), "must have a length that divides model.depth, which is 4"),
        ("routing.pattern", "experts", "must be of type tuple"),
        ("routing.scope", "token", "must be one of 'shared', 'layer'"),
        ("model.norm", "rms", "must be one of 'pre', 'post'"),
        ("data.crop", "resized", "must be 'pad' or 'centre' for sets that live on the device"),
        ("data.erase", 1.5, "must be at least 0 and at most 1"),
        ("data.mixup", -0.1, "must be at least 0"),
        ("data.plain_last", 1.0, "must be at least 0 and below 1"),
        ("data.mean", (), "must be one number or 1, one per channel, each from 0 to 1"),
        ("data.mean", (0.5, 0.5), "must be one number or 1, one per channel"),
        ("data.mean", (float("nan"),), "each from 0 to 1"),
        ("data.mean", (1,), "must be of type tuple of float"),
        ("data.std", (0.0,), "each from 0.001 to 1"),
    ],
)
def test_a_value_that_breaks_its_rule_is_named_with_the_rule(path, value, rule):
    with pytest.raises(ConfigError) as caught:
        set_field(Config(), path, value).validate()
    message = str(caught.value)
    assert rule in message
    assert "\n" not in message
    assert repr(value) in message or path in ("train.devices", "model.lora")


def test_rules_across_fields_hold():
    config = Config()
    config.routing.tie_last, config.train.distil_last = 0.5, 0.1
    with pytest.raises(ConfigError, match=r"routing\.tie_last is 0\.5; it must be 0 with train\.distil_last"):
        config.validate()
    config = Config()
    config.routing.experts, config.model.lora, config.init.source, config.init.noise = 2, 4, "run", 0.1
    with pytest.raises(ConfigError, match=r"init\.noise is 0\.1; it must be 0 .* LoRA or adapters"):
        config.validate()
    config = Config()
    config.routing.experts, config.routing.granularity = 3, "sample"
    with pytest.raises(ConfigError, match=r"train\.batch_size is 128; it must be a multiple of routing\.experts, 3"):
        config.validate()
    config = Config()
    config.optim.schedule, config.optim.warmup_epochs = "epoch", 1.0
    with pytest.raises(ConfigError, match=r"warm-up needs optim\.schedule=step"):
        config.validate()
    config = Config()
    config.model.positions, config.model.width, config.model.heads = "sincos2d", 6, 3
    with pytest.raises(ConfigError, match="multiple of 4"):
        config.validate()


def test_a_learned_router_refuses_a_pull_that_makes_its_experts_equal():
    config = Config(routing=RoutingConfig(experts=4, router="switch", pull=1.0))
    with pytest.raises(ConfigError, match=r"routing\.pull is 1\.0; it must be below 1 with a learned router"):
        config.validate()
    config.routing.pull_every = 8
    config.validate()


def test_lora_and_adapters_go_with_random_routing_over_whole_mlps():
    for field, value in (("router", "switch"), ("pattern", ("dense", "experts")), ("shared_layer", "up")):
        config = Config()
        config.model.lora, config.init.source, config.routing.experts = 2, "x", 4
        config.validate()
        setattr(config.routing, field, value)
        with pytest.raises(ConfigError, match=r"for model\.lora and model\.adapter"):
            config.validate()


def test_what_is_left_of_lora_and_adapters_is_a_plain_vit():
    config = Config()
    assert config.model.plain() == config.model
    config.model.lora, config.model.adapter = 4, 3
    plain = config.model.plain()
    assert (plain.lora, plain.adapter, plain.hidden) == (0, 0, config.model.hidden + 3)


def test_json_round_trip_is_exact():
    config = Config()
    config.routing.experts, config.optim.learning_rate = 7, 1.2345678901234567e-4
    config.routing.pattern = ("dense", "experts")
    assert config_lib.loads(config_lib.dumps(config), "x") == config


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*config.json")), ids=lambda path: path.stem)
def test_configs_that_older_versions_kept_with_their_results_are_read(path):
    text = path.read_text()
    config, kept = config_lib.loads(text, path.name).validate(), json.loads(text)
    assert config.model.width == kept["model"]["width"]
    if "norm_epsilon" not in kept["model"]:
        assert config.model.norm_epsilon == 1e-5


def test_what_an_older_version_upcycled_is_an_init_source():
    fresh = {"routing": {"experts": 4, "init": "shared", "upcycle_from": ""}}
    assert config_lib.loads(json.dumps(fresh), "x").validate().init.source == ""
    old = {"routing": {"experts": 4, "init": "upcycled", "upcycle_from": "runs/dense"}}
    config = config_lib.loads(json.dumps(old), "x").validate()
    assert (config.routing.init, config.init.source) == ("shared", "runs/dense")
    assert config_lib.loads(config_lib.dumps(config), "x") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not the config of a run"),
        ("[]", "is not the config of a run"),
        ('{"train": {"epoch": 3}}', "did you mean config.train.epochs"),
        ('{"trian": {}}', "config.trian is not a field"),
        ('{"validate": {"x": 1}}', "config.validate is not a field"),
    ],
)
def test_a_damaged_saved_config_is_one_clear_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config_lib.loads(text, "runs/x/config.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("runs/x/config.json")


def test_only_what_changes_numbers_counts_as_a_difference():
    old, new = Config(), Config()
    new.train.log_every, new.train.devices, new.data.dir = 99, 4, "elsewhere"
    assert config_lib.differences(old, new) == {}
    new.train.seed = 1
    assert config_lib.differences(old, new) == {"train.seed": (0, 1)}


def test_a_stream_of_pictures_cut_at_random_cannot_become_a_set_on_the_device():
    config = Config(data=DataConfig(stream=True, crop="resized")).validate()
    config.data.stream = False
    with pytest.raises(ConfigError, match=r"'resized' needs data\.stream=True"):
        config.validate()
    old = Config(data=DataConfig(stream=True, crop="resized"))
    new = Config(data=DataConfig(stream=True))
    assert config_lib.differences(old, new) == {"data.crop": ("resized", "pad")}


def test_a_run_may_resume_with_other_files_devices_and_outputs_only():
    """A setting marked free by mistake would change the numbers of a run without a word."""
    train = "devices expert_devices shard accumulate platform log_every eval_every checkpoint_every keep stall_minutes"
    names = {"data.dir", "data.stream", *(f"train.{name}" for name in train.split())}
    assert names == config_lib.FREE_ON_RESUME


@pytest.mark.parametrize("path", config_lib.SETTINGS)
def test_every_setting_is_described_and_its_default_obeys_its_rule(path):
    field = config_lib.SETTINGS[path]
    assert len(field.metadata["doc"]) > 10
    assert "|" not in field.metadata["doc"]  # it would end a cell of the table
    settings.check(path, field, field.default)


def test_a_bound_with_an_unknown_name_is_refused_where_it_is_written():
    with pytest.raises(KeyError):
        settings.setting(1, "a number", at_lest=1)


@pytest.mark.process
def test_the_page_about_settings_is_what_its_command_writes():
    command = [sys.executable, "-m", "jvitmoe.config"]
    written = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CONFIGS.parent).stdout
    assert written == (CONFIGS.with_name("docs") / "settings.md").read_text()
    assert all(f"| `{path}` |" in written for path in config_lib.flatten(Config()))


@pytest.mark.parametrize("columns", [60, 120])
def test_help_describes_each_setting_and_fits_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.parse(["train.py", "--help"], lambda values: None, config=True)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    shown = " ".join(" ".join(lines).split())
    for path, field in config_lib.SETTINGS.items():
        about = f"--config.{path}={field.default!r} {field.metadata['doc']} ({settings.values(field)})"
        assert about in shown
    assert [line for line in lines if line in ("data:", "model:", "routing:", "init:", "optim:", "train:")] == [
        f"{section.name}:" for section in dataclasses.fields(Config)
    ]


def test_a_config_is_copied_compared_and_overridden_like_any_dataclass():
    config = Config()
    again = copy.deepcopy(config)
    assert again == config
    again.model.width = 8
    assert again != config
    assert (config.model.width, Config().model.width) == (64, 64)
    assert dataclasses.asdict(again)["model"] == dataclasses.asdict(ModelConfig(width=8))
    overrides = ["--config.model.width=32", "--config.data.flip", """--config.routing.pattern=("dense","experts")"""]
    values = cli.parse_with_arguments(["train.py", *overrides], lambda values: None, config=True)[0]
    expected = Config(DataConfig(flip=True), ModelConfig(width=32), RoutingConfig(pattern=("dense", "experts")))
    assert values.config == expected


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
    assert cost.count_parameters(config) == (active, total)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_experiment_is_valid_and_opens_with_its_command(path, monkeypatch):
    module = load_experiment(path, monkeypatch)
    config = module.get_config().validate()
    json.loads(config_lib.dumps(config))
    assert f"python -m jvitmoe.train --config configs/{path.name}" in module.__doc__
    assert (config.routing.experts > 1) == path.stem.endswith(("random", "switch"))
    if inspect.signature(module.get_config).parameters:
        assert f"configs/{path.name}:random" in module.__doc__
        assert module.get_config("random").validate().routing.experts > 1
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
