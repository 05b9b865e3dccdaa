"""Exports a dense model for other libraries: `jvitmoe export --workdir runs/X --to TARGET --out DIR`.

The model is that of a run, or of an export of ours in safetensors. Writes it, a model card, sample.npz (images and
their logits) and checksums, and reads it back to compare the logits. A model that the target cannot express is refused
before anything is written.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jvitmoe.commands import cli
from jvitmoe.errors import UserError, did_you_mean, printable
from jvitmoe.runs import safe_io
from jvitmoe.runs.console import console, warnings_as_lines

FORMATS = ("hf", "onnx", "safetensors", "stablehlo", "timm")  # the names in interop.formats.TARGETS, which imports JAX


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError for a run, target or folder that does not fit."""
    cli.end_cleanly()
    values = cli.parse(argv, _define_flags)
    workdir = safe_io.run_folder(values.workdir)
    if not (workdir / "model.safetensors").is_file():
        workdir = cli.run_folder(values.workdir)
    if not values.out:
        raise UserError("--out is missing; give a new folder, such as --out=exports/digits_timm")
    export(workdir, values.to, Path(values.out), values.checkpoint, values.ema, values.data_dir)


def export(
    workdir: Path, to: str, out: Path, checkpoint: str | int = "latest", ema: bool = False, data_dir: str = ""
) -> None:
    """Writes the dense model of a run, or an export of ours, for another library. The arguments are the flags of the
    command. Raises UserError for a run, target or folder that does not fit."""
    if to not in FORMATS:
        raise UserError(f"--to is {to!r}; it must be one of {', '.join(FORMATS)}{did_you_mean(to, FORMATS)}")
    check_new(out)
    console.print(f"reading     {workdir}")
    # Not above: these import JAX, and --help need not wait for that.
    from jvitmoe.config import Config, DataConfig
    from jvitmoe.interop import load
    from jvitmoe.interop.formats import TARGETS, base
    from jvitmoe.machine import compilation

    target = TARGETS[to]
    compilation.use_cache()
    with warnings_as_lines():
        source = load.read(workdir, checkpoint=checkpoint, ema=ema)
    if source.kind not in ("run", load.OURS):
        raise UserError(f"{workdir} holds a ViT of {source.kind}; give a run folder, or an export in safetensors")
    config = (
        source.config if source.config and source.kind == "run" else Config(DataConfig(crop=source.crop), source.model)
    )
    config.data.dir = data_dir or config.data.dir
    remarks = target.examine(config)
    for remark in remarks:
        console.print(f"note        {remark}")
    console.print(f"exporting   as {target.name}, and comparing logits")
    with cli.data_dir_flag(), cli.naming_plugin(workdir):
        sample = target.sample(source, base.sample_images(source))
    result = safe_io.read_result(workdir) if source.kind == "run" else {}
    difference = write(out, target, source, sample, result, remarks)
    weights = f", {'EMA' if source.ema else 'checkpoint'} at step {source.step:,}" if source.kind == "run" else ""
    console.print(f"exported    {printable(str(out))}{weights}, as {target.name}")
    compared = f"logits of {len(sample['labels'])} images within {difference:.2g} of ours"
    console.print(f"checked     read back by {target.reader}: {compared}")
    console.print(f"written     {', '.join(sorted(path.name for path in out.iterdir()))}")
    if target.torch:
        console.print(f"            README.md has a check that runs {target.library} itself")


def write(
    out: Path,
    target: Any,
    source: Any,
    sample: Any,
    result: Mapping[str, Any] | None = None,
    remarks: Sequence[str] = (),
    others: Mapping[str, bytes] | None = None,
) -> float:
    """Writes an export with its card, other files and checksums. Returns how far its logits are from ours. It is
    renamed at the end, so `out` is never incomplete. Raises UserError."""
    from jvitmoe.interop import manifest, model_card

    # With the process in its name it is no folder of the user.
    unfinished = out.with_name(f"{out.name}.{os.getpid()}{safe_io.UNFINISHED}")
    safe_io.make_folder(unfinished)
    try:
        with safe_io.writing(out):
            difference: float = target.export(unfinished, source, sample)
            safe_io.write_text(unfinished / manifest.CARD, model_card.write(source, result or {}, target, remarks))
            for name, content in (others or {}).items():
                safe_io.write_bytes(unfinished / name, content)
            manifest.write(unfinished)
            unfinished.rename(out)  # also onto an empty folder
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return difference


def check_new(out: Path) -> None:
    """Raises UserError unless a folder is new or empty, and on a disk."""
    if re.match(r"\w+:/", str(out)):
        url = str(out).replace(":/", "://", 1)  # a Path has one slash
        raise UserError(f"--out is {url!r}, a URL; give a folder on a disk, and copy it")
    try:
        is_new = not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not any(out.iterdir()))
    except OSError:  # it cannot be listed
        is_new = False
    if out.name in ("", "..") or not is_new:
        raise UserError(f"--out is {str(out)!r}, which is not a new or empty folder; give one that is")


def _define_flags(values: flags.FlagValues) -> None:
    where = "Run folder, or a folder that jvitmoe average or export --to safetensors wrote."
    flags.DEFINE_string("workdir", "", where, flag_values=values)
    flags.DEFINE_alias("model", "workdir", flag_values=values)
    flags.DEFINE_string("to", "", f"What to write: {', '.join(FORMATS)}.", flag_values=values)
    flags.DEFINE_string("out", "", "New folder to write to.", flag_values=values)
    cli.define_weights(values)
    flags.DEFINE_string("data_dir", "", "Where the data are, if not where training found them.", flag_values=values)
    cli.define_plugin(values)
