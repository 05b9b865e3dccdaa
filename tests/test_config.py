"""The configuration: every rule is checked, every message is one line that names value, rule and remedy."""

import importlib.util
import json
from pathlib import Path

import pytest

from jvitmoe import config as config_lib
from jvitmoe import evaluation
from jvitmoe.config import Config, ConfigError, DataConfig, UserError

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
        ("data.crop_padding", -2, "must not be negative"),
        ("train.devices", -1, "must not be negative"),
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
        ("optim.warmup_epochs", -1, "must not be negative"),
        ("routing.init", "sharde", "did you mean 'shared'?"),
        ("routing.router", "switch", "must be 'random' with one expert"),
        ("routing.router", "swich", "did you mean 'switch'?"),
        ("routing.capacity", 0.0, "must be greater than 0"),
        ("routing.consistency", 1.0, "must be 0 with one expert"),
        ("routing.consistency_loss", "kl", "must be one of 'adamix', 'thor'"),
        ("routing.pull", 1.5, "must be at most 1"),
        ("routing.tie_last", 1.0, "must be at least 0 and below 1"),
        ("routing.learning_rate", 0.0, "must be greater than 0"),
        ("init.noise", 0.1, "must be 0 without an init.source"),
        ("init.noise", -0.1, "must not be negative"),
        ("model.lora", 4, "must name a trained ViT for model.lora"),
        ("model.adapter", -1, "must not be negative"),
        ("model.norm_epsilon", 0.0, "must be greater than 0"),
        ("routing.pattern", ("dense",), "with 'experts' in it"),
        ("routing.pattern", ("experts", "mlp"), "must be a tuple of 'experts' and 'dense'"),
        ("routing.pattern", ("dense", "dense", "experts"), "must have a length that divides model.depth, which is 4"),
        ("routing.pattern", "experts", "must be of type tuple"),
        ("routing.scope", "token", "must be one of 'shared', 'layer'"),
        ("model.norm", "rms", "must be one of 'pre', 'post'"),
        ("optim.name", "sgd", "must be one of 'adam', 'adamw'"),
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


def test_only_what_changes_numbers_counts_as_a_difference():
    old, new = Config(), Config()
    new.train.log_every, new.train.devices, new.data.dir = 99, 4, "elsewhere"
    assert config_lib.differences(old, new) == {}
    new.train.seed = 1
    assert config_lib.differences(old, new) == {"train.seed": (0, 1)}


@pytest.mark.parametrize(
    ("name", "validation", "same"),
    [("digits", 50, True), ("folder", 50, True), ("cifar10", 0, True), ("cifar10", 50, False)],
)
def test_a_run_may_go_on_as_a_stream_unless_that_would_hold_out_other_images(name, validation, same):
    old, new = (Config(data=DataConfig(name=name, validation=validation, stream=stream)) for stream in (False, True))
    expected = {} if same else {"data.stream": (False, True)}
    assert config_lib.differences(old, new) == expected
    assert config_lib.differences(new, old) == ({} if same else {"data.stream": (True, False)})


def test_a_stream_of_pictures_cut_at_random_cannot_become_a_set_on_the_device():
    config = Config(data=DataConfig(stream=True, crop="resized")).validate()
    config.data.stream = False
    with pytest.raises(ConfigError, match=r"'resized' needs data\.stream=True"):
        config.validate()
    old = Config(data=DataConfig(stream=True, crop="resized"))
    new = Config(data=DataConfig(stream=True))
    assert config_lib.differences(old, new) == {"data.crop": ("resized", "pad")}


def test_fields_free_on_resume_exist():
    assert set(config_lib.flatten(Config())) >= config_lib.FREE_ON_RESUME


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
    assert evaluation.count_parameters(config) == (active, total)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_experiment_is_valid_and_opens_with_its_command(path, monkeypatch):
    module = load_experiment(path, monkeypatch)
    config = module.get_config().validate()
    json.loads(config_lib.dumps(config))
    assert f"python -m jvitmoe.train --config configs/{path.name}" in module.__doc__
    assert (config.routing.experts > 1) == path.stem.endswith(("random", "switch"))


def test_a_message_shows_control_characters_escaped_and_long_values_cut_between_value_and_remedy():
    for value in ("x" * 20_000, "x y " * 5_000, "\x1b[2J" * 5_000):
        message = str(ConfigError(f"config.data.name is {value!r} of {value}\x1b[31m\r\n; it must be 'digits': set it"))
        assert len(message) < 1300
        assert message.isprintable()
        assert message.startswith("config.data.name is ")
        assert message.endswith("\\x1b[31m ; it must be 'digits': set it")
    assert config_lib.one_line(ValueError("\x1b]0;title\x07\n" + "x" * 20_000)).startswith("ValueError: \\x1b]0;title")
    assert str(UserError("a class 'é 字' in /a path")) == "a class 'é 字' in /a path"
