"""Which attention weights dropout keeps: the bits of fastformer.reference.dropout_mask, by a weight's place alone.

Philox-4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") gives four words at a time, those of
four neighbouring keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


def dropout_threshold(p: float) -> int:
    """The words below this are those of dropped weights; as the 32-bit integer, with a sign, of the same bits."""
    threshold = min(round(p * 2**32), 2**32 - 1)
    return threshold - 2**32 if threshold >= 2**31 else threshold


@triton.jit
def kept_weights(
    dropout_state,  # int64 [2]: seed and offset
    threshold,  # dropout_threshold(p)
    sequence,  # batch * heads + head: a number, or int32 [BLOCK_Q]
    queries,  # int32 [BLOCK_Q]
    first_key,  # a multiple of 4
    BLOCK_K: tl.constexpr,
):
    """bool [BLOCK_Q, BLOCK_K]: whether the weights of these queries for the keys from first_key on are kept."""
    seed = tl.load(dropout_state)
    offset = tl.load(dropout_state + 1).to(tl.uint32)
    fours = (first_key // 4 + tl.arange(0, BLOCK_K // 4)).to(tl.uint32)[None, :]
    queries = queries.to(tl.uint32)[:, None]
    sequences = tl.cast(sequence, tl.uint32)
    if len(sequences.shape) == 1:
        sequences = sequences[:, None]
    # Each depends on the query or on the key alone in the first rounds, where that makes it a vector.
    first, second, third, fourth = tl.random.philox_impl(
        fours, queries, sequences, offset, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), ROUNDS
    )
    # Compared before they are put in their places: bits are cheaper to move.
    bound = tl.cast(threshold, tl.int32).to(tl.uint32, bitcast=True)
    evens = tl.interleave(first >= bound, third >= bound)
    return tl.interleave(evens, tl.interleave(second >= bound, fourth >= bound))
