"""Peak FLOP/s of devices for dense matrix products, as vendors publish them.

Figures with sparsity are twice as large and no model reaches them; they are not used.
"""

import re

TERA = 1e12
# (a pattern in the device's name, bfloat16 or float16, float32 by way of TF32), TFLOP/s; the first that fits.
# None: the device has no such unit.
PEAKS = (
    (r"\bGB200\b", 2500, 1250),
    (r"\bB200\b", 2250, 1125),
    (r"\b(H200|H800|GH200)\b", 989, 494),
    (r"\bH100 NVL\b", 835, 417),
    (r"\bH100 PCIe\b", 756, 378),
    (r"\bH100\b", 989, 494),
    (r"\bH20\b", 148, 74),
    (r"\b(A100|A800)\b", 312, 156),
    (r"\bA40\b", 149.7, 74.8),
    (r"\bA30\b", 165, 82),
    (r"\bA10G\b", 70, 35),
    (r"\bA10\b", 125, 62.5),
    (r"\bL40S\b", 362, 183),
    (r"\bL40\b", 181, 90.5),
    (r"\bL4\b", 121, 60),
    (r"\bRTX 6000 Ada\b", 364, 182),
    (r"\bRTX A6000\b", 154.8, 77.4),
    (r"\bRTX\s*5090\b", 209.5, 104.8),
    (r"\bRTX\s*4090\b", 165.2, 82.6),
    (r"\bRTX\s*3090\b", 71, 35.6),
    (r"\bV100\b", 125, None),
    (r"\bT4\b", 65, None),
)
KNOWN = "A100, A800, H100, H200, H800, H20, B200, A10, A30, A40, L4, L40, L40S, V100, T4 and some GeForce cards"


def peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOP/s of one device at most; None for a device that is not in the table, processors among them.

    device_name: as the driver has it, "NVIDIA A100-SXM4-80GB". dtype: "bfloat16", "float16" or "float32".
    """
    for pattern, half, tf32 in PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            found = tf32 if dtype == "float32" else half
            return None if found is None else found * TERA
    return None


def device_name(device: str) -> str:
    """The name of a device as its driver has it; "CPU" for a processor. device: as paddle.get_device() names it."""
    if not device.startswith("gpu"):
        return device.upper() if device == "cpu" else device
    from paddle.device import cuda

    return cuda.get_device_name(int(device.partition(":")[2] or 0))
