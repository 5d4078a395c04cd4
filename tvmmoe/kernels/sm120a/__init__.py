# SPDX-License-Identifier: Apache-2.0
"""Consumer Blackwell (sm_120a, sm_121a): FP4 weights times FP4 or FP8 activations on block-scaled mma.sync."""
