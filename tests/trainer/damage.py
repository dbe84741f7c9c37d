"""Damage to bytes, from a seed."""

__all__ = ["mutate"]


def mutate(data, rng):
    """One of: flipped bits, other bytes, a cut, a piece left out, repeated or zeroed."""
    damaged = bytearray(data)
    kind = int(rng.integers(7))
    begin = int(rng.integers(0, max(len(data), 1)))
    length = int(rng.integers(1, 65))
    if kind == 0:
        for _ in range(int(rng.integers(1, 5))):
            damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        damaged[begin : begin + length] = rng.bytes(len(damaged[begin : begin + length]))
    elif kind == 2:
        del damaged[begin:]
    elif kind == 3:
        del damaged[begin : begin + length]
    elif kind == 4:
        damaged[begin:begin] = damaged[begin : begin + length] * int(rng.integers(1, 50))
    elif kind == 5:
        damaged[begin : begin + length] = bytes(len(damaged[begin : begin + length]))
    else:
        # numbers are what lengths and offsets are made of
        digits = [n for n, byte in enumerate(damaged) if 48 <= byte <= 57]
        for _ in range(min(3, len(digits))):
            damaged[digits[int(rng.integers(len(digits)))]] = 48 + int(rng.integers(10))
    return bytes(damaged)
