"""Weights and pictures by formula, so that neither has to be stored: `tests/src/synthetic.rs` computes the same bytes.

Both come from one hash: `splitmix64(seed + (index + 1) * 0x9E3779B97F4A7C15)` with the FNV-1a hash of a name as seed.

A weight is `(centre + k) * 2^exponent` with `k` an integer from -spread to spread taken from the hash. As |centre + k| stays
under 256 and the exponents are moderate, every value is exact in bf16, f16 and f32 alike: the same references hold for all three.
"""
import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def hashes(name: str, index: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = np.uint64(fnv1a(name.encode())) + (index.astype(np.uint64) + np.uint64(1)) * GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def weight(name: str, shape, centre: int, spread: int, exponent: int, zero_rows=()) -> np.ndarray:
    """f32 of the given shape; the rows named are zeros."""
    assert abs(centre) + spread < 256 and -20 <= exponent <= 0
    count = int(np.prod(shape))
    k = (hashes(name, np.arange(count)) >> np.uint64(32)).astype(np.int64) % (2 * spread + 1) - spread
    values = ((centre + k).astype(np.float64) * 2.0**exponent).astype(np.float32).reshape(shape)
    for row in zero_rows:
        values[row] = 0
    return values


def picture(seed: int, width: int, height: int) -> np.ndarray:
    """[height, width, 3] u8: tiles of random colour under a gradient, with noise in the low bits. Integers only."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    tile = hashes(f"tiles {seed}", ((y // 37) * 1024 + x // 53) * 3 + c) >> np.uint64(56)
    noise = hashes(f"noise {seed}", (y * width + x) * 3 + c) >> np.uint64(60)
    ramp = (x * (c + 1) * 96 // max(width, 1) + y * (3 - c) * 48 // max(height, 1)) % 128
    return ((tile.astype(np.int64) // 2 + ramp) // 2 * 2 % 240 + noise.astype(np.int64)).clip(0, 255).astype(np.uint8)


def checksum(values: np.ndarray) -> str:
    """Sum of (index + 1) x value over unsigned integers, modulo 2^64, in hexadecimal."""
    flat = values.reshape(-1).astype(np.uint64)
    with np.errstate(over="ignore"):
        return f"{int(np.sum(flat * np.arange(1, flat.size + 1, dtype=np.uint64))):016x}"
