# SPDX-License-Identifier: Apache-2.0
"""The Hopper operator: TIRx kernels, their composition into one packed call, and the build of its artifacts."""
