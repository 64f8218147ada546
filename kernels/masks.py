"""Dropout masks: the bits of :mod:`fastlora.dropout`, drawn and applied on tiles.

Byte ``j`` of row ``i`` holds one Philox4x32-7 call with the key ``seed`` and the counter
``i * row_bytes + j``; its lane ``b`` (16 bits) decides element ``8j + b``: kept iff ``lane >= t``.
"""

import triton
import triton.language as tl


@triton.jit
def philox(counter, seed):
    """Four 32-bit words for each 64-bit counter, after 7 rounds."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        high0, low0 = (product0 >> 32).to(tl.uint32), product0.to(tl.uint32)
        high1, low1 = (product1 >> 32).to(tl.uint32), product1.to(tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def draw(rows, bytes, row_bytes, K, t, seed):
    """The mask at ``rows`` (m,) and ``bytes`` (n,) of a row: int32 (m, n), bits past K zero."""
    w0, w1, w2, w3 = philox(rows.to(tl.int64)[:, None] * row_bytes + bytes[None, :], seed)
    # lane >= t with no shift for a high lane, and none kept where t is 65536, which wraps to 0
    limit = (t.to(tl.uint32) << 16) - 1
    mask = ((w0 << 16) > limit).to(tl.int32)
    mask |= (w0 > limit).to(tl.int32) << 1
    mask |= ((w1 << 16) > limit).to(tl.int32) << 2
    mask |= (w1 > limit).to(tl.int32) << 3
    mask |= ((w2 << 16) > limit).to(tl.int32) << 4
    mask |= (w2 > limit).to(tl.int32) << 5
    mask |= ((w3 << 16) > limit).to(tl.int32) << 6
    mask |= (w3 > limit).to(tl.int32) << 7
    inside = tl.minimum(tl.maximum(K - 8 * bytes, 0), 8)
    return mask & ((1 << inside) - 1)[None, :]


@triton.jit
def load(mask, rows, bytes, M, row_bytes):
    """The bytes of a packed mask at ``rows`` and ``bytes``: int32 (m, n), zero outside it."""
    at = mask + rows.to(tl.int64)[:, None] * row_bytes + bytes[None, :]
    inside = (rows < M)[:, None] & (bytes < row_bytes)[None, :]
    return tl.load(at, inside, other=0).to(tl.int32)


@triton.jit
def keep(x, mask):
    """``m∘x``: x (m, 8n) with zero where a bit of the bytes ``mask`` (m, n) is zero."""
    bits = (mask[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.where(tl.reshape(bits, x.shape) != 0, x, 0.0)
