# SPDX-License-Identifier: Apache-2.0
"""Datacenter Blackwell (sm_100a): block-scaled FP4 on tcgen05. Compiled and inspected, never run."""
