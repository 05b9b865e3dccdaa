import functools
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import processes
from jvitmoe.machine import compilation
from run_folders import history

DIGITS = Path(__file__).parents[2] / "configs" / "digits_dense.py"


SHAPES = (5, 60, 60), (4, 65, 300), (8, 4, 65, 75)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batched_product_with_a_broadcast_operand_is_right_as_training_compiles_it(shape, dtype):
    """By XLA's default on CPUs it is wrong by factors of 1e14 to 1e35, or NaN (jaxlib 0.10.2 and 0.12.0.1)."""

    def sums(x, value):  # x @ full_like(x, value), times x
        side = *x.shape[:-2], x.shape[-1], x.shape[-1]
        return jnp.sum((x @ jnp.broadcast_to(value, side)) * x, -1)

    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    wide = np.asarray(x, np.float64)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for options in (compilation.of_training(jnp.dtype(dtype), "cpu"), compilation.exact("cpu")):
        options = {"xla_backend_optimization_level": 3, **options}  # the other tests leave out LLVM's optimisation
        found = jax.jit(sums, compiler_options=options)(x, jnp.asarray(0.5, dtype))
        wanted = 0.5 * wide.sum(-1) ** 2
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=tolerance * wanted.max())


def test_a_jaxlib_that_does_not_know_the_option_is_checked_at_the_start(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(compilation.programs, "is_known", lambda *_: False)
    right = jax.jit
    compilation._check_products.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monkeypatch.setattr(compilation.jax, "jit", lambda f, **_: lambda x: right(f)(x) + 1)  # wrong in any jaxlib
        assert compilation.exact("cpu") == {}
        assert compilation.exact("cpu") == {}
    (warning,) = caught
    assert "this jaxlib is wrong on CPUs" in str(warning.message)
    compilation._check_products.cache_clear()


def test_options_are_for_cpus_and_never_against_the_users_own(monkeypatch, tmp_path):
    jax.devices()  # made while XLA_FLAGS still asks for several
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(compilation, "CPU_FLAGS", tmp_path / "cpuinfo")
    of_bfloat16 = functools.partial(compilation.of_training, jnp.dtype("bfloat16"))
    exact = compilation.exact("cpu")
    assert exact == {compilation.YNNPACK: compilation.PRODUCTS_ALONE}
    assert of_bfloat16("cpu") == exact  # nothing is known of it
    for feature in ("not_amx_bf16", "amx_bf16", "avx512_bf16"):
        compilation.CPU_FLAGS.write_text(f"flags\t\t: fpu {feature} avx2\n")
        assert of_bfloat16("cpu") == exact | ({} if "not" in feature else {compilation.ONEDNN: True})
    assert of_bfloat16("gpu") == compilation.exact("tpu") == {}
    assert compilation.of_training(jnp.dtype("float32"), "cpu") == exact
    monkeypatch.setenv("XLA_FLAGS", f"--{compilation.ONEDNN}=false")
    assert of_bfloat16("cpu") == exact
    monkeypatch.setenv("XLA_FLAGS", f"--{compilation.YNNPACK}=individual_dot")
    assert of_bfloat16("cpu") == {compilation.ONEDNN: True}
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(compilation, "ONEDNN", "xla_option_that_the_installed_jaxlib_has_not")
    monkeypatch.setattr(compilation, "_stop_writing", lambda: pytest.fail("programs are no longer cached"))
    assert of_bfloat16("cpu") == exact


def test_one_of_several_processes_and_one_without_a_home_folder_cache_nothing(monkeypatch, tmp_path):
    def none():
        raise RuntimeError("Could not determine home directory.")

    folders, name = [], "jax_compilation_cache_dir"
    unset = types.SimpleNamespace(values={name: None}, update=lambda _, folder: folders.append(folder))
    monkeypatch.setattr(compilation.jax, "config", unset)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation.use_cache(alone=False)
    assert folders == []
    compilation.use_cache()
    assert folders == [str(tmp_path / "jvitmoe" / "compiled")]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(compilation.Path, "home", none)
    compilation.use_cache()
    assert len(folders) == 1


@pytest.mark.process
def test_bfloat16_training_runs_with_a_cache_of_all_programs_and_again_with_what_is_in_it(tmp_path):
    """A program that calls oneDNN crashes jaxlib 0.12 when it is written to the cache."""
    every = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    settings = ("train.epochs=1", "train.log_every=1", "optim.warmup_epochs=0", "model.dtype=bfloat16", "model.depth=1")
    for name in ("first", "second"):
        command = processes.train(DIGITS, tmp_path / name, *(f"--config.{setting}" for setting in settings))
        ended = processes.run(command, processes.environment() | every)
        assert ended.code == 0, ended
    first, second = history(tmp_path / "first"), history(tmp_path / "second")
    assert first == second
    assert len(first) == 23


SCRIPT = """
import jax
from jvitmoe.machine import compilation
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
def test_a_second_start_finds_the_programs_of_the_first_and_what_the_user_has_set_stands(tmp_path):
    ours = tmp_path / "jvitmoe" / "compiled"
    theirs = start(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))[0]
    assert theirs == str(tmp_path / "theirs")
    assert not ours.exists()
    start(XDG_CACHE_HOME=str(tmp_path), XLA_FLAGS=f"--{compilation.ONEDNN}=true")
    assert list(ours.glob("*-cache")) == []  # with oneDNN no program is written
    assert start(XDG_CACHE_HOME=str(tmp_path)) == (str(ours), 0)
    assert ours.stat().st_mode & 0o077 == 0
    assert list(ours.glob("*-cache"))
    assert start(XDG_CACHE_HOME=str(tmp_path))[1] > 0
