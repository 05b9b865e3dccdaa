"""The whole configuration of a run: typed, defaulted here, validated once.

An experiment is a small file in `configs/` whose `get_config()` returns a `Config`. On the command line any field can
be overridden with `--config.a.b=value`.
"""

import dataclasses
import difflib
import json
import math
import typing
import zlib
from typing import Any

LONGEST_WORD, LONGEST_LINE = 300, 1200  # characters of a message


class UserError(Exception):
    """A mistake the user can mend: commands print it as one line and exit with code 2."""

    everywhere = False  # whether all processes of a run raise it alike, so that one of them saying it is enough
    known = False  # whether the other processes know of it

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Returns `text` as one line for a terminal: control characters are escaped, and long words and long lines are cut
    in the middle, so that the rule and the remedy at the end of a message remain."""
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return _cut(" ".join(_cut(word, LONGEST_WORD) for word in escaped.split(" ")), LONGEST_LINE)


def one_line(error: BaseException) -> str:
    """Returns the kind of an error and the beginning of its message, on one line."""
    text = printable(str(error))
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[-(longest // 2) :]}"


def checksum(value: Any) -> str:
    """Returns the CRC-32 of a value's JSON, independent of the order of keys."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


class ConfigError(UserError):
    """A field holds a value that breaks its rule; the message names value, rule and remedy."""


@dataclasses.dataclass
class DataConfig:
    name: str = "digits"  # "digits", "folder", or the name of a TFDS image classification set
    dir: str = ""  # where TFDS sets or the image folder lie; "" is the library's own default
    validation: int = 0  # training images held out, class by class, to choose checkpoints on
    crop_padding: int = 0  # zero pixels added on each side before the random crop; 0 crops nothing
    flip: bool = False  # horizontal flip with probability 1/2
    stream: bool = False  # read each batch from disk, for sets larger than a device's memory
    crop: str = "pad"  # pad (crop_padding, images of one size) | resized (random parts resized; images of any size)


