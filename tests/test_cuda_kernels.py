"""Every kernel compiles for every GPU, and the tuned ones keep to their registers; NVRTC needs no GPU."""

import numpy as np
import pytest

pytest.importorskip("cupy", reason="CuPy brings NVRTC's bindings; pip install '.[gpu-compile]'")

from test_cuda_heuristics import FLOAT32, OWN_BYTES, call_of, shape_of

from parallax_core.cuda_kernels import compiler, lla

# What the heuristics are tuned for: heads of 64 and 128 in half precision, up to 16 query rows a key head.
TUNED = {
    "one row": dict(),
    "one row, heads of 64": dict(head_dim=64),
    "a group of 4": dict(q_heads=32, kv_len=8192, batch=8),
    "16 rows of one head": dict(q_heads=16, kv_heads=1, kv_len=16384, batch=16),
    "8 rows of each of few heads": dict(q_heads=64, kv_len=4096),
    "16 rows of each of few heads, pages": dict(q_heads=128, kv_len=8192, lengths=True, page_size=64),
    "8 rows, ragged": dict(q_heads=64, kv_len=4096, batch=8, lengths=True),
    "16 rows, ragged pages": dict(q_heads=128, kv_len=8192, batch=8, lengths=True, page_size=64),
    "12 rows, ragged pages of 16, a float32 probe": dict(
        q_heads=96, kv_len=4096, batch=8, lengths=True, page_size=16, probe_dtype=FLOAT32
    ),
    "many sequences": dict(batch=64, kv_len=4096),
    "ragged": dict(batch=8, lengths=True),
    "ragged pages, a group of 4": dict(batch=8, q_heads=32, lengths=True, page_size=64),
    "4 tokens": dict(q_len=4, lengths=True, batch=4),
    "a float32 probe": dict(probe_dtype=FLOAT32),
    "softmax": dict(probe_dtype=None),
    "float16": dict(dtype=np.dtype(np.float16), probe_dtype=np.dtype(np.float16)),
}
PORTABLE = {
    "half precision": dict(capability=(8, 0)),
    "half precision, heads of 64": dict(capability=(8, 0), head_dim=64, lengths=True),
    "float32": dict(capability=(8, 0), dtype=FLOAT32, probe_dtype=FLOAT32),
}
# Nothing tuned: odd sizes, no alignment, whole sequences.
ODD = {
    "all of the shared memory": dict(head_dim=32, q_len=16, batch=8, kv_len=8192, lengths=True),
    "unaligned pages": dict(head_dim=77, value_dim=33, aligned=False, lengths=True, page_size=20, q_len=3),
    "packed sequences": dict(q_len=512, packed=3, head_dim=80, value_dim=256, lengths=False),
    "a pinned split": dict(lengths=True, batch=3, split_size=48, head_dim=40),
    "keys of an odd number of 16 bytes": dict(head_dim=33, value_dim=20, dtype=FLOAT32, probe_dtype=FLOAT32),
    "full attention in float32": dict(q_len=100, causal=False, dtype=FLOAT32, probe_dtype=None, head_dim=256),
}


SOLVED = {
    "one row": dict(),
    "heads of 64": dict(head_dim=64, batch=128, kv_len=2048),
    "pages": dict(lengths=True, page_size=64, batch=32),
    "float16": dict(dtype=np.dtype(np.float16)),
    "odd sizes in pages": dict(head_dim=77, value_dim=33, aligned=False, lengths=True, page_size=20),
    "float32": dict(dtype=FLOAT32, head_dim=256),
}


def usage(shape, arch):
    # The launcher's count of shared memory is compared with the kernel's own by a static assertion in it.
    _, log = compiler.compile_cubin(shape.source, shape.defines, arch)
    assert "serialized" not in log, "each wgmma is waited for before the next"
    used = compiler.usage(log)["attend_kernel"]
    # Of a block, 99 KiB on many GPUs; of a Hopper's multiprocessor, with 1 KiB a block for the system.
    assert used.shared_bytes <= OWN_BYTES[shape.boxes]
    block = shape.shared_bytes + used.shared_bytes
    assert block <= (227 if shape.boxes else 99) << 10
    assert not shape.boxes or dict(shape.defines)["BLOCKS"] * (block + 1024) <= 228 << 10
    return used


@pytest.mark.parametrize("call", TUNED.values(), ids=TUNED)
def test_tuned_kernels_of_hopper_do_not_spill(call):
    _, shape = shape_of(**call)
    assert shape.source == "sm90/attend.cu"
    assert usage(shape, "sm_90a").spill_bytes == 0


@pytest.mark.parametrize("call", ["one row", "8 rows of each of few heads"])
def test_the_copy_engine_of_newer_gpus_is_used_as_well(call):
    _, shape = shape_of(**TUNED[call], capability=(10, 0))
    assert shape.source == "sm90/attend.cu"
    assert usage(shape, "sm_100").spill_bytes == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("call", PORTABLE.values(), ids=PORTABLE)
def test_tuned_portable_kernels_do_not_spill(call, arch):
    _, shape = shape_of(**call)
    assert shape.source == "portable/attend.cu"
    assert usage(shape, arch).spill_bytes == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
@pytest.mark.parametrize("call", ODD.values(), ids=ODD)
def test_every_other_call_compiles(call, arch):
    _, shape = shape_of(**call, capability=(8, 0))
    assert usage(shape, arch).registers <= 255


@pytest.mark.parametrize("call", SOLVED.values(), ids=SOLVED)
def test_the_kernels_of_local_linear_attention_do_not_spill(call):
    problem, layout = call_of(operation="lla_decode", **{"probe_dtype": None} | call)
    shape = lla.choose(problem, layout)
    _, log = compiler.compile_cubin(shape.source, shape.defines, "sm_90a")
    assert compiler.usage(log)["lla_kernel"].spill_bytes == 0


@pytest.mark.parametrize(
    "call",
    [
        dict(batch=32),
        dict(batch=32, kv_len=1024),
        dict(batch=32, kv_len=1024, dtype=np.dtype(np.float16)),
        dict(batch=32, kv_len=4096),
        dict(kv_len=16384),
        dict(lengths=True, page_size=64, batch=32),
        dict(lengths=True, page_size=64, kv_len=16384),
        dict(batch=4, q_heads=16, kv_heads=16, kv_len=4096),
        dict(batch=4, q_heads=16, kv_heads=16, kv_len=4096, dtype=np.dtype(np.float16)),
        dict(batch=16, kv_len=4096, lengths=True, page_size=16),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernels_of_conjugate_gradients_do_not_spill(call, head_dim):
    problem, layout = call_of(operation="lla_decode", probe_dtype=None, head_dim=head_dim, **call)
    shape = lla.choose(problem, layout, "cg")
    _, log = compiler.compile_cubin(shape.source, shape.defines, "sm_90a")
    assert compiler.usage(log)["lla_kernel"].spill_bytes == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "sm_120"])
def test_the_portable_kernel_of_local_linear_attention_compiles(arch):
    problem, layout = call_of(operation="lla_decode", probe_dtype=None, capability=(8, 0), page_size=16)
    shape = lla.choose(problem, layout)
    assert shape.source == "portable/lla.cu"
    _, log = compiler.compile_cubin(shape.source, shape.defines, arch)
    assert compiler.usage(log)["lla_kernel"].registers <= 255
