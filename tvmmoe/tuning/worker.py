# SPDX-License-Identifier: Apache-2.0
"""Measuring in a process of its own: a candidate that hangs, crashes or corrupts the CUDA context costs a restart.

One JSON line a request on stdin, one a reply on a pipe: {"task", "artifact", "config"} -> {"us"} or {"error"}.
Several tunings of one machine take turns, request by request: while one measures, another searches.
"""

import dataclasses
import fcntl
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
from typing import Any

from tvmmoe.tuning.tasks import Task

TURNS = "tvmmoe_tune.lock"  # in the temporary folder of the machine
START_S = 300.0
ENDED = {"error": "the process ended, twice"}


class Worker:
    """Handle of the process; it starts with the first request."""

    def __init__(self, module: str, timeout_s: float = 60.0) -> None:
        self.module, self.timeout_s = module, timeout_s
        self.process: subprocess.Popen | None = None
        self.replies = -1
        self.num_starts = 0
        self.turns = open(os.path.join(tempfile.gettempdir(), TURNS), "a")

    def _start(self) -> None:
        self.replies, write = os.pipe()
        command = [sys.executable, "-m", "tvmmoe.tuning.worker", self.module, str(write)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[write], text=True)
        os.close(write)
        self.num_starts += 1
        self._read_line(START_S)  # importing torch and TVM is not the candidate's time

    def stop(self) -> None:
        """Kill the process; the next request starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            os.close(self.replies)
            self.process = None

    def measure(self, task: Task, artifact: str, config: dict[str, int]) -> dict[str, Any]:
        """{"us"} or {"error"}; a candidate that ends the process gets one more try in a fresh one."""
        fcntl.flock(self.turns, fcntl.LOCK_EX)
        try:
            return self._request(task, artifact, config) or self._request(task, artifact, config) or ENDED
        finally:
            fcntl.flock(self.turns, fcntl.LOCK_UN)

    def _request(self, task: Task, artifact: str, config: dict[str, int]) -> dict[str, Any] | None:
        """A reply; None if the process ended."""
        if self.process is None:
            self._start()
        request = dict(task=dataclasses.asdict(task), artifact=artifact, config=config)
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self._read_line(self.timeout_s)
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        self.stop()
        return {"error": f"no answer within {self.timeout_s:g} s"} if line is None else None

    def _read_line(self, timeout_s: float) -> str | None:
        """A reply; "" if the process ended, None after the timeout."""
        data = b""
        while not data.endswith(b"\n"):
            if not select.select([self.replies], [], [], timeout_s)[0]:
                return None
            chunk = os.read(self.replies, 65536)
            if not chunk:
                return ""
            data += chunk
        return data.decode()


def main() -> None:
    """The worker process."""
    module, replies = importlib.import_module(sys.argv[1]), os.fdopen(int(sys.argv[2]), "w")
    print("ready", file=replies, flush=True)
    current, bench = None, None
    for line in sys.stdin:
        request = json.loads(line)
        task = Task(**request["task"])
        try:
            if task != current:
                bench, current = None, None  # free the last one's memory first
                bench, current = module.Bench(task), task
            reply = {"us": bench.measure(request["artifact"], request["config"])}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(reply), file=replies, flush=True)
        if "CUDA error" in reply.get("error", ""):
            os._exit(1)  # nothing that follows in this context can be trusted


if __name__ == "__main__":
    main()
