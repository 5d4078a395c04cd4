# SPDX-License-Identifier: Apache-2.0
"""Workspace of the portable operator: Hopper's, whose stages it shares."""

from tvmmoe.kernels.sm90a.layout import workspace_bytes

__all__ = ["workspace_bytes"]
