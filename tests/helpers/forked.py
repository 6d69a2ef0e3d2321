"""Runs scripts in forks of a process that has imported PyTorch, which takes seconds each time.

A fork has the libraries, none of our modules. It is a process of its own like one that is started
afresh: with its own streams, environment, working directory, exit code and end of the interpreter.
Ranks are forked in place of torchrun's: with its variables, and if one fails the others are told
to stop. What is about torchrun itself runs under torchrun.
"""

import atexit
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

STOP_SEC = 30  # from SIGTERM to SIGKILL, as under torchrun
_STREAMS = 2
_server: tuple[subprocess.Popen, socket.socket] | None = None


# ------------------------------------------------------------------------------ in the test process

def run(args: Sequence[str], cwd: Path, ranks: int, timeout: float) -> list[
        subprocess.CompletedProcess]:
    """Runs a script, `args[0]`, and returns what each rank said and its exit code.

    Args:
        args: the script and its arguments.
        cwd: where to run it.
        ranks: how many processes of one group; 0 for one process without a group.
        timeout: seconds after which all is killed.

    Raises:
        subprocess.TimeoutExpired: it did not end in time.
    """
    process, connection = _start()
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
                   for _ in range(_STREAMS * max(ranks, 1))]
        request = json.dumps({"args": [str(arg) for arg in args], "cwd": str(cwd), "ranks": ranks,
                              "env": dict(os.environ)}).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")],
                        [stream.fileno() for stream in streams])
        connection.sendall(request)
        connection.settimeout(timeout)
        try:
            codes = json.loads(connection.recv(1 << 16))
        except TimeoutError as error:
            _stop()
            raise subprocess.TimeoutExpired(list(args), timeout) from error
        texts = []
        for stream in streams:
            stream.seek(0)
            texts.append(stream.read())
    return [subprocess.CompletedProcess(list(args), code, *texts[_STREAMS * i:][:_STREAMS])
            for i, code in enumerate(codes)]


def _start() -> tuple[subprocess.Popen, socket.socket]:
    """Returns the server of this process, started at its first use."""
    global _server
    if _server is None:
        here, there = socket.socketpair()
        process = subprocess.Popen([sys.executable, __file__, str(there.fileno())],
                                   pass_fds=[there.fileno()], stdin=subprocess.DEVNULL,
                                   start_new_session=True)
        there.close()
        atexit.register(_stop)
        _server = process, here
    return _server


def _stop() -> None:
    """Ends the server and all that it runs."""
    global _server
    if _server is not None:
        process, connection = _server
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        connection.close()
        _server = None


# ------------------------------------------------------------------------------------ in the server

def _serve(connection: socket.socket) -> dict | None:
    """Forks for every request; returns what to run in a fork, None in the server at the end."""
    while True:
        head, streams, _, _ = socket.recv_fds(connection, 8, 64)
        if not head:
            return None
        request = json.loads(_receive(connection, int.from_bytes(head, "big")))
        port, pids = _free_port(), []
        for rank in range(max(request["ranks"], 1)):
            pid = os.fork()
            if not pid:
                connection.close()
                _become(request, rank, port, streams[_STREAMS * rank:][:_STREAMS])
                for stream in streams:
                    os.close(stream)
                return request
            pids.append(pid)
        for stream in streams:
            os.close(stream)
        connection.sendall(json.dumps(_wait(pids)).encode())


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += connection.recv(size - len(data))
    return data


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _become(request: dict, rank: int, port: int, streams: list[int]) -> None:
    """Makes this fork look like a process started for the script."""
    for target, stream in enumerate(streams, start=1):
        os.dup2(stream, target)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if size := request["ranks"]:
        os.environ.update({
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    sys.argv = request["args"]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[0:1] = [str(Path(sys.argv[0]).resolve().parent), *filter(None, paths)]
    random.seed()


def _wait(pids: list[int]) -> list[int]:
    """Returns the exit codes; when one has failed, the others are told to stop."""
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        left = set(pids) - codes.keys()
        if left and deadline is None and any(codes.values()):
            deadline = time.monotonic() + STOP_SEC
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        elif left and deadline is not None and time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    import runpy

    import click  # noqa: F401
    import numpy as np
    import PIL.Image  # noqa: F401
    import psutil  # noqa: F401
    import requests  # noqa: F401
    import scipy.linalg  # noqa: F401
    import torch.distributed  # noqa: F401
    import torch.utils.data  # noqa: F401
    import tqdm  # noqa: F401

    if (_request := _serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        np.random.seed()
        runpy.run_path(_request["args"][0], run_name="__main__")
