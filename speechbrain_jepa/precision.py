"""The precision that a device trains in unless told otherwise."""

import os
import platform

import speechbrain as sb
import torch

# values of ONEDNN_MAX_CPU_ISA that leave oneDNN an instruction set with bfloat16 products
NATIVE_BF16_ISA = ("DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX")


def default_precision(device: str | None = None) -> str:
    """The precision to train in: "bf16" where the machine multiplies it natively, else "fp32".

    Example
    -------
    >>> default_precision("cpu") in ("bf16", "fp32")
    True
    """
    device = device or sb.utils.distributed.infer_device()
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device == "cpu" and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 in hardware.

    On x86 its own answer is yes from AVX-512 on, where it converts to float32 and back: several
    times slower than float32 itself.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    allowed = limit.upper() in NATIVE_BF16_ISA or limit.upper().startswith("AVX10")
    return allowed and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
