# SPDX-License-Identifier: Apache-2.0
"""Any GPU since Ampere: FP4 weights decoded in registers, bf16 mma.sync; also the bf16 products of sm120a."""
