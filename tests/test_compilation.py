import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

import processes
from jvitmoe.runtime import compilation
from run_folders import history

DIGITS = Path(__file__).parents[1] / "configs" / "digits_dense.py"
ALL_REDUCE = (
    "%a = (f32[2,3]{1,0}, bf16[5]{0}, pred[]) all-reduce(%b, %c, %d), channel_id=1, replica_groups=GROUPS, to_apply=%e"
)


@pytest.mark.parametrize(
    ("groups", "total"),
    [
        ("mesh['data'=2,'expert'=4] {'data'}", 24 + 10 + 1),
        ("mesh['data'=1,'expert'=4] {'data'}", 0),
        ("mesh['data'=1,'expert'=4] {'data','expert'}", 35),
        ("[2,4]<=[8]", 35),
        ("[4,1]<=[4]", 0),
        ("{{0,1},{2,3}}", 35),
        ("{{0},{1}}", 0),
    ],
)
def test_bytes_are_counted_where_several_devices_reduce(groups, total):
    assert sum(compilation.reduced_sizes(f"ROOT {ALL_REDUCE.replace('GROUPS', groups)}\n")) == total


def test_a_program_with_another_collective_has_no_such_count():
    with pytest.raises(ValueError, match="all-gather"):
        compilation.reduced_sizes("%a = f32[2]{0} all-gather(%b), replica_groups=[1,2]<=[2]")


@pytest.fixture(params=["amx_bf16", "avx512_bf16"])
def cpu(request, monkeypatch, tmp_path):
    """A CPU that multiplies in bfloat16, and no XLA_FLAGS."""
    jax.devices()  # made while XLA_FLAGS still asks for several
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(compilation, "CPU_FLAGS", tmp_path / "cpuinfo")
    compilation.CPU_FLAGS.write_text(f"flags\t\t: fpu {request.param} avx2\n")


def test_options_are_for_bfloat16_on_a_cpu_that_has_it_and_never_against_the_users_own(cpu, monkeypatch):
    assert compilation.options(jnp.dtype("bfloat16"), "cpu") == {compilation.ONEDNN: True}
    assert compilation.options(jnp.dtype("float32"), "cpu") == {}
    assert compilation.options(jnp.dtype("bfloat16"), "gpu") == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{compilation.ONEDNN}=false")
    assert compilation.options(jnp.dtype("bfloat16"), "cpu") == {}


def test_a_cpu_without_bfloat16_or_of_unknown_features_gets_no_options(cpu):
    compilation.CPU_FLAGS.write_text("flags\t\t: fpu avx2 not_amx_bf16\n")
    assert compilation.options(jnp.dtype("bfloat16"), "cpu") == {}
    compilation.CPU_FLAGS.unlink()
    assert compilation.options(jnp.dtype("bfloat16"), "cpu") == {}


def test_without_a_home_folder_nothing_is_cached(monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compilation.Path, "home", none)
    unset = types.SimpleNamespace(values={"jax_compilation_cache_dir": None}, update=lambda *_: pytest.fail("a folder"))
    monkeypatch.setattr(compilation.jax, "config", unset)
    compilation.use_cache()


def test_one_of_several_processes_caches_nothing_in_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = []
    unset = types.SimpleNamespace(
        values={"jax_compilation_cache_dir": None}, update=lambda _, folder: folders.append(folder)
    )
    monkeypatch.setattr(compilation.jax, "config", unset)
    compilation.use_cache(alone=False)
    assert folders == []
    compilation.use_cache()
    assert folders == [str(tmp_path / "jvitmoe" / "compiled")]


def test_an_option_that_the_installed_jaxlib_has_not_is_left_out_and_the_cache_stays(cpu, monkeypatch):
    monkeypatch.setattr(compilation, "ONEDNN", "xla_option_that_never_was")
    monkeypatch.setattr(compilation, "_stop_writing", lambda: pytest.fail("programs are no longer cached"))
    assert compilation.options(jnp.dtype("bfloat16"), "cpu") == {}


@pytest.mark.process
def test_bfloat16_training_runs_with_a_cache_of_all_programs_and_again_with_what_is_in_it(tmp_path):
    """A program that calls oneDNN crashes jaxlib 0.12 when it is written to the cache."""
    environment = {
        **processes.environment(),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    settings = ("train.epochs=1", "train.log_every=1", "optim.warmup_epochs=0", "model.dtype=bfloat16", "model.depth=1")
    for name in ("first", "second"):
        command = processes.train(DIGITS, tmp_path / name, *(f"--config.{setting}" for setting in settings))
        (ended,) = processes.collect([processes.start(command, environment)])
        assert ended.code == 0, ended
    first, second = history(tmp_path / "first"), history(tmp_path / "second")
    assert first == second
    assert len(first) == 23


@pytest.mark.process
def test_with_onednn_in_xla_flags_no_program_is_written_to_the_cache(tmp_path):
    folder, _ = start(XDG_CACHE_HOME=str(tmp_path), XLA_FLAGS=f"--{compilation.ONEDNN}=true")
    assert list(Path(folder).glob("*-cache")) == []


def test_a_program_compiled_for_reading_says_what_the_one_that_runs_says():
    def loss(x):
        return jax.lax.psum(jnp.sum(jnp.tanh(x @ x.T) ** 2), "d")

    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    summed = jax.jit(
        jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d"))
    )
    lowered = summed.lower(jax.ShapeDtypeStruct((8, 6), jnp.float32))
    quick, slow = compilation.for_reading(lowered), lowered.compile()
    for found in ("flops", "bytes accessed"):
        assert quick.cost_analysis()[found] == slow.cost_analysis()[found] > 0
    assert compilation.planned_bytes(quick) == compilation.planned_bytes(slow) > 0
    assert compilation.reduced_sizes(quick.as_text()) == compilation.reduced_sizes(slow.as_text())


SCRIPT = """
import jax
from jvitmoe.runtime import compilation
compilation.use_cache()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
jax.jit(lambda x: (x.T @ x).sum())(jax.numpy.ones((64, 64), "bfloat16"))
print(jax.config.jax_compilation_cache_dir, len(hits))
"""


def start(**environment):
    others = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    others["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=others | environment, capture_output=True, text=True, check=True
    )
    folder, hits = done.stdout.split()
    return folder, int(hits)


@pytest.mark.process
def test_a_second_start_finds_the_programs_of_the_first(tmp_path):
    folder, first = start(XDG_CACHE_HOME=str(tmp_path))
    assert folder == str(tmp_path / "jvitmoe" / "compiled")
    assert (tmp_path / "jvitmoe" / "compiled").stat().st_mode & 0o077 == 0
    assert first == 0
    assert list(Path(folder).glob("*-cache"))
    assert start(XDG_CACHE_HOME=str(tmp_path))[1] > 0


@pytest.mark.process
def test_the_users_own_cache_folder_stands(tmp_path):
    folder, _ = start(XDG_CACHE_HOME=str(tmp_path / "ours"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert folder == str(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()
