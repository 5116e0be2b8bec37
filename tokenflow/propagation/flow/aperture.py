"""The aperture problem: a patch on an edge does not show how it moves along the edge."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from tokenflow.propagation.flow.base import beside, smooth, warp

EDGE = 0.1
"""Least contrast of an edge: the structure tensor's larger eigenvalue, squared slopes per pixel of
flow, of values from 0 to 1, summed over channels."""
ONE_WAY = 0.05
"""Edges have one direction if the smaller eigenvalue is below this share of the larger one."""
REACH = 6
"""The disc's radius, in pixels of flow."""
ALIKE = 0.2
"""What moves alike: the standard deviation of flow, in its pixels."""
RIDGE = 0.01
"""Damping: where the disc shows less than this share of its slopes in other directions, flow is the
disc's mean."""
TIMES = 3


def resolve_aperture(
    one: Float[Tensor, "3 height width"],
    other: Float[Tensor, "3 height width"],
    flow: Float[Tensor, "2 h w"],
) -> Float[Tensor, "2 h w"]:
    """A flow whose part along edges of one direction is estimated anew, from a disc around.

    There the flow u that least squares find replaces the part of u₀, the flow so far, along the
    edge, three times over:

        (Σ w ∇I ∇Iᵀ + λ) u = Σ w ∇I (∇I·u₀ + I(p) − I'(p + u₀)) + λ ū

    with sums over the disc's pixels p, weights w by how alike u₀ is, so that what is behind has no
    say, ū their weighted mean, and λ small. After Lucas and Kanade 1981, "An Iterative Image
    Registration Technique with an Application to Stereo Vision".

    Args:
        one: A picture, values from 0 to 1.
        other: Where its points have moved.
        flow: From one to the other, in its own pixels, each of as many of the pictures' on a side.
    """
    (height, width), side = flow.shape[-2:], one.shape[-1] // flow.shape[-1]
    slope = torch.stack(torch.gradient(one, dim=(2, 1))) * side  # in x and y
    structure = avg_pool2d(torch.einsum("ichw,jchw->ijhw", slope, slope), side)
    values, vectors = torch.linalg.eigh(smooth(structure).flatten(2).permute(2, 0, 1))
    at = ((values[:, 1] > EDGE) & (values[:, 0] < ONE_WAY * values[:, 1])).nonzero()[:, 0]
    edge, disc = vectors[at, :, 0], beside(at, height, width, REACH)
    normal = structure.flatten(2).permute(2, 0, 1)[disc]
    for _ in range(TIMES):
        larger = interpolate(flow[None], one.shape[-2:], mode="bilinear")[0]
        moved = (slope * larger[:, None]).sum(dim=0) + one - warp(other, larger * side)
        right = avg_pool2d((slope * moved).sum(dim=1), side).flatten(1).T[disc]
        before = flow.flatten(1).T
        distance = (before[disc] - before[at, None]).square().sum(dim=2)
        weight = torch.softmax(-distance / (2 * ALIKE**2), dim=1)
        matrix = torch.einsum("nk,nkij->nij", weight, normal)
        damping = RIDGE * matrix.diagonal(dim1=1, dim2=2).sum(dim=1) + 1e-6  # flat discs
        sums, mean = torch.einsum("nk,snki->sni", weight, torch.stack([right, before[disc]]))
        ridge = damping[:, None, None] * torch.eye(2)
        solved = torch.linalg.solve(matrix + ridge, sums + damping[:, None] * mean)
        change = ((solved - before[at]) * edge).sum(dim=1, keepdim=True) * edge
        flow = before.index_add(0, at, change).T.unflatten(1, (height, width))
    return flow
