"""A stack of blocks as a loop in Python and as a `scan`, for tests of what loops change and what they must not."""

from jax import lax


def stacked(block):
    """`(unrolled, scanned, nested)`: blocks `block(w, b, x)` one after the other; nested runs the scan twice in a scan."""

    def unrolled(params, x):
        for w, b in zip(*params, strict=True):
            x = block(w, b, x)
        return x

    def scanned(params, x):
        return lax.scan(lambda x, wb: (block(*wb, x), None), x, params)[0]

    def nested(params, x):
        return lax.scan(lambda x, _: (scanned(params, x), None), x, None, length=2)[0]

    return unrolled, scanned, nested
