"""Which processes may form one run, with threads that meet on loopback; `test_distributed.py` starts real processes."""

import contextlib
import socket
import socketserver
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from jax._src.lib import _jax

import processes
from jvitmoe.errors import UserError
from jvitmoe.runtime import rendezvous

CODE = {"jax": "1.0", "step.py": "abc"}


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(rendezvous, "LINGER", 2.0)
    return processes.free_port()


def meet(port, started, seconds=30.0):
    """Returns what each process, given as (number, count, code), was refused with, or None."""

    def join(one):
        try:
            rendezvous.meet(f"127.0.0.1:{port}", *one, seconds)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(started)) as pool:
        return list(pool.map(join, started))


def test_processes_that_agree_meet_and_leave_the_port_free(port):
    for _ in range(3):
        assert meet(port, [(process, 3, CODE) for process in (2, 1, 0)]) == [None] * 3
        socket.create_server(("127.0.0.1", port)).close()
    assert meet(port, [(0, 1, CODE)]) == [None]


DISAGREE = {
    "process 1 of 3 was started twice (pid": [(0, 3, CODE), (1, 3, CODE), (1, 3, CODE)],
    "process 0 of 3 was started twice (pid": [(0, 3, CODE), (0, 3, CODE), (1, 3, CODE)],
    "1 was started with --processes=3 and process 0 with --processes=2": [(0, 2, CODE), (1, 3, CODE)],
    "1 was started with --processes=2 and process 0 with --processes=3": [(0, 3, CODE), (1, 2, CODE)],
    "other code than process 0: jax is 2.0 and not 1.0;": [(0, 2, CODE), (1, 2, CODE | {"jax": "2.0"})],
    "other code than process 0: step.py is abd and not abc;": [(0, 2, CODE), (1, 2, CODE | {"step.py": "abd"})],
    "other code than process 0: step.py is None and not abc;": [(0, 2, CODE), (1, 2, {"jax": "1.0"})],
}


def test_processes_that_do_not_agree_all_get_the_same_line(port):
    ports = [processes.free_port() for _ in DISAGREE]
    with ThreadPoolExecutor(len(ports)) as pool:
        for says, (first, *others) in zip(DISAGREE, pool.map(meet, ports, DISAGREE.values()), strict=True):
            assert says in first
            assert others == [first] * len(others)


def test_one_that_comes_after_the_fault_hears_of_it(port):
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(meet, port, [(0, 4, CODE), (1, 4, CODE), (1, 4, CODE)])
        time.sleep(0.5)
        (late,) = meet(port, [(2, 4, CODE)])
        assert early.result() == [late] * 3


@contextlib.contextmanager
def silent(port):
    with socket.create_server(("127.0.0.1", port)):
        yield


@contextlib.contextmanager
def talking(port):
    class Answer(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"SSH-2.0-x\n")

    with socketserver.TCPServer(("127.0.0.1", port), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


@contextlib.contextmanager
def coordinator(port):
    service = _jax.get_distributed_runtime_service(f"[::]:{port}", 1)
    try:
        yield
    finally:
        service.shutdown()


@pytest.mark.parametrize("other", [silent, talking, coordinator])
def test_where_another_program_has_the_port_each_process_says_so(port, other, monkeypatch):
    monkeypatch.setattr(rendezvous, "GREETS", 2.0)
    with other(port):
        for process, refused in enumerate(meet(port, [(0, 2, CODE), (1, 2, CODE)], seconds=600)):
            assert refused.startswith(f"process {process} of 2 cannot join at 127.0.0.1:{port}: the port is taken")


def test_the_missing_are_named_to_all_that_are_there(port):
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(meet, port, [(2, 4, CODE)], 600)
        (refused,) = meet(port, [(0, 4, CODE)], seconds=2)
        assert "process 0 of 4 waited 2 s for the others" in refused
        assert "there is no process 1, 3; check the address" in refused
        assert other.result() == [refused]


def test_no_process_0_is_waited_for_no_longer_than_asked(port):
    (refused,) = meet(port, [(1, 2, CODE)], seconds=1)
    assert f"process 1 of 2 waited 1 s for the others at 127.0.0.1:{port}" in refused


def test_a_process_that_reported_and_ended_may_be_started_again(port):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, port, [(0, 3, CODE)], 600)
        assert "waited" in meet(port, [(1, 3, CODE)], seconds=1)[0]
        assert meet(port, [(1, 3, CODE), (2, 3, CODE)]) == [None, None]
        assert first.result() == [None]


NOISE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b'[7, 2, "x", {}]\n',
    b'["1", 2, "x", {}]\n',
    b'[1, 2, "x"]\n',
    b"[" * 60_000 + b"\n",
    b"x" * 2**20,
    b"\xff\n",
    rendezvous._line((1, 2, "x", CODE)).rstrip(),  # a report that is cut off
]


def test_other_programs_that_connect_to_process_0_do_no_harm(port):
    def connect():
        while True:
            try:
                return socket.create_connection(("127.0.0.1", port))
            except ConnectionRefusedError:
                time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        first = pool.submit(meet, port, [(0, 2, CODE)], 600)
        stack.enter_context(connect())  # says nothing, for as long as the others meet
        for noise in NOISE:
            with connect() as one, contextlib.suppress(OSError):
                one.sendall(noise)
                one.shutdown(socket.SHUT_WR)
                while one.recv(100):  # until process 0 has read it and closes
                    pass
        assert meet(port, [(1, 2, CODE)]) == [None]
        assert first.result() == [None]
