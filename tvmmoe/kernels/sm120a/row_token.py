# SPDX-License-Identifier: Apache-2.0
"""row_token: the inverse of expanded_idx_to_permuted_idx, so that gemm1 finds the token of a permuted row.

grid     one thread a (token, slot) pair; rows of padding keep what they hold, nobody asks for them
"""

from tvmmoe.kernels.sm80.intrinsics import grid_dependency
from tvmmoe.kernels.sm90a.trace import address, cast, if_, kernel, let, load, store_to

THREADS = 256


def row_token(a) -> None:
    """Emit the kernel."""
    pairs = a.num_tokens * a.top_k
    with kernel("row_token", cast((pairs + THREADS - 1) // THREADS, "int32"), THREADS) as thread:
        pair = let(cast(thread.cta, "int64") * THREADS + cast(thread.tid, "int64"))
        grid_dependency()
        with if_(pair < pairs):
            row = load("int32", address(a.result("expanded_idx_to_permuted_idx"), pair * 4))
            with if_(row >= 0):
                store_to(
                    "int32", address(a.ws["row_token"], cast(row, "int64") * 4), let(cast(pair // a.top_k, "int32"))
                )
