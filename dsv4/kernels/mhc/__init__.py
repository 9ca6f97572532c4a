"""mHC: several residual streams, read before and written after each sub-layer by token-dependent maps. fp32 inside.

Contract, T tokens, s streams, d hidden; fp32 arithmetic, a token's bits independent of T. A site
has fn [m, s * d], scale and base [m]; rows of fn and entries of base: first the pre weights, then post, then the
combine matrix (row-major, [source stream, target stream]), so m = s * (2 + s) and scale [3]; for a read-out m = s and
scale [1]. Sizes are the model's `hc_mult`, `hc_sinkhorn_iters`, `rms_norm_eps` and `hc_eps`. The maps:
- mix = (fn . X) * rsqrt(mean(X^2) + rms_norm_eps), X a token's flattened streams; then, by scale and base,
  pre = sigmoid + hc_eps, post = 2 * sigmoid, comb = sinkhorn (kernels/sinkhorn);
- hc_pre: x = sum_j pre_j * stream_j, then rms_norm with the sub-layer's weight [d];
- hc_post: out_k = post_k * y + sum_j comb_jk * stream_j;
- hc_head: x = sum_j (sigmoid + hc_eps)_j * stream_j, weights not normalized.
Results have the streams' dtype, post and comb are fp32. Native: at most 16 streams. Source: mHC paper; official
inference kernel.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.mhc import native, reference
from dsv4.kernels.mhc.reference import Sizes

MOST_STREAMS = 16  # limit of the native kernels


def hc_pre(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams [T, s, d] -> (normed sub-layer input [T, d], post [T, s], comb [T, s, s])."""
    op = native if _is_native(streams, fn, scale, base, norm) else reference
    return op.hc_pre(streams, fn, scale, base, norm, sizes)


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Write the sub-layer output y [T, d] into the streams [T, s, d] -> [T, s, d]."""
    op = native if _is_native(streams, y, post, comb) else reference
    return op.hc_post(y, streams, post, comb)


def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, sizes: Sizes) -> Tensor:
    """Read the streams out: [T, s, d] -> [T, d]."""
    op = native if _is_native(streams, fn, scale, base) else reference
    return op.hc_head(streams, fn, scale, base, sizes)


def too_many_streams(count: int) -> str | None:
    """Reason why the native kernels do not take `count` streams, or None."""
    return f"the model has {count} streams, the native kernels take {MOST_STREAMS}" if count > MOST_STREAMS else None


def _is_native(streams: Tensor, *tensors: Tensor) -> bool:
    if not backends.uses_native("mhc", streams, *tensors):
        return False
    obstacle = too_many_streams(streams.shape[1])
    if obstacle is not None:
        backends.decline(obstacle)
    return obstacle is None


__all__ = ["Sizes", "hc_head", "hc_post", "hc_pre", "too_many_streams"]
