# SPDX-License-Identifier: Apache-2.0
"""Measuring on other machines through TVM's RPC: its tracker, its server, its protocol.

    python -m tvm.exec.rpc_tracker --port 9190                          # anywhere
    python -m tvmmoe.tuning.rpc --tracker HOST:9190 --key h100          # on every machine with the GPU
    python -m tvmmoe.tune --target sm90a --rpc HOST:9190:h100 ...       # searches and compiles, needs no GPU

The second command is TVM's server with two functions more: a library that was uploaded is checked and timed there by the same
:class:`~tvmmoe.tuning.worker.Worker` as on a machine of one's own. TVM's RPC trusts whoever reaches its ports.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import socket
from pathlib import Path
from typing import Any

import tvm_ffi
from tvm import rpc

from tvmmoe.errors import ArgumentError
from tvmmoe.tuning.tasks import Task
from tvmmoe.tuning.worker import Worker

MEASURE, DEVICE = "tvmmoe.tune.measure", "tvmmoe.tune.device_name"


@functools.cache
def _worker(module: str) -> Worker:
    """The session's worker; its process ends with the session's."""
    return Worker(module)


def _measure(module: str, task: str, library: str, config: str, timeout_s: float) -> str:
    """Reply of the worker as JSON; ``library`` was uploaded before."""
    worker = _worker(module)
    worker.timeout_s = timeout_s
    path = tvm_ffi.get_global_func("tvm.rpc.server.workpath")(library)
    return json.dumps(worker.measure(Task(**json.loads(task)), path, json.loads(config)))


def register() -> None:
    """Add our functions to a server."""
    tvm_ffi.register_global_func(MEASURE, _measure, override=True)
    tvm_ffi.register_global_func(DEVICE, lambda module: importlib.import_module(module).device_name(), override=True)


class RemoteWorker:
    """As :class:`~tvmmoe.tuning.worker.Worker`, on whichever server of a key the tracker hands out."""

    def __init__(self, module: str, address: str, timeout_s: float) -> None:
        """``address``: host:port:key."""
        parts = address.rsplit(":", 2)
        if len(parts) != 3 or not parts[1].isdigit():
            raise ArgumentError(f"--rpc: got {address!r}, expected host:port:key")
        self.module, self.timeout_s, self.key = module, timeout_s, parts[2]
        try:
            socket.create_connection((parts[0], int(parts[1])), 5).close()  # TVM would try for a minute
            self.tracker = rpc.connect_tracker(parts[0], int(parts[1]))
        except (OSError, RuntimeError) as error:
            raise ArgumentError(f"--rpc: no tracker answers at {parts[0]}:{parts[1]} ({error})") from error
        self.session: rpc.RPCSession | None = None
        self.uploaded: set[str] = set()

    def _connect(self) -> rpc.RPCSession:
        if self.session is None:
            self.session, self.uploaded = self.tracker.request(self.key), set()
        return self.session

    def stop(self) -> None:
        """End the session."""
        self.session = None

    def device_name(self) -> str:
        """What the records hold for."""
        return str(self._connect().get_function(DEVICE)(self.module))

    def measure(self, task: Task, artifact: str, config: dict[str, int]) -> dict[str, Any]:
        """{"us"} or {"error"}; a lost session gets one more try on another."""
        for is_retry in (False, True):
            try:
                return self._request(task, Path(artifact), config)
            except Exception as error:  # TVM raises whatever the connection died of
                self.stop()
                if is_retry:
                    return {"error": f"{type(error).__name__}: {error}"[:500]}

    def _request(self, task: Task, library: Path, config: dict[str, int]) -> dict[str, Any]:
        session = self._connect()
        if library.name not in self.uploaded:
            session.upload(str(library), library.name)
            self.uploaded.add(library.name)
        arguments = self.module, json.dumps(dataclasses.asdict(task)), library.name, json.dumps(config)
        return json.loads(str(session.get_function(MEASURE)(*arguments, float(self.timeout_s))))


def main(argv: list[str] | None = None) -> None:
    """Run a server until it is stopped."""
    parser = argparse.ArgumentParser(prog="python -m tvmmoe.tuning.rpc", description=__doc__.splitlines()[0])
    parser.add_argument("--tracker", required=True, help="host:port")
    parser.add_argument("--key", required=True, help="name of this kind of machine")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=9090, help="the first one tried")
    options = parser.parse_args(argv)
    host, port = options.tracker.rsplit(":", 1)
    server = rpc.Server(
        options.host, options.port, options.port + 100, tracker_addr=(host, int(port)), key=options.key,
        server_init_callback=importlib.import_module("tvmmoe.tuning.rpc").register,  # by name, not out of __main__
    )  # fmt: skip
    server.proc.join()


if __name__ == "__main__":
    main()
