"""What the decode study times beside parallax-core: other libraries, its other solver, its early launches."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import parallax_core

from .decode_arrays import DecodeProblem
from .decode_point import DecodePoint

# A call on one pair of keys and values; returns an output of B x Hq x Dv numbers in that order.
Call = Callable[[Any, Any], Any]


class UnavailableError(RuntimeError):
    """A peer cannot run a point; the message says why."""


class Peer(NamedTuple):
    """A library's decode call, or another way to ours.

    name: in rows. title: in reports. computes: the operation; None for that of any point. gpu: a peer of the
    GPU, or of the CPU. bind: from the problem and the path of FlashAttention-3 to the call; None for our own
    call, launched early.
    """

    name: str
    title: str
    computes: str | None
    gpu: bool
    bind: Callable[[DecodeProblem, str | None], Call] | None


def peers_of(point: DecodePoint, gpu: bool) -> list[Peer]:
    """The peers of a point on the GPU or the CPU: softmax's of every operation, the others of their own."""
    computed = "softmax", point.operation, None
    return [peer for peer in PEERS if peer.gpu == gpu and peer.computes in computed]


def _sdpa_flash(problem: DecodeProblem, _: str | None) -> Call:
    attend = _sdpa(problem)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attend(k, v)

    return call


def _sdpa_any(problem: DecodeProblem, _: str | None) -> Call:
    return _sdpa(problem)


def _sdpa(problem: DecodeProblem) -> Call:
    _need_torch(problem)
    if problem.page_table is not None:
        raise UnavailableError("has no paged cache")
    from torch.nn.functional import scaled_dot_product_attention

    q = problem.q
    grouped = q.shape[2] != problem.caches[0][0].shape[2]

    def call(k, v):
        # One query that sees every key needs no mask; the transposes are the layout that SDPA takes.
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*heads_first, enable_gqa=grouped)

    return call


def _flash_attention_3(problem: DecodeProblem, path: str | None) -> Call:
    _need_torch(problem)
    import torch

    attend = _load_flash_attention_3(path)
    q, device = problem.q, problem.q.device
    batch, _, _, head_size = q.shape
    firsts = torch.arange(batch + 1, device=device, dtype=torch.int32)
    flat_q = q.flatten(0, 1)
    if problem.page_table is None:
        # vLLM builds the variable-length entry alone: a dense batch goes in as sequences of one length.
        length = problem.caches[0][0].shape[1]
        keys, paged = {"cu_seqlens_k": firsts * length}, None
    else:
        length, paged = int(problem.lengths.max()), problem.page_table
        keys = {"seqused_k": problem.lengths}

    def call(k, v):
        if paged is None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        return attend(
            flat_q,
            k,
            v,
            *(None,) * 4,  # new keys and values, the absorbed query, the output
            firsts,
            keys.get("cu_seqlens_k"),
            *(None,) * 2,  # offsets of new keys, lengths of the queries
            keys.get("seqused_k"),
            1,
            length,
            paged,
            *(None,) * 8,  # batch index, left padding, rotary tables (3), descales (3)
            head_size**-0.5,
            True,
            -1,
            -1,
            0.0,
            True,
            None,  # its own schedule
            0,  # and number of splits
            None,
            0,
            None,
            1,
            0,
            None,
        )[0]

    return call


@functools.cache
def _load_flash_attention_3(path: str | None):
    import torch

    if path is None:
        raise UnavailableError("needs --fa3, the path of vLLM's _vllm_fa3_C library")
    if not Path(path).is_file():
        raise UnavailableError(f"no file {path}")
    torch.ops.load_library(str(Path(path).resolve()))
    return torch.ops._vllm_fa3_C.fwd


def _fla(problem: DecodeProblem, _: str | None) -> Call:
    _need_torch(problem)
    if problem.page_table is not None:
        raise UnavailableError("has no paged cache")
    if importlib.util.find_spec("fla") is None:
        raise UnavailableError("fla-core is not installed")
    from fla.ops.parallax.decode import parallax_decode_one_step

    return functools.partial(parallax_decode_one_step, problem.q, problem.r)


def _conjugate_gradients(problem: DecodeProblem, _: str | None) -> Call:
    q, ridge, paged = problem.q, problem.ridge, problem.paged

    def call(k, v):
        try:
            return parallax_core.lla_decode(q, k, v, ridge=ridge, solver="cg", **paged)
        except parallax_core.BackendUnavailableError as error:
            raise UnavailableError(str(error)) from error

    return call


def _need_torch(problem: DecodeProblem) -> None:
    if problem.framework.name != "torch":
        raise UnavailableError("needs PyTorch")


PEERS = (
    Peer("fa2", "FlashAttention-2 of PyTorch", "softmax", True, _sdpa_flash),
    Peer("fa3", "FlashAttention-3 of vLLM", "softmax", True, _flash_attention_3),
    Peer("fla", "Parallax of fla-core", "parallax", True, _fla),
    Peer("cg", "LLA of parallax-core by conjugate gradients", "lla", True, _conjugate_gradients),
    Peer("early", "parallax-core, launched early", None, True, None),
    Peer("sdpa", "SDPA of PyTorch", "softmax", False, _sdpa_any),
)
