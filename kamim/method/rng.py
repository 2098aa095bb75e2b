"""Counter-based random numbers: every draw is a pure function of (seed, epoch, index, stream, draw).

A sample's crop is therefore the same wherever and however often it is computed, a single batch can be
replayed, and a run can resume at any step.

Generator: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The
128-bit counter holds (index, epoch, stream, draw), the 64-bit key holds the seed. Philox is a bijection
of its counter, so under one seed no two draws and no two streams share a counter's output.
"""

import numpy as np

from kamim.method.kernels import kernel

# Streams, one per purpose. A new purpose takes a new number; numbers are never reused.
ORDER = 0
CROP = 1
FLIP = 2
MASK = 3
AUGMENT = 4
ERASE = 5
MIX = 6
# 7 is retired (it seeded torch's generator at every step).
BOOTSTRAP = 8
DROP_PATH = 9
CORRUPT = 10
CHUNK = 11

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


@kernel
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Computes ten rounds of Philox4x32. All arguments and the four results are uint64 below 2**32."""
    for _ in range(10):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
        k0 = (k0 + _W0) & _LOW
        k1 = (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@kernel
def unit(seed, epoch, index, stream, draw):
    """Returns one float64 in [0, 1), with 53 random bits.

    seed: 0 .. 2**64 - 1; epoch, index, stream, draw: 0 .. 2**32 - 1.
    """
    key = np.uint64(seed)
    a, b, _, _ = philox4x32(
        np.uint64(index), np.uint64(epoch), np.uint64(stream), np.uint64(draw), key & _LOW, key >> _32
    )
    return ((a >> np.uint64(5)) * 67108864.0 + (b >> np.uint64(6))) * (1.0 / 9007199254740992.0)


@kernel
def units(seed, epoch, indices, stream, draws):
    """Returns unit() of every index and of draw = 0 .. draws - 1: float64 [len(indices), draws]."""
    out = np.empty((len(indices), draws), np.float64)
    for i in range(len(indices)):
        for d in range(draws):
            out[i, d] = unit(seed, epoch, indices[i], stream, d)
    return out


def permutation(seed: int, epoch: int, n: int, stream: int = ORDER) -> np.ndarray:
    """Returns a permutation of 0 .. n - 1, int64 [n]: of an epoch's samples, unless another stream is given."""
    return np.argsort(units(seed, epoch, np.arange(n), stream, 1)[:, 0], kind="stable")
