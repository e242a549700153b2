"""Names of dtypes: safetensors tags, numpy (with ml_dtypes), config.json and torch."""

import ml_dtypes
import numpy as np

# safetensors tag -> numpy dtype
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
FLOATS = {tag: DTYPES[tag].name for tag in ("F32", "F16", "BF16", "F64")}  # tag -> name in a config.json
NAMED = {name: tag for tag, name in FLOATS.items()}  # name in a config.json -> tag
TORCH = {f"torch.{DTYPES[tag].name}": tag for tag in (*FLOATS, *DTYPES)}  # "torch.float32" -> tag
# Paddle has no numpy bfloat16: it keeps the bits in uint16 and tags files U16, the published release too. No weight
# is ever a real uint16, so both ways U16 means BF16. This line pair is the only place that knows.
READ_AS = {"U16": "BF16"}
TAGS[np.dtype(np.uint16)] = "BF16"
