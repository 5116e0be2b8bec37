"""The checks of a kernel: its answer is a row-stochastic matrix, by a pure function."""

from __future__ import annotations

import copy

import torch

from tokenflow.propagation import Propagation
from tokenflow.propagation.kernel_contract import TOLERANCE
from tokenflow.testing.checks import (
    Check,
    anew,
    configuration_round_trip,
    interface_stated,
    require,
    run_all,
    unchanged_state,
)
from tokenflow.testing.kernel_call import FRAMES, SQUARE, KernelCall

OTHERS = ((3, 5), (6, 4))


def check_kernel(kernel: Propagation) -> None:
    """Runs all checks of a kernel; raises `ConformanceError` at the first that fails."""
    run_all(kernel_checks(kernel))


def kernel_checks(kernel: Propagation) -> list[Check]:
    """All checks that apply to a kernel, to be called one by one."""
    functions = [
        index_range, non_negative, rows_sum_to_one, device_and_dtype, determinism,
        calls_independent, inputs_unchanged, global_state_unchanged, branch_order,
        non_square_sites, one_frame_windows, frames_independent, cache_key_as_text,
        configuration_round_trip, interface_stated,
    ]  # fmt: skip
    if kernel.identity_at_keyframes:
        functions.append(identity_at_keyframes)
    return [Check(kernel, function) for function in functions]


def index_range(kernel: Propagation) -> None:
    KernelCall.random(kernel).ask(kernel, "range")


def non_negative(kernel: Propagation) -> None:
    KernelCall.random(kernel).ask(kernel, "sign")


def rows_sum_to_one(kernel: Propagation) -> None:
    KernelCall.random(kernel).ask(kernel, "rows")


def device_and_dtype(kernel: Propagation) -> None:
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    call = KernelCall.random(kernel)
    for device in [*devices, *([accelerator] if accelerator is not None else [])]:
        for dtype in (torch.float32, torch.bfloat16):
            given = KernelCall(
                call.source.to(device, dtype), call.keys.to(device, dtype), call.window
            )
            found = given.ask(kernel, "device", "dtype", "rows")
            values = given.keys[None]
            require(
                found.gather(values).dtype == dtype, f"gathered values of dtype {dtype}",
                found.gather(values).dtype, "do not override Correspondence.gather",
            )  # fmt: skip


def determinism(kernel: Propagation) -> None:
    call = KernelCall.random(kernel)
    answers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        answers.append(call.matrix(kernel))
    require(
        torch.equal(*answers), "the same answer to the same call, whatever torch's random state",
        f"answers that differ by up to {(answers[0] - answers[1]).abs().max():.4g}",
        "draw nothing at random and keep nothing between calls",
    )  # fmt: skip


def calls_independent(kernel: Propagation) -> None:
    calls = [KernelCall.random(kernel, seed=step) for step in (0, 1)]  # of the same window
    alone = []
    for call in calls:
        with anew(kernel) as other:
            alone.append(call.matrix(other))
    require(
        all(map(torch.equal, alone, [call.matrix(kernel) for call in calls])),
        "the same answer to a call whatever was asked before",
        "another for the same window at another step",
        "keep nothing between calls, or by what it was computed from: the tokens change",
    )  # fmt: skip


def global_state_unchanged(kernel: Propagation) -> None:
    call = KernelCall.random(kernel)
    with unchanged_state():
        call.ask(kernel)


def inputs_unchanged(kernel: Propagation) -> None:
    call = KernelCall.random(kernel)
    tensors = (call.source, call.keys, call.window.neighbours, call.window.blend)
    before = [tensor.clone() for tensor in tensors]
    call.ask(kernel)
    require(
        all(map(torch.equal, tensors, before)), "the given tensors left as they were",
        "a tensor changed in place", "work on a copy: the engine uses them again",
    )  # fmt: skip


def branch_order(kernel: Propagation) -> None:
    call = KernelCall.random(kernel)
    found, keys = call.ask(kernel), call.keys
    branches = torch.stack([keys, 2 * keys + 1, keys.flip(-1)])
    order = [2, 0, 1]
    require(
        torch.equal(found.gather(branches[order]), found.gather(branches)[order]),
        "the same correspondence in every branch, in any order", "values that depend on the order",
        "do not override Correspondence.gather",
    )  # fmt: skip


def non_square_sites(kernel: Propagation) -> None:
    for size in OTHERS:
        KernelCall.random(kernel, size=size).ask(kernel, "range", "rows")


def one_frame_windows(kernel: Propagation) -> None:
    for frame in (0, 3, 8):  # before the first keyframe, between two, at one
        KernelCall.random(kernel, range(frame, frame + 1)).ask(kernel, "range", "rows")


def frames_independent(kernel: Propagation) -> None:
    """What results rely on that do not depend on the batch or, later, on the number of ranks."""
    whole = KernelCall.random(kernel, range(FRAMES)).matrix(kernel)
    for frame in range(FRAMES):
        alone = KernelCall.random(kernel, range(frame, frame + 1)).matrix(kernel)[0]
        difference = float((alone - whole[frame]).abs().max())
        require(
            difference <= TOLERANCE, "a frame's weights not to depend on the window's other frames",
            f"weights of frame {frame} that differ by up to {difference:.4g}",
            "treat every frame on its own: how many share a call is the engine's choice",
        )  # fmt: skip


def cache_key_as_text(kernel: Propagation) -> None:
    with unchanged_state():
        said = [kernel.cache_key(), kernel.cache_key(), copy.deepcopy(kernel).cache_key()]
    require(
        all(isinstance(one, str) for one in said) and len(set(said)) == 1,
        "cache_key() to return the same text at every time", said,
        "make it a digest of the files that it depends on, or '' for none",
    )  # fmt: skip


def identity_at_keyframes(kernel: Propagation) -> None:
    for size in (SQUARE, *OTHERS):
        for keyframe in (1, 5, 8):
            found = KernelCall.random(kernel, range(keyframe, keyframe + 1), size).matrix(kernel)[0]
            tokens = len(found)
            own = found[:, keyframe * tokens : (keyframe + 1) * tokens].diagonal()
            require(
                ((own - 1).abs() <= TOLERANCE).all(), "a keyframe's tokens to take themselves",
                f"weights on themselves down to {float(own.min()):.4g} at {size[0]}x{size[1]}",
                "mend it, or set identity_at_keyframes = False",
            )  # fmt: skip
