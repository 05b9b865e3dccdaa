"""Forks Python processes that have already imported JAX and the commands. `processes.start` is the client.

Imports take 2 s of CPU, more than a tiny run does. A process from here is otherwise like a fresh one: before the fork
there is no JAX backend and no second thread; after it, files, folder, environment and signals are set and the command
runs as `__main__`, to the interpreter's own end.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys

# What the commands import, most of it when it is needed.
PRELOADED = (
    *("jvitmoe.training.launch", "jvitmoe.evaluation.mergeability", "jvitmoe.reports.run_figures"),
    *("grain", "matplotlib.figure", "matplotlib.backends.backend_agg"),
)


def serve() -> list[str]:
    """Answers each request, a line of JSON, with the pid of a new process. Returns, in that process, its command."""
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        middle = os.fork()
        if middle == 0 and (pid := os.fork()):
            os.write(write, b"%d" % pid)
            os._exit(0)
        if middle == 0:
            become(request)
            return request["command"]
        os.waitpid(middle, 0)  # now the process is a child of the client, which is a subreaper
        print(os.read(read, 20).decode(), flush=True)
        os.close(read)
        os.close(write)
    sys.exit(0)


def become(request: dict) -> None:
    """Gives this process the standard files, folder, environment and signals of the request."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    for number, path in enumerate((os.devnull, request["out"], request["err"])):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])


def run(command: list[str]) -> None:
    """Runs `-m MODULE ARGUMENTS` or `-c CODE ARGUMENTS`."""
    kind, what, *arguments = command
    sys.path[0] = os.getcwd() if kind == "-m" else ""
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    for name in PRELOADED:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"imports started {threads - 1} threads, which a forked process would lack"
    gc.freeze()  # its pages stay shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run(serve())
