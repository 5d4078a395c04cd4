# SPDX-License-Identifier: Apache-2.0
"""Workspace of the sm_100a operator: that of sm120a, in the same order; with bf16 tokens gemm2 reads z itself."""

from tvmmoe.kernels.sm120a.layout import slices, workspace_bytes

__all__ = ["slices", "workspace_bytes"]
