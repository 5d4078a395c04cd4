# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's FP4 block-scaled fused Mixture-of-Experts operator, compiled with TVM. See README.md."""

from tvmmoe import layouts, numerics, reference
from tvmmoe.config import ActivationType, RoutingMethodType
from tvmmoe.errors import (
    ArgumentError,
    ArtifactError,
    DtypeError,
    ShapeError,
    TvmMoeError,
    UnsupportedError,
    UnverifiedWarning,
)
from tvmmoe.op import trtllm_fp4_block_scale_moe, workspace_bytes

__version__ = "0.1.0"
__all__ = [
    "ActivationType",
    "ArgumentError",
    "ArtifactError",
    "DtypeError",
    "RoutingMethodType",
    "ShapeError",
    "TvmMoeError",
    "UnsupportedError",
    "UnverifiedWarning",
    "layouts",
    "numerics",
    "reference",
    "trtllm_fp4_block_scale_moe",
    "workspace_bytes",
]
