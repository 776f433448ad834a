"""The Triton kernel of `fused_update`. Triton compiles this source, so it stands alone."""

import triton
import triton.language as tl


@triton.jit
def _at(address, kind: tl.constexpr, aligned: tl.constexpr):
    """A pointer to fp32, bf16, fp16 or int8 (kinds 0 to 3) at an address in a table."""
    if kind == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif kind == 1:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif kind == 2:
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.int8))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)  # 16 bytes at once
    return pointer


@triton.jit
def _stochastic(numbers, bits):
    words = (numbers.to(tl.int32, bitcast=True) + bits) & -65536
    return words.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _words(places, seed):
    """`moments.random_words`."""
    word = places.to(tl.uint32) + seed.to(tl.uint32)
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


# fmt: off
@triton.jit
def update(
    table, grads, shares, seeds,  # of parameters: (…, COLUMNS) addresses and size, addresses, fp32 shares of lr, int64
    owner, tile,  # of programs, int32: the parameter of each, and its place in it
    device,  # fp32: whether the step is sound, the gradients' factor, both biases
    lr, decay, rest1, rest2, average_share,  # rest: 1 - beta of each moment
    EPSILON: tl.constexpr, KIND: tl.constexpr,  # of the moments: none, fp32, bf16, int8
    GRAD: tl.constexpr, COPY: tl.constexpr,  # dtypes: fp32, bf16, fp16
    AVERAGE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # fmt: on
    me = tl.program_id(0)
    which = tl.load(owner + me)
    row = table + which * COLUMNS
    # The shape is (blocks, BLOCK) for the 8-bit codes' sake; others do not mind.
    blocks = tl.load(tile + me).to(tl.int64) * (TILE // BLOCK) + tl.arange(0, TILE // BLOCK)
    places = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    size = tl.where(tl.load(device) > 0, tl.load(row + 6), 0)  # of a step that is not sound, nothing
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    inside = places < size
    param = _at(tl.load(row + 0), 0, ALIGNED) + places
    p = tl.load(param, mask=inside, other=0.0)
    if KIND != 0:
        grad = tl.load(_at(tl.load(grads + which), GRAD, ALIGNED) + places, mask=inside, other=0.0).to(tl.float32)
        grad = grad * tl.load(device + 1)
        rate = lr * tl.load(shares + which)
        bias1 = tl.load(device + 2)
        bias2 = tl.load(device + 3)
        first_at = _at(tl.load(row + 1), 0 if KIND == 1 else (1 if KIND == 2 else 3), ALIGNED) + places
        first = tl.load(first_at, mask=inside, other=0).to(tl.float32)
        if KIND == 3:
            # A scale and a second moment for each block.
            in_block = blocks * BLOCK < size
            scale_at = _at(tl.load(row + 3), 0, False) + blocks
            second_at = _at(tl.load(row + 2), 0, False) + blocks
            first = first * tl.load(scale_at, mask=in_block, other=0.0)[:, None]
            second = tl.load(second_at, mask=in_block, other=0.0)
            second += (tl.sum(grad * grad, axis=1) / BLOCK - second) * rest2
            tl.store(second_at, second, mask=in_block)
            divisor = (tl.sqrt_rn(second) / bias2 + EPSILON)[:, None]
        else:
            second_at = _at(tl.load(row + 2), 0 if KIND == 1 else 1, ALIGNED) + places
            second = tl.load(second_at, mask=inside, other=0.0).to(tl.float32)
            second += (grad * grad - second) * rest2
            divisor = tl.sqrt_rn(second) / bias2 + EPSILON
        first += (grad - first) * rest1
        p = p * (1 - rate * decay) - first / divisor * (rate / bias1)
        tl.store(param, p, mask=inside)
        # Store the moments.
        if KIND == 1:
            tl.store(first_at, first, mask=inside)
            tl.store(second_at, second, mask=inside)
        else:
            words = _words(places, tl.load(seeds + which))
            low = (words & 0xFFFF).to(tl.int32)
            if KIND == 2:
                tl.store(first_at, _stochastic(first, low), mask=inside)
                tl.store(second_at, _stochastic(second, (words >> 16).to(tl.int32)), mask=inside)
            else:
                scale = tl.max(tl.abs(first), axis=1) / CODES
                codes = tl.floor(first / tl.maximum(scale, 1.1754943508222875e-38)[:, None] + low / 65536.0)
                codes = tl.minimum(tl.maximum(codes, -CODES), CODES)
                tl.store(first_at, codes.to(tl.int8), mask=inside)
                tl.store(scale_at, scale, mask=in_block)
    if AVERAGE:
        average_at = _at(tl.load(row + 4), 0, ALIGNED) + places
        average = tl.load(average_at, mask=inside, other=0.0)
        tl.store(average_at, average + (p - average) * average_share, mask=inside)
    if COPY != 0:
        tl.store(_at(tl.load(row + 5), COPY, ALIGNED) + places, p, mask=inside)
