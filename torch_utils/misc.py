"""Seeds, numerical backends, and a table of a network's parameters."""

import ctypes
import os

import numpy as np
import torch

from dnnlib.util import format_table

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def compute_dtype(precision: str) -> torch.dtype:
    """Returns the dtype in which the inside of the network runs at this precision."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def mix_seed(*words: int) -> int:
    """Returns a 63-bit seed that depends on every word and on their order."""
    # SeedSequence pads with zeros: without the length, (1, 2) and (1, 2, 0) would be the same.
    sequence = np.random.SeedSequence([len(words), *words])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def default_generator(device: torch.device) -> torch.Generator:
    """Returns the generator that PyTorch uses on `device` by default."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def configure_backends(precision: str, *, benchmark: bool = True, deterministic: bool = False):
    """Sets TF32 (off unless the precision is tf32), cuDNN autotuning and determinism.

    Sums of half-precision products are kept in float32. On a machine without a GPU, freed memory is
    kept for reuse.
    """
    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    # A long sum may be split over blocks of a GPU, whose parts would be rounded to half precision
    # before they are added: float16 overflows there above 65504, and bfloat16 keeps 8 bits. EDM
    # turned this off for its float16 runs; bfloat16 needs that even more.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.benchmark = benchmark and not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if not torch.cuda.is_available():
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Makes glibc, if it is the C library, keep freed memory for the next allocation.

    Activations are allocated anew in every step, and each would come back from the kernel page by
    page, zeroed. Peak memory does not change.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, or Windows
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def compiles_by_itself(device: torch.device) -> bool:
    """Says whether `compile_network` is worth it: on GPUs for which Triton writes kernels.

    On the CPU, compiling gains nothing and takes minutes.
    """
    if device.type != "cuda":
        return False
    from torch.utils._triton import has_triton
    return has_triton()


def compile_network(model: torch.nn.Module, *, graphs: bool = False) -> None:
    """Compiles a network in place; its first call takes a minute or so.

    PyTorch keeps what it compiles in $TORCHINDUCTOR_CACHE_DIR, which scripts set (dnnlib/cli.py).

    Args:
        model: the network; it is compiled anew for each batch size.
        graphs: whether to replay each call as one CUDA graph, on a GPU, without gradients.
    """
    model.compile(mode="reduce-overhead" if graphs else None, dynamic=False)


def count_parameters(module: torch.nn.Module) -> int:
    """Returns the number of scalars in the module's parameters."""
    return sum(p.numel() for p in module.parameters())


def module_table(module: torch.nn.Module, depth: int = 2) -> str:
    """Returns a text table of the parameters of each submodule down to `depth`."""
    rows = []
    for name, child in module.named_modules():
        if name and name.count(".") < depth and count_parameters(child):
            rows.append((name, type(child).__name__, f"{count_parameters(child):12,}"))
    rows.append(("total", type(module).__name__, f"{count_parameters(module):12,}"))
    return format_table(rows, left=(0, 1))
