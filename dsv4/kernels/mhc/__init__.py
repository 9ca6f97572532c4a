"""The three maps of mHC that touch the wide streams. Everything else of mHC works on a few numbers a token.

Contract, T tokens, s streams, d hidden; fp32 arithmetic, under autocast too, a token's bits independent of T:
- mixes(streams [T, s, d], fn [m, s * d], eps) -> [T, m] fp32: (fn . X) * rsqrt(mean(X^2) + eps), X the flattened
  streams;
- collect(weights [T, s], streams [T, s, d]) -> [T, d] in the streams' dtype: sum_j weights_j * stream_j;
- distribute(y [T, d], streams, post [T, s], comb [T, s, s]) -> [T, s, d] in the streams' dtype:
  out_k = post_k * y + sum_j comb_jk * stream_j.
Each has its derivative written out: the automatic one would keep and pass over several copies of the streams.
"""

from dsv4.kernels.mhc.reference import collect, distribute, mixes

__all__ = ["collect", "distribute", "mixes"]
