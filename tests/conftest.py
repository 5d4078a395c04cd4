# SPDX-License-Identifier: Apache-2.0
"""Tests marked ``gpu`` are collected everywhere and skipped without CUDA."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
