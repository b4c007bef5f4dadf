"""How far a graph's outputs are from the model's, and how far they may be."""

import torch
from torch import Tensor

# (share of a value, share of the tensor's largest value or of 1 where that is less). Rounding in a sum is relative to
# its largest terms, hence the second. Another runtime sums in another order, fuses operators and approximates exp and
# erf: 1e-6 is usual in fp32, 1e-5 is seen in deep networks, and a wrong graph is off by far more. Half precisions have
# 3 and 2 decimal digits, which every layer rounds to.
TOLERANCE = (1e-3, 1e-4)
TOLERANCES = {torch.float16: (1e-2, 1e-2), torch.bfloat16: (5e-2, 5e-2)}
FLIPPED = 1e-3  # share of whole numbers (an argmax, say) that may differ: ties within rounding


class Wrong(Exception):
    """Outputs that are not the model's; the message says how."""


def difference(found: list[Tensor], expected: list[Tensor], values: bool = True) -> float:
    """Return the largest absolute difference. `values`: False compares kinds and shapes only.

    Raises:
        Wrong: it is beyond tolerance.
    """
    if len(found) != len(expected):
        raise Wrong(f"{len(found)} outputs instead of {len(expected)}")
    return max(
        _of_one(a.cpu(), b.cpu(), f"output {i}", values) for i, (a, b) in enumerate(zip(found, expected, strict=True))
    )


def _of_one(found: Tensor, expected: Tensor, name: str, values: bool) -> float:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        kinds = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (found, expected)]
        raise Wrong(f"{name} is {kinds[0]} instead of {kinds[1]}")
    if not values or not expected.numel():
        return 0.0
    if not expected.dtype.is_floating_point and not expected.dtype.is_complex:
        share = (found != expected).double().mean().item()
        if share > FLIPPED:
            raise Wrong(f"{name}: {share:.1%} of its whole numbers differ")
        return 0.0
    wide = torch.complex128 if expected.dtype.is_complex else torch.float64
    a, b = found.to(wide), expected.to(wide)
    regular = b.isfinite()
    alike = (a == b) | (a.isnan() & b.isnan())
    if not alike[~regular].all() or not a[regular].isfinite().all():
        raise Wrong(f"{name}: its infinities and nans are elsewhere")
    if not regular.any():
        return 0.0
    apart, size = (a[regular] - b[regular]).abs(), b[regular].abs()
    relative, absolute = TOLERANCES.get(expected.dtype, TOLERANCE)
    allowed = relative * size + absolute * max(1.0, size.max().item())
    if (apart > allowed).any():
        worst = int((apart - allowed).argmax())
        raise Wrong(f"{name} differs by {apart[worst]:.2g} at a value of {size[worst]:.2g}")
    return apart.max().item()
