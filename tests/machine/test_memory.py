import os
import resource
import subprocess
import sys

import pytest

import processes
from jvitmoe.machine import memory

ALLOCATES = """
import os, resource, sys
from jvitmoe.machine import memory
memory.use_huge_pages()
pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * 2**26
print(os.getpid(), sys.argv[1:], resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages)
"""
pytestmark = pytest.mark.skipif(not memory._on_request(), reason="the kernel gives huge pages to all or to none")


def run(**environment: str) -> tuple[int, subprocess.Popen, str]:
    env = {name: value for name, value in os.environ.items() if name != memory.TUNABLES} | environment
    command = [sys.executable, "-c", ALLOCATES, "two words", "--flag"]
    process = subprocess.Popen(command, env=env, cwd=processes.ROOT, stdout=subprocess.PIPE, text=True)
    return process.pid, process, process.communicate()[0]


@pytest.mark.process
@pytest.mark.parametrize(("set_by_user", "share"), [({}, 0.1), ({"GLIBC_TUNABLES": ""}, None)])
def test_a_command_is_started_anew_once_as_the_same_process_and_takes_huge_pages_unless_the_user_set_tunables(
    set_by_user, share
):
    pid, process, out = run(**set_by_user)
    assert process.returncode == 0
    name, pages = out.rsplit(maxsplit=1)
    assert name == f"{pid} ['two words', '--flag']"
    all_pages = 2**26 / resource.getpagesize()
    assert int(pages) < share * all_pages if share else int(pages) > all_pages / 2


@pytest.mark.process
@pytest.mark.parametrize("command", [["jvitmoe.train"], ["jvitmoe", "train"]])
def test_the_commands_that_train_ask_for_huge_pages(tmp_path, command):
    experiment = tmp_path / "asks.py"
    experiment.write_text(f"import os\n\nraise ValueError(os.environ.get('{memory.TUNABLES}'))\n")
    env = {name: value for name, value in os.environ.items() if name != memory.TUNABLES}
    process = [sys.executable, "-m", *command, f"--config={experiment}"]
    done = subprocess.run(process, env=env, cwd=processes.ROOT, capture_output=True, text=True)
    assert "glibc.malloc.hugetlb=1" in done.stderr
