# SPDX-License-Identifier: Apache-2.0
"""Tests marked ``gpu`` are collected everywhere and skipped without CUDA; with it, they may verify artifacts."""

import os

import pytest
import torch
import verification

from tvmmoe import loader
from tvmmoe.select import ALLOW_UNVERIFIED, targets_of

IS_PARTIAL = pytest.StashKey[bool]()  # gpu tests of a collected file were left out

if torch.cuda.is_available():
    os.environ.setdefault(ALLOW_UNVERIFIED, "1")  # running such artifacts is what verifies them


def pytest_configure(config: pytest.Config) -> None:
    config.stash[IS_PARTIAL] = any("::" in argument for argument in config.args)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.config.stash[IS_PARTIAL] = True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """After a gpu run that shows more than the manifest says, print what to change in it."""
    if not torch.cuda.is_available():
        return
    gpu = {
        outcome: [r.nodeid for r in terminalreporter.stats.get(outcome, ()) if "gpu" in getattr(r, "keywords", ())]
        for outcome in ("passed", "failed", "error")
    }
    is_partial = config.stash[IS_PARTIAL] or config.getoption("numprocesses", None)  # what is left out, xdist's workers see
    gave_up = any(r.when == "call" and "gpu" in r.keywords for r in terminalreporter.stats.get("skipped", ()))
    is_clean = not (gpu["failed"] or gpu["error"] or is_partial or gave_up)
    targets, files = targets_of(torch.device("cuda", torch.cuda.current_device())), loader.manifest().files
    earned = verification.changes(gpu["passed"], is_clean, targets, files)
    for line in verification.lines(earned, files, torch.cuda.get_device_name()):
        terminalreporter.write_line(line)
