"""The two Triton kernels of `winograd_triton`; imported only where Triton is."""

# mypy: ignore-errors
import triton
import triton.language as tl

__all__ = ["input_kernel", "output_kernel"]

# Sizes that differ from layer to layer: not compiled anew where one of them is 1, or a multiple of
# 16. Channels are left out: that they are such a multiple makes loads wide.
SIZES = ("tiles", "depth", "height", "width", "n_d", "n_h", "n_w", "p_d", "p_h", "p_w", "used")


@triton.jit(do_not_specialize=SIZES)
def input_kernel(
    x_ptr, v_ptr, depth_rows_ptr, slots_ptr, tiles, channels, depth, height, width,
    n_d, n_h, n_w, p_d, p_h, p_w, used,
    B_H: tl.constexpr, B_W: tl.constexpr, M_D: tl.constexpr, M_H: tl.constexpr, M_W: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write V (K, tiles, channels) from x (N, depth, height, width, channels)."""
    # The coordinate in depth comes first: neighbours read the same part of x. It shares an axis
    # with the tiles, since only the first axis of a grid may be longer than 65,535.
    a = tl.program_id(0) % used
    p = (tl.program_id(0) // used * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (p < tiles) & (c < channels)
    w0 = (p % n_w) * M_W - p_w
    h0 = (p // n_w % n_h) * M_H - p_h
    d0 = (p // (n_w * n_h) % n_d) * M_D - p_d
    sample = (p // (n_w * n_h * n_d)).to(tl.int64)
    here = x_ptr + (((sample * depth + d0) * height + h0) * width + w0) * channels + c
    there = v_ptr + p.to(tl.int64) * channels + c
    column = tiles.to(tl.int64) * channels
    plane = ()
    for h in tl.static_range(M_H + 2):
        for w in tl.static_range(M_W + 2):
            in_plane = inside & (h0 + h >= 0) & (h0 + h < height)
            in_plane = in_plane & (w0 + w >= 0) & (w0 + w < width)
            total = tl.full((BLOCK_P, BLOCK_C), 0, tl.float32)
            for d in tl.static_range(M_D + 2):
                factor = tl.load(depth_rows_ptr + a * (M_D + 2) + d)
                known = in_plane & (d0 + d >= 0) & (d0 + d < depth)
                offset = ((d * height + h) * width + w) * channels
                value = tl.load(here + offset, mask=known, other=0.0)
                total += factor * value.to(tl.float32)
            plane = plane + (total,)  # noqa: RUF005  # Triton's tuples know only this
    for b in tl.static_range(M_H + 2):
        line = ()
        for w in tl.static_range(M_W + 2):
            total = tl.full((BLOCK_P, BLOCK_C), 0, tl.float32)
            for h in tl.static_range(M_H + 2):
                if B_H[b][h] != 0:
                    total += B_H[b][h] * plane[h * (M_W + 2) + w]
            line = line + (total,)  # noqa: RUF005
        for e in tl.static_range(M_W + 2):
            slot = tl.load(slots_ptr + (a * (M_H + 2) + b) * (M_W + 2) + e)
            if slot >= 0:
                total = tl.full((BLOCK_P, BLOCK_C), 0, tl.float32)
                for w in tl.static_range(M_W + 2):
                    if B_W[e][w] != 0:
                        total += B_W[e][w] * line[w]
                place = there + slot * column
                tl.store(place, total.to(v_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    m_ptr, bias_ptr, y_ptr, depth_rows_ptr, slots_ptr, tiles, channels, depth, height, width,
    n_d, n_h, n_w, used,
    A_H: tl.constexpr, A_W: tl.constexpr, M_D: tl.constexpr, M_H: tl.constexpr, M_W: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write y (N, depth, height, width, channels) from M (K, tiles, channels)."""
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (p < tiles) & (c < channels)
    w0 = (p % n_w) * M_W
    h0 = (p // n_w % n_h) * M_H
    d0 = (p // (n_w * n_h) % n_d) * M_D
    sample = (p // (n_w * n_h * n_d)).to(tl.int64)
    here = m_ptr + p.to(tl.int64) * channels + c
    there = y_ptr + (((sample * depth + d0) * height + h0) * width + w0) * channels + c
    column = tiles.to(tl.int64) * channels
    nothing = tl.full((BLOCK_P, BLOCK_C), 0, tl.int32)
    start = tl.full((BLOCK_P, BLOCK_C), 0, tl.float32)
    if BIAS:
        start = start + tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    for i in range(M_D):  # not unrolled: one plane of outputs after the other
        plane = ()
        for b in tl.static_range(M_H + 2):
            for e in tl.static_range(M_W + 2):
                total = tl.full((BLOCK_P, BLOCK_C), 0, tl.float32)
                for a in range(used):
                    factor = tl.load(depth_rows_ptr + i * used + a)
                    slot = tl.load(slots_ptr + (a * (M_H + 2) + b) * (M_W + 2) + e)
                    known = inside & (slot + nothing >= 0)
                    value = tl.load(here + slot * column, mask=known, other=0.0)
                    total += factor * value.to(tl.float32)
                plane = plane + (total,)  # noqa: RUF005
        for j in tl.static_range(M_H):
            line = ()
            for e in tl.static_range(M_W + 2):
                total = tl.full((BLOCK_P, BLOCK_C), 0, tl.float32)
                for b in tl.static_range(M_H + 2):
                    if A_H[j][b] != 0:
                        total += A_H[j][b] * plane[b * (M_W + 2) + e]
                line = line + (total,)  # noqa: RUF005
            for k in tl.static_range(M_W):
                total = start + 0.0
                for e in tl.static_range(M_W + 2):
                    if A_W[k][e] != 0:
                        total += A_W[k][e] * line[e]
                known = inside & (d0 + i < depth) & (h0 + j < height) & (w0 + k < width)
                offset = ((i * height + j) * width + k) * channels
                tl.store(there + offset, total.to(y_ptr.dtype.element_ty), mask=known)
