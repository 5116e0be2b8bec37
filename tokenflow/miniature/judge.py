"""A small classifier of pictures of scenes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_model
from torch import Tensor, nn

from tokenflow.miniature import WEIGHTS
from tokenflow.miniature.scenes import VOCABULARY, Attributes


class Judge(nn.Module):
    """Pattern, colour, shape and background of pictures, wherever the object is in them."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in (
            (3, 32, 2),
            (32, 64, 2),
            (64, 64, 1),
            (64, 96, 2),
            (96, 96, 1),
            (96, 128, 2),
            (128, 128, 1),
        ):
            convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1)
            layers += [convolution, nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(256, len(words)) for name, words in VOCABULARY.items()}
        )

    @classmethod
    def load(cls) -> Judge:
        """The trained judge that the package carries, in float32."""
        judge = cls()
        load_model(judge.half(), str(WEIGHTS / "judge.safetensors"))
        return judge.float().eval()

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n _"]]:
        """Logits for each attribute, of images in 0..1."""
        maps = self.trunk(2 * images - 1)
        features = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        return {name: head(features) for name, head in self.heads.items()}


def labels(attributes: Attributes) -> Int[Tensor, 4]:
    """The classes' indices, in the order of `VOCABULARY`."""
    return torch.tensor(
        [words.index(getattr(attributes, name)) for name, words in VOCABULARY.items()]
    )


@torch.inference_mode()
def answers(
    judge: Judge,
    images: Float[Tensor, "n 3 h w"],
    shown: Attributes | Sequence[Attributes],
) -> dict[str, Bool[Tensor, " n"]]:
    """Whether each image shows what it should, for each attribute."""
    wanted = [shown] * len(images) if isinstance(shown, Attributes) else shown
    truth = torch.stack([labels(a) for a in wanted])
    scores = [judge(part) for part in images.split(32)]
    return {
        name: torch.cat([logits[name] for logits in scores]).argmax(dim=1) == truth[:, i]
        for i, name in enumerate(VOCABULARY)
    }


def accuracy(
    judge: Judge,
    images: Float[Tensor, "n 3 h w"],
    shown: Attributes | Sequence[Attributes],
) -> dict[str, float]:
    """The share of images that show what they should, for each attribute."""
    return {name: float(a.float().mean()) for name, a in answers(judge, images, shown).items()}
