"""What an editor's answers must be: each function yields the rules that an answer breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from tokenflow.diffusion import Backbone, Conditioning, Schedule, Source
from tokenflow.editors.base import Batch, Injection, Start, Step
from tokenflow.violations import Violation


def of_branches(found: object) -> Iterator[Violation]:
    """The rule that the answer of `Editor.branches` breaks: "branches"."""
    if not (
        isinstance(found, Mapping)
        and len(found) > 1
        and all(isinstance(word, str) for pair in found.items() for word in pair)
    ):
        yield Violation(
            "branches", "a dict of branches and their prompts, the source first", repr(found),
            "return at least the source's branch and an edited one, with a text each",
        )  # fmt: skip


def of_idle(found: object, step: Step) -> Iterator[Violation]:
    """The rule that the answer of `Editor.idle` breaks: "idle"."""
    edited = step.branches[1:]
    if not isinstance(found, Sequence) or isinstance(found, str) or not {*found} < {*edited}:
        yield Violation(
            "idle", f"some of the edited branches {', '.join(edited)}, not all", repr(found),
            "choose from step.branches[1:], or return () where all run",
        )  # fmt: skip


def of_start(begin: object, source: Source, schedule: Schedule) -> Iterator[Violation]:
    """The rules that the answer of `Editor.start` breaks: "form", "finite", "step"."""
    if not isinstance(begin, Start):
        yield Violation(
            "form", "a Start", type(begin).__name__,
            "return tokenflow.editors.Start(latents, step)",
        )  # fmt: skip
        return
    advice = "start from source.at(step), or from noise of its shape and dtype"
    broken = list(of_tensor(begin.latents, source.clean, "first latents", advice, "form"))
    yield from broken
    if not broken and not begin.latents.isfinite().all():
        yield Violation("finite", "finite first latents", "NaN or infinite values", advice)
    step = begin.step
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < len(schedule):
        yield Violation(
            "step", f"a step from 0 to {len(schedule) - 1}", step,
            "count from the schedule's first step, 0: all steps from there on run",
        )  # fmt: skip


def of_inputs(found: object, x: Tensor, branches: int) -> Iterator[Violation]:
    """The rule that the answer of `Editor.inputs` breaks: "answer"."""
    like = x[None].expand(branches, *x.shape)
    return of_tensor(found, like, "inputs of all branches", "return them for every frame of x")


def of_injections(injections: Sequence[object], model: Backbone) -> Iterator[Violation]:
    """The rule that the answer of `Editor.injections` breaks: "injections"."""
    layers = {name for name, _ in model.network.named_modules()}
    for number, one in enumerate(injections):
        if not (
            isinstance(one, Injection)
            and one.layer in layers
            and (one.function is None or callable(one.function))
            and all(isinstance(share, int | float) for share in (one.begin, one.end))
            and 0 <= one.begin <= one.end <= 1
        ):
            found = " ".join(repr(one).split())
            yield Violation(
                "injections", "Injections into the model's layers, 0 <= begin <= end <= 1",
                f"{found:.80} as number {number}",
                "take the names from model.layers(role) or model.network.named_modules()",
            )  # fmt: skip


def of_injection(result: object, edited: Tensor) -> Iterator[Violation]:
    """The rules that the answer of an injection's function breaks: "answer"."""
    advice = "the function must return all edited branches and frames, in the dtype they came in"
    return of_tensor(result, edited, "the edited output", advice)


def of_advance(result: object, x: Tensor) -> Iterator[Violation]:
    """The rules that the answer of `Editor.advance` breaks: "answer"."""
    advice = "return as many frames as are given, in the dtype they came in"
    return of_tensor(result, x, "latents from advance()", advice)


def of_kept(result: object, clean: Tensor) -> Iterator[Violation]:
    """The rules that the answer of `Editor.kept` breaks: "answer"."""
    advice = "return the source's latents as x has them after the step"
    return of_tensor(result, clean, "latents from kept()", advice)


def of_conditioning(found: object, batch: Batch) -> Iterator[Violation]:
    """The rule that the answer of `Editor.conditioning` breaks: "conditioning"."""
    if not isinstance(found, Conditioning):
        advice = "return batch.conditioning where there is nothing to change"
        yield Violation("conditioning", "a Conditioning", type(found).__name__, advice)
        return
    given = batch.conditioning
    if found.tensors.keys() != given.tensors.keys() or len(found) != len(given):
        yield Violation(
            "conditioning", f"{', '.join(given.tensors)} with {len(given)} rows",
            f"{', '.join(found.tensors)} with {len(found)} rows",
            "keep the names and give a row per branch and frame, as batch.conditioning has",
        )  # fmt: skip
        return
    for name, tensor in found.tensors.items():
        like = given[name]
        if (tensor.dtype, tensor.shape[-1]) != (like.dtype, like.shape[-1]):
            yield Violation(
                "conditioning", f"{name} of dtype {like.dtype} and width {like.shape[-1]}",
                f"{tensor.dtype} and {tensor.shape[-1]}",
                "make it from batch.conditioning, or by model.embed(prompts)",
            )  # fmt: skip


def of_model_inputs(extra: object, model: Backbone) -> Iterator[Violation]:
    """The rule that the answer of `Editor.model_inputs` breaks: "model_inputs"."""
    known = model.further_inputs
    if not isinstance(extra, dict):
        advice = "return {} where there is nothing to add"
        yield Violation("model_inputs", "a dict of network inputs", type(extra).__name__, advice)
    elif wrong := [name for name in extra if name not in known]:
        yield Violation(
            "model_inputs", f"further inputs of the network: {', '.join(sorted(known))}", wrong,
            "leave out what the network does not know or the engine gives itself",
        )  # fmt: skip


def of_cross_attention(found: object, model: Backbone) -> Iterator[Violation]:
    """The rule that the answer of `Editor.cross_attention` breaks: "cross_attention"."""
    known = model.cross_attention()
    wrong = set(found) - known.keys() if isinstance(found, Mapping) else {type(found).__name__}
    if wrong or not all(map(callable, found.values() if isinstance(found, Mapping) else ())):
        yield Violation(
            "cross_attention", "a dict of functions by the names of model.cross_attention()",
            sorted(map(str, wrong)) or "something that is no function",
            f"choose from {', '.join(known) or 'none: this model has no such layers'}",
        )  # fmt: skip


def of_attention(result: object, hidden_states: Tensor) -> Iterator[Violation]:
    """The rule that the answer of a cross-attention's processor breaks: "answer"."""
    advice = "return site.output(attended, **given), for all branches and frames"
    return of_tensor(result, hidden_states, "the layer's output", advice)


def of_tensor(
    value: object, like: Tensor, what: str, advice: str, rule: str = "answer"
) -> Iterator[Violation]:
    """What a tensor does not have in common with another of which it takes the place."""
    if not isinstance(value, Tensor):
        yield Violation(rule, f"{what} in a tensor", type(value).__name__, advice)
    elif value.shape != like.shape:
        expected = f"{what} of shape {tuple(like.shape)}"
        yield Violation(rule, expected, tuple(value.shape), advice)
    elif value.dtype != like.dtype:
        yield Violation(rule, f"{what} of dtype {like.dtype}", value.dtype, advice)
