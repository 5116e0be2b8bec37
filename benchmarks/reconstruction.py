"""How near inversion followed by sampling without an edit comes to the source, by steps.

    python benchmarks/reconstruction.py

prints the table of docs/miniature.md: the latents' RMS error in units of their standard deviation,
and the decoded frames' PSNR, beside that of the VAE alone.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from tokenflow.diffusion import Backbone, invert, reconstruct, source_prediction
from tokenflow.diffusion.inversion import InversionSolver
from tokenflow.metrics import psnr
from tokenflow.miniature.edits import suite


@torch.no_grad()
def main(
    steps: tuple[int, ...] = (10, 50, 200), every: int = 12, solver: InversionSolver = "ddim"
) -> None:
    """Inverts frames of the four clips and samples back.

    Args:
        steps: Of inversion and of sampling alike.
        every: Take every so manieth of a clip's 24 frames.
        solver: Of inversion.
    """
    backbone = Backbone.load("miniature", dtype="float32")
    table = Table("steps", "error / deviation", "PSNR, dB", "VAE alone, dB")
    for number in steps:
        schedule, found = backbone.schedule(number), []
        for edit in suite(24):
            frames, source = edit.clip.frames[::every], str(edit.scene.attributes)
            latents = backbone.encode(frames)
            trajectory = invert(backbone, latents, source, schedule, number, solver=solver)
            predict = source_prediction(backbone, source)
            back = reconstruct(backbone, predict, trajectory, schedule)
            error = float((back - latents).square().mean().sqrt() / latents.std())
            decoded = [psnr(backbone.decode(x).cpu(), frames) for x in (back, latents)]
            found.append([error, *decoded])
        error, back_psnr, vae_psnr = torch.tensor(found).mean(dim=0).tolist()
        table.add_row(str(number), f"{error:.3f}", f"{back_psnr:.1f}", f"{vae_psnr:.1f}")
    Console().print(table)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
