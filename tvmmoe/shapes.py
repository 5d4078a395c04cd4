# SPDX-License-Identifier: Apache-2.0
"""Shapes of real models, read from ``schedules/shapes.json``: what is benchmarked, tuned and shown."""

import functools
import json

import torch

from tvmmoe import loader
from tvmmoe.config import ActivationFormat, RoutingMethodType, WeightFormat
from tvmmoe.errors import ArgumentError
from tvmmoe.testing import Case


@functools.cache
def shapes() -> dict[str, dict]:
    """Every shape by name."""
    return json.loads((loader.data_dir("schedules") / "shapes.json").read_text())


def shape_case(
    name: str, num_tokens: int, activation_format: str = "bf16", weight_format: str = "mxfp4", device: str = "cpu"
) -> Case:
    """The call that a model's layer makes, as a :class:`~tvmmoe.testing.Case`.

    Raises
    ------
    ArgumentError
        ``name`` is not in schedules/shapes.json; names those that are.
    """
    if name not in shapes():
        raise ArgumentError(f"shape is {name!r}, expected one of {', '.join(shapes())}")
    fields = dict(shapes()[name])
    has_biases, has_routing_bias = fields.pop("biases", False), fields.pop("routing_bias", False)
    return Case(
        num_tokens=num_tokens,
        activation_format=ActivationFormat[activation_format],
        weight_format=WeightFormat[weight_format],
        routing_method=RoutingMethodType[fields.pop("routing_method")],
        has_gemm1_bias=has_biases,
        has_gemm2_bias=has_biases,
        logits_dtype=torch.bfloat16,
        routing_bias_dtype=torch.float32 if has_routing_bias else None,
        device=device,
        **fields,
    )