@dataclasses.dataclass
class ModelConfig:
    image_size: int = 8
    channels: int = 1
    classes: int = 10
    patch: int = 2
    width: int = 64  # D
    hidden: int = 128  # F
    depth: int = 4  # L
    heads: int = 4  # H
    norm: str = "pre"  # pre | post
    pool: str = "cls"  # cls | mean
    positions: str = "learned"  # learned | sincos2d
    cls_position: bool = False  # whether CLS has a learned position too, as timm's and Hugging Face's ViTs have
    position_rows: int = 0  # rows of the learned table; 0 is one per patch (the original holds 300 and uses 64)
    head_hidden: int = 0  # width of the head's hidden layer; 0 is a one-layer head
    norm_epsilon: float = 1e-5  # of every LayerNorm, PyTorch's; timm's ViTs have 1e-6, Hugging Face's 1e-12
    init_layers: str = "independent"  # independent | shared: layers start different, or equal (the original)
    dropout: float = 0.0  # after attention weights, GELU and both residual branches
    lora: int = 0  # rank of a LoRA on the MLP, one per expert; then only it and the head are trained; 0 is none
    adapter: int = 0  # hidden units of an adapter beside the MLP, one per expert; trained as lora is; 0 is none
    dtype: str = "auto"  # compute: float32 | bfloat16 | auto (bfloat16 on GPU and TPU); parameters stay float32
    attention: str = "auto"  # xla | cudnn | auto (cudnn on a GPU that has it, where it takes the shapes)
    unroll: int = 1  # layers unrolled per iteration of the scan over depth

    @property
    def patches(self) -> int:
        """T without the CLS token: image patches of one image."""
        return (self.image_size // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """T: patches of one image and the CLS token, if there is one."""
        return self.patches + (self.pool == "cls")

    @property
    def fits_cudnn(self) -> bool:
        """Whether cuDNN's fused attention, as JAX differentiates it, takes these shapes: heads of a multiple of 8 up to
        128, and an even number of tokens."""
        head_width = self.width // self.heads
        return head_width % 8 == 0 and head_width <= 128 and self.tokens % 2 == 0

    def plain(self) -> "ModelConfig":
        """Returns what is left once LoRA and adapters are folded into the MLP: an adapter is hidden units more."""
        return dataclasses.replace(self, hidden=self.hidden + self.adapter, lora=0, adapter=0)


@dataclasses.dataclass
class RoutingConfig:
    experts: int = 1  # E; 1 is the dense model
    router: str = "random"  # random (from the step's key) | switch | topk | expert_choice | soft | hash | frozen
    pattern: tuple[str, ...] = ("experts",)  # which layers hold experts, repeated over depth: experts | dense
    granularity: str = "batch"  # what shares a route: batch | sample | token
    scope: str = "shared"  # shared: one route for all layers; layer: a fresh one per layer
    init: str = "independent"  # independent | shared: experts start different or equal; from a source, as its MLPs
    shared_layer: str = "none"  # none | up | down: the layer of the MLP that all experts share (AdaMix)
    learning_rate: float = 1.0  # of experts, as a multiple of the trunk's: each sees 1/E of the images
    pull: float = 0.0  # share of the way to their mean that experts move after a step (EWA, PAPA); 0 is off
    pull_every: int = 1  # steps
    pull_schedule: str = "constant"  # constant | rising: linearly from 0 to `pull` over training
    top_k: int = 2  # experts of a token, for router="topk"; for "frozen" at the start, growing to all of them
    capacity: float = 1.25  # of an expert, as a multiple of its even share: switch, topk and expert_choice
    eval_capacity: float = 2.0  # the same at evaluation, for switch and topk
    balance_loss: float = 0.01  # coefficient of the router's load-balancing loss, averaged over layers
    z_loss: float = 0.0  # coefficient of the mean of logsumexp(router logits)^2 (ST-MoE has 1e-3)
    consistency: float = 0.0  # weight of the divergence between two passes on distinct routes; 0 makes one pass
    consistency_loss: str = "adamix"  # adamix: cross-entropy on one pass, gradients stopped; thor: on both, and through
    tie_last: float = 0.0  # last fraction of training that runs with all experts equal to their mean


@dataclasses.dataclass
class InitConfig:
    """A trained ViT to start from; with experts, each starts as a copy of its MLP. Read once, never to resume."""

    source: str = ""  # run folder, exported folder, .safetensors of timm or Hugging Face, or .npz; "" starts anew
    mean: tuple[float, ...] = ()  # of the source's pixels in [0, 1]: one, or one per channel; () is its config's or 0.5
    std: tuple[float, ...] = ()  # their standard deviation, likewise
    noise: float = 0.0  # deviation of normal noise on each copy, as a multiple of the deviation of its array


@dataclasses.dataclass
class OptimConfig:
    name: str = "adamw"  # adam (weight decay is L2 in the gradient, the original) | adamw (decoupled)
    learning_rate: float = 1e-3  # the peak
    weight_decay: float = 0.05
    schedule: str = "step"  # cosine to 0, moving every step | every epoch (the original)
    warmup_epochs: float = 0.0  # linear from 0, at most half of the training; only with schedule="step"
    clip_norm: float = 0.0  # global gradient norm; 0 never clips
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    skip_nonfinite: int = 0  # steps in a row that may be skipped for a loss or gradient that is not finite


@dataclasses.dataclass
class TrainConfig:
    epochs: int = 10
    batch_size: int = 128  # B, over all devices
    seed: int = 0
    label_smoothing: float = 0.0
    ema: float = 0.0  # decay per step of a running mean of the merged (or dense) tree, tested beside it; 0 keeps none
    devices: int = 0  # 0 is all of them
    expert_devices: int = 1  # of these, along the expert axis: each holds its share of experts and their images
    shard: str = (
        "none"  # none | optimizer | parameters: what is split over the data axis (ZeRO, FSDP); with its moments
    )
    accumulate: int = 1  # parts of a batch that run one after the other, for batches that do not fit
    platform: str = ""  # cpu | gpu | tpu; "" takes what JAX finds
    log_every: int = 20  # steps
    eval_every: int = 1  # epochs
    checkpoint_every: int = 0  # steps; 0 saves after each evaluation only
    keep: int = 2  # newest checkpoints kept (the best on validation is kept besides)
    stall_minutes: float = 30.0  # without progress, after which the run prints all stacks and ends; 0 waits for ever


@dataclasses.dataclass
class Config:
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    routing: RoutingConfig = dataclasses.field(default_factory=RoutingConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def validate(self) -> "Config":
        """Returns itself if every field obeys its rule. Raises ConfigError naming the first that does not."""
        for section in dataclasses.fields(self):
            _check_types(getattr(self, section.name), section.name)
        for path, options in CHOICES.items():
            _check_choice(path, _get(self, path), options)
        for path in POSITIVE:
            _require(_get(self, path) > 0, path, _get(self, path), "must be greater than 0")
        for path in NOT_NEGATIVE:
            _require(_get(self, path) >= 0, path, _get(self, path), "must not be negative")
        for path in FRACTIONS:
            _require(0 <= _get(self, path) < 1, path, _get(self, path), "must be at least 0 and below 1")
        for holds, path, rule in self._rules():
            _require(holds, path, _get(self, path), rule)
        return self

    def _rules(self) -> tuple[tuple[bool, str, str], ...]:
        """Returns (whether it holds, field, rule) of each rule that joins several fields."""
        model, routing, optim, train = self.model, self.routing, self.optim, self.train
        turn = len(routing.pattern)
        plain = routing.experts > 1 and routing.granularity == "batch" and not routing.consistency
        return (
            (
                self.data.crop == "pad" or self.data.stream,
                "data.crop",
                "must be 'pad' for sets that live on the device; 'resized' needs data.stream=True",
            ),
            (
                self.data.crop_padding <= model.image_size,
                "data.crop_padding",
                f"must be at most model.image_size, which is {model.image_size}",
            ),
            (model.depth <= DEEPEST, "model.depth", f"must be at most {DEEPEST:,}"),
            (
                self._about_parameters <= MOST_PARAMETERS,
                "model.width",
                f"makes about {self._about_parameters:.1e} parameters with the other sizes; "
                f"they must be at most {MOST_PARAMETERS:.1e}",
            ),
            (
                model.width % model.heads == 0,
                "model.width",
                f"must be a multiple of model.heads, which is {model.heads}",
            ),
            (
                model.positions != "sincos2d" or model.width % 4 == 0,
                "model.width",
                "must be a multiple of 4 for model.positions=sincos2d",
            ),
            (
                model.image_size % model.patch == 0,
                "model.patch",
                f"must divide model.image_size, which is {model.image_size}",
            ),
            (
                model.position_rows == 0 or model.position_rows >= model.patches,
                "model.position_rows",
                f"must be 0 or at least the number of patches, which is {model.patches}",
            ),
            (
                model.attention != "cudnn" or (model.fits_cudnn and model.dtype != "float32"),
                "model.attention",
                "must be auto or xla but for bfloat16, heads of a multiple of 8 up to 128 and an even number of tokens",
            ),
            (
                "experts" in routing.pattern and {*routing.pattern} <= {"experts", "dense"},
                "routing.pattern",
                "must be a tuple of 'experts' and 'dense', with 'experts' in it, such as "
                """--config.routing.pattern='("dense","experts")'""",
            ),
            (
                turn > 0 and model.depth % turn == 0,
                "routing.pattern",
                f"must have a length that divides model.depth, which is {model.depth}",
            ),
            (
                train.batch_size % self.slots == 0,
                "train.batch_size",
                f"must be a multiple of routing.experts, {self.slots}, for routing.granularity={routing.granularity}",
            ),
            (
                train.devices == 0 or train.batch_size % train.devices == 0,
                "train.batch_size",
                f"must be a multiple of train.devices, which is {train.devices}",
            ),
            (
                train.expert_devices == 1
                or (
                    self.slots % train.expert_devices == 0
                    and (routing.granularity, routing.scope, routing.consistency) == ("sample", "shared", 0)
                ),
                "train.expert_devices",
                "must be 1, or divide routing.experts for granularity sample, scope shared and no consistency",
            ),
            (
                train.devices % train.expert_devices == 0,
                "train.expert_devices",
                f"must divide train.devices, which is {train.devices}",
            ),
            (
                train.accumulate == 1 or not (routing.balance_loss and routing.router in ("switch", "topk")),
                "train.accumulate",
                "must be 1 for a router with a balance loss, which is of the whole batch",
            ),
            (routing.pull <= 1, "routing.pull", "must be at most 1"),
            (
                routing.consistency == 0 or routing.experts > 1,
                "routing.consistency",
                "must be 0 with one expert: two passes need two routes",
            ),
            (
                routing.router == "random" or plain,
                "routing.router",
                "must be 'random' with one expert, with granularity sample or token, and with consistency",
            ),
            (
                routing.router not in ("topk", "frozen") or routing.top_k <= routing.experts,
                "routing.top_k",
                f"must be at most routing.experts, which is {routing.experts}",
            ),
            (
                not model.cls_position or model.pool == "cls",
                "model.cls_position",
                f"must be False for model.pool={model.pool}, which has no CLS token",
            ),
            (
                not self.tuned or self.init.source != "",
                "init.source",
                "must name a trained ViT for model.lora and model.adapter, which train nothing else but the head",
            ),
            (
                not self.tuned
                or (routing.router, routing.pattern, routing.shared_layer) == ("random", ("experts",), "none"),
                "routing.router",
                "must be 'random', with pattern ('experts',) and shared_layer 'none', for model.lora and model.adapter",
            ),
            (
                self.init.noise == 0 or (routing.experts > 1 and self.init.source != ""),
                "init.noise",
                "must be 0 without an init.source and with one expert: it sets copies apart",
            ),
            (
                optim.schedule == "step" or optim.warmup_epochs == 0,
                "optim.warmup_epochs",
                "must be 0 for optim.schedule=epoch; warm-up needs optim.schedule=step",
            ),
        )

    @property
    def _about_parameters(self) -> int:
        """Returns their number, all experts together, but for small ones: enough to tell what no machine holds."""
        model = self.model
        block = 4 * model.width + 2 * self.routing.experts * (model.hidden + model.lora + model.adapter)
        head = (model.width + model.classes) * model.head_hidden or model.width * model.classes
        tables = max(model.patches, model.position_rows) + model.patch**2 * model.channels
        return model.width * (model.depth * block + tables) + head

    @property
    def learned(self) -> bool:
        """Whether the model routes its own tokens, by what it learned or by a hash, and takes no route."""
        return self.routing.router != "random"

    @property
    def tuned(self) -> bool:
        """Whether only LoRA or adapters, and the head, are trained."""
        return self.model.lora > 0 or self.model.adapter > 0

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that hold experts, where there are any."""
        pattern = self.routing.pattern
        return tuple(layer for layer in range(self.model.depth) if pattern[layer % len(pattern)] == "experts")

    @property
    def slots(self) -> int:
        """Equal parts of a batch that run at once, each through an expert of its own."""
        return 1 if self.routing.granularity == "batch" else self.routing.experts


CHOICES = {
    "data.crop": ("pad", "resized"),
    "model.norm": ("pre", "post"),
    "model.pool": ("cls", "mean"),
    "model.positions": ("learned", "sincos2d"),
    "model.init_layers": ("independent", "shared"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.attention": ("auto", "xla", "cudnn"),
    "routing.router": ("random", "switch", "topk", "expert_choice", "soft", "hash", "frozen"),
    "routing.granularity": ("batch", "sample", "token"),
    "routing.shared_layer": ("none", "up", "down"),
    "routing.pull_schedule": ("constant", "rising"),
    "routing.consistency_loss": ("adamix", "thor"),
    "routing.scope": ("shared", "layer"),
    "routing.init": ("independent", "shared"),
    "optim.name": ("adam", "adamw"),
    "optim.schedule": ("step", "epoch"),
    "train.platform": ("", "cpu", "gpu", "tpu"),
    "train.shard": ("none", "optimizer", "parameters"),
}
POSITIVE = (
    *("routing.top_k", "routing.capacity", "routing.eval_capacity"),
    *(f"model.{name}" for name in ("image_size", "channels", "classes", "patch", "width", "hidden", "depth")),
    *(
        "model.heads",
        "model.unroll",
        "model.norm_epsilon",
        "routing.experts",
        "routing.learning_rate",
        "routing.pull_every",
        "optim.learning_rate",
        "optim.eps",
    ),
    *(f"train.{name}" for name in ("epochs", "batch_size", "log_every", "eval_every", "keep")),
    *("train.expert_devices", "train.accumulate"),
)
NOT_NEGATIVE = (
    *("routing.pull", "routing.consistency", "routing.balance_loss", "routing.z_loss", "init.noise"),
    *("data.validation", "data.crop_padding", "model.position_rows", "model.head_hidden"),
    *("model.lora", "model.adapter"),
    *("optim.weight_decay", "optim.warmup_epochs", "optim.clip_norm", "optim.skip_nonfinite"),
    *("train.seed", "train.devices", "train.checkpoint_every", "train.stall_minutes"),
)
FRACTIONS = ("routing.tie_last", "train.ema", "model.dropout", "optim.b1", "optim.b2", "train.label_smoothing")

LARGEST = 2**31 - 1  # of whole numbers, which sizes, steps and seeds on the devices are made of
LARGEST_FLOAT = 3e38  # of float32
DEEPEST, MOST_PARAMETERS = 10_000, 10**13

# A run may be continued with other values of these: they move files, devices or printing, never a number (but see
# `differences`).
FREE_ON_RESUME = frozenset(
    f"{section}.{name}"
    for section, names in {
        "data": ("dir", "stream"),
        "train": (
            "devices",
            "expert_devices",
            "shard",
            "accumulate",
            "platform",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep",
            "stall_minutes",
        ),
    }.items()
    for name in names
)


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Returns plain nested dicts, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, dict[str, Any]]) -> Config:
    """Returns the Config that `to_dict` came from, in this version or an older one: fields that it did not know have
    their defaults, which is what it did. Raises ConfigError for a section or field that does not exist."""
    config = Config()
    sections = {field.name for field in dataclasses.fields(config)}
    for section_name, section_values in _renamed(values).items():
        if section_name not in sections or not isinstance(section_values, dict):
            raise ConfigError(unknown_field(section_name))
        section = getattr(config, section_name)
        fields = {field.name for field in dataclasses.fields(section)}
        for name, value in section_values.items():
            if name not in fields:
                raise ConfigError(unknown_field(f"{section_name}.{name}"))
            setattr(section, name, tuple(value) if isinstance(value, list) else value)  # JSON has no tuples
    return config


def _renamed(values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the values of an older version under today's names: routing.init=upcycled from routing.upcycle_from is
    routing.init=shared from init.source."""
    routing = values.get("routing")
    if not isinstance(routing, dict) or "upcycle_from" not in routing:
        return values
    kept = {name: value for name, value in routing.items() if name != "upcycle_from"}
    if kept.get("init") != "upcycled":
        return {**values, "routing": kept}
    return {**values, "routing": {**kept, "init": "shared"}, "init": {"source": routing["upcycle_from"]}}


def flatten(config: Config) -> dict[str, Any]:
    """Returns {"section.field": value}."""
    return {f"{s}.{name}": value for s, fields in to_dict(config).items() for name, value in fields.items()}


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns {"section.field": (old, new)} for the fields that would change a run's numbers.

    `data.stream` is one of them where validation images of a TFDS set are held out: a stream knows no labels before it
    reads, and holds out others.
    """
    olds, news = flatten(old), flatten(new)
    free = FREE_ON_RESUME
    if old.data.validation and old.data.name not in ("digits", "folder"):
        free -= {"data.stream"}
    return {k: (olds[k], news[k]) for k in olds if olds[k] != news[k] and k not in free}


def unknown_field(path: str) -> str:
    """Returns the one-line message for a field that does not exist, with the nearest that does."""
    names = list(flatten(Config()))
    last = path.rpartition(".")[2]
    near = difflib.get_close_matches(path, names, n=1, cutoff=0.6) or [
        name for name in names if difflib.get_close_matches(last, [name.rpartition(".")[2]], cutoff=0.6)
    ]
    hint = f"; did you mean config.{near[0]}?" if near else f"; the sections are {', '.join(to_dict(Config()))}"
    return f"config.{path} is not a field{hint}"


def dumps(config: Config) -> str:
    """Returns the JSON text kept in a run folder."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def loads(text: str, name: str) -> Config:
    """Returns the Config of `dumps`. Raises ConfigError naming the file where the text is none."""
    try:
        values = json.loads(text)
        return from_dict(values)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{name} is not the config of a run: {error}; restore it from a copy") from error


def _get(config: Config, path: str) -> Any:
    section, name = path.split(".")
    return getattr(getattr(config, section), name)


def _check_types(section: Any, name: str) -> None:
    for field in dataclasses.fields(section):
        value, wanted = getattr(section, field.name), typing.cast(Any, field.type)
        path, number = f"{name}.{field.name}", isinstance(value, int | float) and not isinstance(value, bool)
        kind, *inside = (typing.get_origin(wanted) or wanted, *typing.get_args(wanted))
        fits = number if wanted is float else type(value) is kind
        _require(fits, path, value, f"must be of type {kind.__name__}")
        if inside:
            fits = all(type(entry) is inside[0] for entry in value)
            _require(fits, path, value, f"must be of type {kind.__name__} of {inside[0].__name__}")
        if number:
            _require(not isinstance(value, int) or abs(value) <= LARGEST, path, value, f"must be at most {LARGEST:,}")
            _require(math.isfinite(value), path, value, "must be finite")
            _require(abs(value) <= LARGEST_FLOAT, path, value, f"must be at most {LARGEST_FLOAT}")


def _check_choice(path: str, value: str, options: tuple[str, ...]) -> None:
    near = difflib.get_close_matches(value, options, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    _require(value in options, path, value, f"must be one of {', '.join(map(repr, options))}{hint}")


def _require(holds: bool, path: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"config.{path} is {value!r}; it {rule}")
