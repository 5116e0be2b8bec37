"""Operations of an edit: those that run, counted, and those that the method needs.

Each multiplication and each addition is one. PyTorch counts matrix products, convolutions and fused
attention; what it does not count are normalisations, activations, sums, the search for the largest
similarity, gathers and copies. The text encoder is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transcription
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tokenflow.propagation import NNField

KINDS = ("convolutions", "linear layers", "attention", "matching")
Operations = Counter[str]
"""By kind."""
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def fused(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of the CPU's fused attention, which PyTorch's counter does not know."""
    return sdpa_flop_count(query, key, value)


def counter() -> FlopCounterMode:
    """PyTorch's, with the CPU's fused attention."""
    return FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: fused})


@dataclass(frozen=True)
class Layer:
    """A layer of a network, or the products of queries, keys and values of an attention.

    Attributes:
        name: The module's.
        kind: One of `KINDS`.
        operations: Of the passes that were counted.
    """

    name: str
    kind: str
    operations: int


def layers(network: nn.Module, counted: FlopCounterMode) -> list[Layer]:
    """What ran inside a network, in the order of its first pass."""
    root = f"{type(network).__name__}."
    found = {
        name.removeprefix(root): sum(operations.values())
        for name, operations in counted.get_flop_counts().items()
        if name.startswith(root)
    }
    result = []
    for name, operations in found.items():
        module = network.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            result.append(Layer(name, "convolutions", operations))
        elif isinstance(module, nn.Linear):
            result.append(Layer(name, "linear layers", operations))
        elif isinstance(module, Attention):
            projected = sum(
                operations
                for inside, operations in found.items()
                if inside.startswith(f"{name}.")
                and isinstance(network.get_submodule(inside), nn.Linear)
            )
            result.append(Layer(name, "attention", operations - projected))
    return result


def executed(network: nn.Module, run: Callable[[], object]) -> Operations:
    """Of a network in an edit, by tokenflow with NNField or by the transcription."""
    matching = [0]
    with ExitStack() as stack:
        for owner, name in ((NNField, "correspond"), (transcription, "nearest")):
            stack.enter_context(summed(owner, name, matching))
        counted = stack.enter_context(counter())
        run()
    found = Operations()
    for layer in layers(network, counted):
        found[layer.kind] += layer.operations
    found["matching"] = matching[0]
    found["attention"] -= matching[0]
    missed = sum(counted.get_flop_counts()[type(network).__name__].values()) - found.total()
    if missed:
        raise ValueError(f"{missed} operations are of no layer")
    return found


@contextmanager
def summed(owner: Any, name: str, into: list[int]) -> Iterator[None]:
    """A block in which the operations of a function's calls are added up."""
    function = getattr(owner, name)

    def counting(*args: Any, **options: Any) -> Any:
        with counter() as counted:
            result = function(*args, **options)
        into[0] += counted.get_total_flops()
        return result

    setattr(owner, name, counting)
    try:
        yield
    finally:
        setattr(owner, name, function)


@dataclass(frozen=True)
class Plan:
    """An edit whose keyframes all attend to each other.

    Attributes:
        frames: Of the clip.
        size: A latent's height and width.
        words: Tokens of a prompt.
        keyframes: Positions of the keyframes, in each step.
        pnp: What is injected, and when.
    """

    frames: int
    size: tuple[int, int]
    words: int
    keyframes: Sequence[Sequence[int]]
    pnp: transcription.PlugAndPlay


def needed(unet: UNet2DConditionModel, plan: Plan, second: bool = False) -> Operations:
    """Of PnP with TokenFlow, had nothing to be computed that is not read.

    In each step every frame passes once through the network: the source, the negative prompt and
    the prompt; the keyframes do so jointly. Of these passes the following is not needed:

    - of another frame's pass, self-attention with its projections, since its output is propagated;
    - of a keyframe's pass, where queries and keys are injected, those of the edited branches, and
      all of their products but one for both;
    - where features are injected, what leads from the residual block's input to them in the edited
      branches;
    - of the source, what comes after the last self-attention's tokens (and, where they are
      injected, queries and keys);
    - in the second edit of a clip all of the source, and matching.

    Matching is each token's similarity with all tokens of its frame's neighbouring keyframes, where
    the frame is none of these.
    """
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(unet.config)
        x = torch.empty(1, unet.config.in_channels, *plan.size)
        text = torch.empty(1, plan.words, unet.config.cross_attention_dim)
        with counter() as counted:
            network(x, torch.zeros(1), text)
    one, decoder = layers(network, counted), transcription.decoder(network)
    last = max(i for i, layer in enumerate(one) if layer.name.endswith(".attn1"))
    sites = tuple(prefix for _, prefix in decoder)
    names = {module: name for name, module in network.named_modules()}
    features = {
        f"{names[resnet]}.{layer}"
        for resnet, _ in decoder[: plan.pnp.feature_layers]
        for layer in ("conv1", "time_emb_proj", "conv2")
    }
    found, steps = Operations(), len(plan.keyframes)

    for step, drawn in enumerate(plan.keyframes):
        injects = step < int(steps * plan.pnp.attention)
        features_now = features if step < int(steps * plan.pnp.features) else set[str]()
        for position, layer in enumerate(one):
            source = not second and position < last
            if ".attn1" not in layer.name:
                edited = 0 if layer.name in features_now else 2
                found[layer.kind] += (source + edited) * plan.frames * layer.operations
                continue
            injected = injects and layer.name.startswith(sites)
            if layer.kind == "attention":
                # products of queries and keys, and of maps and values, with all keyframes
                products = (1 if injected else 2) + 2
                joint = source + products / 2 * len(drawn)
                found["attention"] += int(joint * len(drawn) * layer.operations)
                others = [frame for frame in range(plan.frames) if frame not in drawn]
                near = transcription.neighbours(others, drawn)
                pairs = len(others) + int((near.earlier != near.later).sum())
                found["matching"] += 0 if second else pairs * layer.operations // 2
            else:
                shared = layer.name.endswith(("to_q", "to_k")) and injected
                source = source or (shared and not second)
                found[layer.kind] += (source + (0 if shared else 2)) * len(drawn) * layer.operations
    return found
