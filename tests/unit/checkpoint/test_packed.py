"""GPTQ, AWQ and bitsandbytes NF4, unpacked: judged by hand-packed integers and by bitsandbytes itself."""

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoint_factory as factory
import ml_dtypes
import numpy as np
import packers
import pytest

from aquila_pd.checkpoint.convert import convert
from aquila_pd.checkpoint.sources import open_source, packed
from aquila_pd.checkpoint.sources.packed import awq, gptq, survey
from aquila_pd.checkpoint.sources.reader import ALL, Reader
from aquila_pd.checkpoint.sources.safetensors import SafetensorsReader
from aquila_pd.formats import safetensors
from aquila_pd.utils.errors import CheckpointError

IN, OUT = 256, 96
X = "model.layers.0.mlp.up_proj"  # the packed matrix of most tests
NORM = "model.norm.weight"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
ODD_PARTS = [
    (slice(0, 1), slice(0, 1)),
    (slice(5, 41), slice(31, 97)),
    (slice(7, 8), ALL),
    (ALL, slice(33, 34)),
    (slice(63, 96), slice(130, 256)),
    (slice(90, 200), slice(255, 300)),  # beyond the ends, which a slice may be
    (slice(10, 10), ALL),
    (slice(-3, None), slice(None, -7)),
]


def write(folder: Path, tensors: dict[str, np.ndarray], said: dict | None) -> Path:
    config = factory.config() if said is None else factory.config(quantization_config=said)
    plain = {NORM: np.linspace(0.2, 0.5, 32, dtype=np.float32)}
    return factory.write_safetensors(folder, config, {**plain, **tensors})


def opened(folder: Path) -> Reader:
    return packed.unpack(SafetensorsReader(folder), folder)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(folder)
    return str(caught.value)


def named(members: dict[str, np.ndarray], module: str = X) -> dict[str, np.ndarray]:
    return {f"{module}.{kind}": value for kind, value in members.items()}


def without(members: dict, *kinds: str) -> dict:
    return {kind: value for kind, value in members.items() if kind not in kinds}


class Sample:
    """Made-up integers, the tensors that hold them, and the weight [out, in] they mean.

    less: what is taken off zero points when they are stored; lowest: of them, by default 1, as v1 has no word for 0.
    """

    def __init__(self, *, bits=4, size=128, act_order=False, less=1, zeros=None, lowest=1, in_=IN, out=OUT, seed=3):
        rng = np.random.default_rng(seed)
        groups = 1 if size == -1 else -(-in_ // size)
        self.group_of = [0 if size == -1 else i // size for i in range(in_)]
        if act_order:
            rng.shuffle(self.group_of)
        self.bits = bits
        self.q = packers.random_integers(rng, in_, out, bits)
        self.zeros = zeros or rng.integers(lowest, 2**bits, (groups, out)).tolist()
        self.scales = packers.random_scales(rng, groups, out)
        self.members = {
            **packers.gptq(self.q, self.zeros, bits, less=less),
            "scales": self.scales,
            "g_idx": np.array(self.group_of, np.int32),
        }

    @property
    def meant(self) -> np.ndarray:
        return packers.meant(self.q, self.zeros, self.scales, self.group_of)

    @property
    def awq(self) -> dict[str, np.ndarray]:
        return {**packers.awq(self.q, self.zeros), "scales": self.scales}


@pytest.fixture(scope="module")
def sample() -> Sample:
    return Sample(size=64)


# ------------------------------------------------------------------------------------------------------- GPTQ


@pytest.mark.parametrize("less", [1, 0], ids=["v1", "v2"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_gives_exactly_the_weight_its_integers_mean(tmp_path, bits, size, act_order, less):
    sample = Sample(bits=bits, size=size, act_order=act_order, less=less)
    label = "gptq" if less else "gptq_v2"
    said = {**GPTQ, "bits": bits, "group_size": size, "desc_act": act_order, "checkpoint_format": label}
    reader = opened(write(tmp_path, named(sample.members), said))
    found = reader.read(f"{X}.weight")
    np.testing.assert_array_equal(found, sample.meant)
    assert found.dtype == np.float32
    assert found.T.flags.c_contiguous  # Paddle's layout in memory
    assert f"GPTQ {bits}-bit" in reader.stored[f"{X}.weight"].packed


def test_gptq_reader_shows_one_matrix_and_leaves_the_rest_alone(tmp_path, sample):
    folder = write(tmp_path, named(sample.members), {**GPTQ, "group_size": 64})
    reader = opened(folder)
    assert sorted(reader.stored) == sorted([NORM, f"{X}.weight"])
    stored = reader.stored[f"{X}.weight"]
    assert (stored.dtype, stored.shape, stored.file) == ("F32", (OUT, IN), "model.safetensors")
    assert stored.packed == "GPTQ 4-bit, groups of 64"
    np.testing.assert_array_equal(reader.read(NORM, slice(3, 5)), SafetensorsReader(folder).read(NORM)[3:5])
    assert "quantization_config" not in reader.config
    assert reader.config["hidden_size"] == factory.CONFIG["hidden_size"]
    (note,) = reader.notes
    assert note.startswith("1 tensors are packed as GPTQ 4-bit, groups of 64 (v1 zeros) and are unpacked to float32")
    assert "--dtype float16" in note


@pytest.mark.parametrize("place, words", [(0, (7, 0, 0)), (10, (-(2**30), 1, 0)), (21, (0, -(2**31), 3))])
def test_3_bit_values_lie_over_the_ends_of_words(place, words):
    values = gptq.unpack(np.array(words, np.int32)[:, None], 3)
    assert np.flatnonzero(values).tolist() == [place]
    assert values[place] == 7


def test_a_last_group_may_be_short(tmp_path):
    sample = Sample(size=96)  # 256 inputs: 96, 96 and 64
    reader = opened(write(tmp_path, named(sample.members), {**GPTQ, "group_size": 96}))
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), sample.meant)


def test_sizes_need_only_fill_words(tmp_path):
    sample = Sample(size=-1, in_=24, out=40)
    reader = opened(write(tmp_path, named(without(sample.members, "g_idx")), {**GPTQ, "group_size": -1}))
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), sample.meant)
    np.testing.assert_array_equal(reader.read(f"{X}.weight", slice(33, 39), slice(1, 23)), sample.meant[33:39, 1:23])


def test_v1_reads_a_stored_zero_point_of_all_ones_as_zero_and_says_so(tmp_path):
    zeros = [[0, 15, 1] * (OUT // 3)] * 2  # v1 stores 15, 14, 0
    sample = Sample(zeros=zeros)
    reader = opened(write(tmp_path, named(sample.members), GPTQ))
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), sample.meant)
    assert "1 tensors store the zero point 15, read as 0" in reader.notes[1]
    as_sixteen = packers.meant(
        sample.q, [[zero or 16 for zero in row] for row in zeros], sample.scales, sample.group_of
    )
    assert (as_sixteen != sample.meant).mean() > 0.3  # so the test can tell


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("label, less", [("gptq", 0), ("gptq_v2", 1), (None, 0)])
def test_symmetric_zero_points_show_a_wrong_label(tmp_path, bits, label, less):
    half = 2 ** (bits - 1)
    sample = Sample(bits=bits, less=less, zeros=[[half] * OUT] * 2)
    said = {**GPTQ, "bits": bits, "sym": True, **({"checkpoint_format": label} if label else {})}
    reader = opened(write(tmp_path, named(sample.members), said))
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), sample.meant)
    version = "v1" if less else "v2"
    assert f"all stored zero points are {half - less}: they are read as {version}" in reader.notes[1]
    assert f"({version} zeros)" in reader.notes[0]


def test_zero_points_show_a_wrong_label_also_where_sym_is_not_said(tmp_path):
    sample = Sample(less=0, zeros=[[8] * OUT] * 2)
    reader = opened(write(tmp_path, named(sample.members), without(GPTQ, "sym")))
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), sample.meant)
    assert "they are read as v2" in reader.notes[1]


@pytest.mark.parametrize(
    "label, less",
    [
        ({"format": "gptq_v2"}, 0),
        ({"format": "GPTQ_V2"}, 0),
        ({"checkpoint_format": "GPTQ_v2"}, 0),
        ({"checkpoint_format": "GPTQ"}, 1),
        ({"format": "GPTQ"}, 1),
        ({"format": None, "checkpoint_format": None}, 1),
    ],
    ids=str,
)
def test_the_label_has_two_keys_and_no_case(tmp_path, label, less):
    sample = Sample(less=less)
    found = opened(write(tmp_path, named(sample.members), {**GPTQ, **label})).read(f"{X}.weight")
    np.testing.assert_array_equal(found, sample.meant)


@pytest.mark.parametrize("label, less", [("gptq", 1), ("gptq_v2", 0)])
def test_a_right_label_is_not_remarked_on(tmp_path, label, less):
    sample = Sample(less=less, zeros=[[8] * OUT] * 2)
    reader = opened(write(tmp_path, named(sample.members), {**GPTQ, "sym": True, "checkpoint_format": label}))
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), sample.meant)
    assert len(reader.notes) == 1


def test_without_symmetry_the_label_is_trusted(tmp_path):
    sample = Sample(less=0, zeros=[[8] * OUT] * 2)  # stored as 8, which v1 means as 9
    found = opened(write(tmp_path, named(sample.members), GPTQ)).read(f"{X}.weight")
    nine = packers.meant(sample.q, [[9] * OUT] * 2, sample.scales, sample.group_of)
    np.testing.assert_array_equal(found, nine)


def test_symmetry_that_the_zero_points_do_not_show_is_remarked_on(tmp_path, sample):
    reader = opened(write(tmp_path, named(sample.members), {**GPTQ, "group_size": 64, "sym": True}))
    assert "sym is said, but stored zero points are 0 to 14, not all 7" in reader.notes[1]


def test_order_of_inputs_is_followed_even_when_desc_act_is_not_said(tmp_path):
    sample = Sample(act_order=True)
    reader = opened(write(tmp_path, named(sample.members), GPTQ))
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), sample.meant)
    assert "desc_act is not said, but 1 g_idx are not in order" in reader.notes[1]


def test_g_idx_of_zeros_stands_for_none(tmp_path):
    sample = Sample()
    empty = {**sample.members, "g_idx": np.zeros(IN, np.int32)}
    reader = opened(write(tmp_path, named(empty), GPTQ))
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), sample.meant)
    assert "1 g_idx hold nothing but zeros" in reader.notes[1]


def test_scales_may_be_bfloat16(tmp_path):
    sample = Sample()
    sample.scales = sample.scales.astype(ml_dtypes.bfloat16)
    reader = opened(write(tmp_path, named({**sample.members, "scales": sample.scales}), GPTQ))
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), sample.meant)
    assert "--dtype bfloat16" in reader.notes[0]


def test_biases_of_zeros_are_left_out_and_others_are_named(tmp_path, sample):
    said = {**GPTQ, "group_size": 64}
    reader = opened(write(tmp_path / "zero", named({**sample.members, "bias": np.zeros(OUT, np.float16)}), said))
    assert f"{X}.bias" not in reader.stored
    assert "1 biases of packed tensors are left out" in reader.notes[1]
    filled = np.zeros(OUT, np.float16)
    filled[-1] = 0.5
    message = refusal(write(tmp_path / "filled", named({**sample.members, "bias": filled}), said))
    assert f"{X}.bias is not zero" in message


@pytest.mark.parametrize("kind", ["gptq", "awq"])
@pytest.mark.parametrize(
    "bias", [np.zeros(OUT + 1, np.float16), np.zeros((1, OUT), np.float16), np.zeros(OUT, np.int64), np.float16(0)]
)
def test_a_bias_of_another_shape_is_named_and_not_looked_through(tmp_path, sample, kind, bias):
    members, said = (sample.members, {**GPTQ, "group_size": 64}) if kind == "gptq" else (sample.awq, AWQ)
    message = refusal(write(tmp_path, named({**members, "bias": np.array(bias)}), said))
    assert f"{X}.bias is " in message and f"F16 or BF16 or F32 [{OUT}] was due" in message


@pytest.mark.parametrize(
    "place, group, found", [(7, -1, "-1 to 3"), (0, -4, "-4 to 3"), (255, 4, "0 to 4"), (3, 2**31 - 1, "0 to 214748")]
)
def test_groups_that_do_not_exist_are_named(tmp_path, sample, place, group, found):
    wrong = np.array(sample.members["g_idx"])
    wrong[place] = group
    message = refusal(write(tmp_path, named({**sample.members, "g_idx": wrong}), {**GPTQ, "group_size": 64}))
    assert f"{X}.g_idx names the groups {found}" in message


@pytest.mark.parametrize("size", [IN + 1, 2**31 - 1])
def test_a_group_larger_than_a_matrix_is_one_group(tmp_path, size):
    sample = Sample(size=-1)
    found = opened(write(tmp_path, named(sample.members), {**GPTQ, "group_size": size})).read(f"{X}.weight")
    np.testing.assert_array_equal(found, sample.meant)


# -------------------------------------------------------------------------------------------------------- AWQ


@pytest.mark.parametrize("size", [32, 64, 128, -1])
def test_awq_gives_exactly_the_weight_its_integers_mean(tmp_path, size):
    sample = Sample(size=size, lowest=0)
    reader = opened(write(tmp_path, named(sample.awq), {**AWQ, "group_size": size}))
    found = reader.read(f"{X}.weight")
    np.testing.assert_array_equal(found, sample.meant)
    assert found.T.flags.c_contiguous
    assert reader.stored[f"{X}.weight"].packed.startswith("AWQ 4-bit")


def test_awq_words_hold_columns_in_their_own_order():
    word = np.array([[0x76543210]], np.int32)  # value i is i, so column order[i] holds i
    assert awq.unpack(word).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]


# ----------------------------------------------------------------------------------------------- bitsandbytes


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes writes the checkpoints that this test reads")


class NF4Sample:
    """A weight packed by bitsandbytes, under the names transformers gives its parts, and what it unpacks to."""

    def __init__(self, bnb, *, double=False, blocksize=64, shape=(OUT, IN), dtype="float32", seed=5):
        import torch

        generator = torch.Generator().manual_seed(seed)
        weight = (torch.randn(shape, generator=generator) * 0.05).to(getattr(torch, dtype))
        settings = {"blocksize": blocksize, "compress_statistics": double, "quant_type": "nf4"}
        self.packed, self.state = bnb.functional.quantize_4bit(weight, **settings)
        self.meant = bnb.functional.dequantize_4bit(self.packed, self.state)
        parts = {f"weight.{kind}": value.numpy() for kind, value in self.state.as_dict(packed=True).items()}
        self.members = {"weight": self.packed.numpy(), **parts}


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(
    "blocksize, shape",
    [(64, (OUT, IN)), (128, (OUT, IN)), (64, (40, 100)), (64, (7, 30)), (64, (33, 4800)), (64, (1200, 64))],
    ids=str,
)
def test_nf4_is_exactly_what_bitsandbytes_unpacks(tmp_path, bnb, double, blocksize, shape):
    sample = NF4Sample(bnb, double=double, blocksize=blocksize, shape=shape)
    reader = opened(write(tmp_path, named(sample.members), {**NF4, "bnb_4bit_use_double_quant": double}))
    assert sorted(reader.stored) == sorted([NORM, f"{X}.weight"])
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), sample.meant.numpy())
    assert reader.stored[f"{X}.weight"].packed == f"NF4, blocks of {blocksize}"
    assert ("double-quantized" in reader.notes[0]) == double


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_nf4_rounded_once_is_what_bitsandbytes_gives_in_half_precision(tmp_path, bnb, dtype):
    sample = NF4Sample(bnb, double=True, dtype=dtype)
    reader = opened(write(tmp_path, named(sample.members), NF4))
    rounded = reader.read(f"{X}.weight").astype(factory.DTYPES[dtype]).astype(np.float32)
    np.testing.assert_array_equal(rounded, sample.meant.float().numpy())
    assert f"--dtype {dtype} rounds each value as bitsandbytes does" in reader.notes[0]


def test_nf4_agrees_with_its_definition(tmp_path, bnb):
    sample = NF4Sample(bnb, shape=(12, 80))
    table, absmax = (sample.members[f"weight.{kind}"].tolist() for kind in ("quant_map", "absmax"))
    by_hand = packers.nf4_values(sample.members["weight"].tobytes(), table, absmax, 64)
    found = opened(write(tmp_path, named(sample.members), NF4)).read(f"{X}.weight")
    assert found.reshape(-1).tolist() == by_hand
    swapped = bytes(byte >> 4 | (byte & 15) << 4 for byte in sample.members["weight"].tobytes())
    assert packers.nf4_values(swapped, table, absmax, 64) != by_hand  # the order of halves shows


def test_values_of_nf4_come_from_the_file(tmp_path, bnb):
    sample = NF4Sample(bnb)
    sample.members["weight.quant_map"] = sample.members["weight.quant_map"] * 2
    found = opened(write(tmp_path, named(sample.members), NF4)).read(f"{X}.weight")
    np.testing.assert_array_equal(found, sample.meant.numpy() * 2)


def test_biases_beside_nf4_are_ordinary_tensors(tmp_path, bnb):
    members = {**NF4Sample(bnb).members, "bias": np.ones(OUT, np.float32)}
    assert f"{X}.bias" in opened(write(tmp_path, named(members), NF4)).stored


STATE = "weight.quant_state.bitsandbytes__nf4"


def changed_state(members: dict, **changes: object) -> dict:
    """NF4 members with another description; values as JSON has them, NaN and Infinity too."""
    return {**members, STATE: packers.as_bytes({**json.loads(members[STATE].tobytes()), **changes})}


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"blocksize": 63}, "blocksize = 63"),
        ({"blocksize": 96}, "blocksize = 96"),
        ({"blocksize": 2**13}, "blocksize = 8192"),
        ({"blocksize": 2**45}, "blocksize = 35184372088832"),
        ({"blocksize": 64.0}, "blocksize = 64.0"),
        ({"blocksize": True}, "blocksize = True"),
        ({"blocksize": [64]}, "blocksize = [64]"),
        ({"nested_blocksize": 100}, "nested_blocksize = 100"),
        ({"nested_blocksize": 2**60}, "nested_blocksize = 1152921504606846976"),
        ({"nested_blocksize": 0}, "nested_blocksize = 0"),
        ({"nested_offset": float("nan")}, "nested_offset = nan"),
        ({"nested_offset": float("inf")}, "nested_offset = inf"),
        ({"nested_offset": 1e39}, "nested_offset = 1e+39"),
        ({"nested_offset": 10**400}, "nested_offset = 1000"),
        ({"nested_offset": None}, "nested_offset = None"),
        ({"shape": [OUT]}, f"shape = [{OUT}]"),
        ({"shape": [OUT, float(IN)]}, f"shape = [{OUT}, {IN}.0]"),
        ({"shape": [-OUT, -IN]}, f"shape = [-{OUT}, -{IN}]"),
        ({"shape": [0, IN]}, f"shape = [0, {IN}]"),
        ({"shape": [2**70, 1]}, "shape = [1180591620717411303424, 1]"),
        ({"shape": [2**50, 2**50]}, "was due"),
        ({"quant_type": ["nf4"]}, "quant_type = ['nf4']"),
        ({"filler": " " * 5000}, "blocksize = None"),
        ({"filler": [[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]}, "blocksize = None"),
    ],
    ids=str,
)
def test_a_description_of_nf4_that_cannot_be_is_named(tmp_path, changes, found):
    members, _ = packers.nf4(np.random.default_rng(2), (OUT, IN), nested=256)
    message = refusal(write(tmp_path, named(changed_state(members, **changes)), NF4))
    assert found in message
    assert len(message) < 2500


@pytest.mark.parametrize("dtype", [["float16"], {"a": 1}, None, 7, "float\x1b[2J"], ids=str)
def test_a_strange_dtype_in_a_description_of_nf4_is_no_matter(tmp_path, dtype):
    members, meant = packers.nf4(np.random.default_rng(2), (OUT, IN), nested=256)
    reader = opened(write(tmp_path, named(changed_state(members, dtype=dtype)), NF4))
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), meant)
    assert "--dtype" not in reader.notes[0]


def test_an_offset_of_nf4_may_be_a_whole_number(tmp_path):
    members, _ = packers.nf4(np.random.default_rng(2), (OUT, IN), nested=256)
    one, same = (changed_state(members, nested_offset=offset) for offset in (1, 1.0))
    found = [opened(write(tmp_path / str(i), named(m), NF4)).read(f"{X}.weight") for i, m in enumerate((one, same))]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("nested", [None, 64, 4096])
def test_every_blocksize_of_bitsandbytes_is_read(tmp_path, blocksize, nested):
    members, meant = packers.nf4(np.random.default_rng(2), (30, 90), blocksize=blocksize, nested=nested)
    reader = opened(write(tmp_path, named(members), NF4))
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), meant)
    np.testing.assert_array_equal(reader.read(f"{X}.weight", slice(29, 30), slice(1, 3)), meant[29:, 1:3])


@pytest.mark.parametrize(
    "kind, change, found",
    [
        ("nested_absmax", lambda value: value.astype(np.float16), "nested_absmax is F16 [2], where F32 [2] was due"),
        ("nested_quant_map", lambda value: value.astype(np.float16), "nested_quant_map is F16 [256]"),
        ("quant_map", lambda value: value.astype(np.float16), "quant_map is F16 [16]"),
        ("quant_map", lambda value: value[:15], "quant_map is F32 [15]"),
        ("quant_map", lambda value: value * np.float32("inf"), "quant_map is not finite"),
        ("nested_quant_map", lambda value: value * np.float32("nan"), "nested_quant_map is not finite"),
        ("absmax", lambda value: value.astype(np.int8), "absmax is I8 [384], where U8 [384] was due"),
    ],
)
def test_a_table_of_nf4_of_another_kind_is_named(tmp_path, kind, change, found):
    members, _ = packers.nf4(np.random.default_rng(2), (OUT, IN), nested=256)
    members[f"weight.{kind}"] = change(members[f"weight.{kind}"])
    assert f"{X}.weight.{found}" in refusal(write(tmp_path, named(members), NF4))


# --------------------------------------------------------------------- controls: a wrong reading gives other numbers


@pytest.mark.parametrize(
    "control", ["v1 and v2 zeros swapped", "g_idx ignored", "3 bits ten to a word", "high value first", "transposed"]
)
def test_control_gptq_read_wrongly_differs(tmp_path, control):
    bits = 3 if "3 bits" in control else 4
    out = IN if control == "transposed" else OUT  # square, which hides it from every check of shapes
    sample = Sample(bits=bits, act_order="g_idx" in control, out=out)
    members, said = dict(sample.members), {**GPTQ, "bits": bits}
    if "swapped" in control:
        said["checkpoint_format"] = "gptq_v2"
    elif "g_idx" in control:
        del members["g_idx"]
    elif "3 bits" in control:
        words = packers.by_column(sample.q, packers.ten_to_a_word)  # 26 words for 256 values, of which 24 fit
        members["qweight"] = words[: len(members["qweight"])]
    elif "high" in control:
        turned = [[row[o] for o in range(out)] for at in range(0, IN, 8) for row in sample.q[at : at + 8][::-1]]
        members["qweight"] = packers.gptq(turned, sample.zeros, 4)["qweight"]
    found = opened(write(tmp_path, named(members), said)).read(f"{X}.weight")
    wrong = found.T if control == "transposed" else found
    assert (wrong != sample.meant).mean() > 0.25


@pytest.mark.parametrize("control", ["natural order", "natural order of zeros", "as GPTQ", "zeros less one"])
def test_control_awq_read_wrongly_differs(tmp_path, sample, control):
    members = dict(sample.awq)
    natural = packers.awq(sample.q, sample.zeros, packers.NATURAL)
    if control == "natural order":
        members["qweight"] = natural["qweight"]
    elif control == "natural order of zeros":
        members["qzeros"] = natural["qzeros"]
    elif control == "zeros less one":
        members["qzeros"] = packers.awq(sample.q, [[zero - 1 for zero in row] for row in sample.zeros])["qzeros"]
    else:
        message = refusal(write(tmp_path, named(members), {**GPTQ, "group_size": 64}))
        assert f"{X}.qzeros is I32" in message or f"{X}.scales is F16" in message
        return
    found = opened(write(tmp_path, named(members), AWQ)).read(f"{X}.weight")
    assert (found != sample.meant).mean() > 0.5


@pytest.mark.parametrize("control", ["low half first", "offset forgotten", "nested blocks of another size"])
def test_control_nf4_read_wrongly_differs(tmp_path, bnb, control):
    sample = NF4Sample(bnb, double=True, shape=(640, 128))  # more than one block of blocks
    state = json.loads(sample.members["weight.quant_state.bitsandbytes__nf4"].tobytes())
    if control == "low half first":
        codes = sample.members["weight"]
        sample.members["weight"] = codes >> 4 | codes << 4
    elif control == "offset forgotten":
        state["nested_offset"] = 0.0
    else:
        state["nested_blocksize"] = 512
        nested = sample.members["weight.nested_absmax"]
        sample.members["weight.nested_absmax"] = nested[: -(-640 * 128 // 64 // 512)]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    sample.members["weight.quant_state.bitsandbytes__nf4"] = text
    found = opened(write(tmp_path, named(sample.members), NF4)).read(f"{X}.weight")
    assert (found != sample.meant.numpy()).mean() > 0.15


# ------------------------------------------------------------------------------------------------------- parts


def parts_equal_the_whole(reader: Reader) -> None:
    whole = np.array(reader.read(f"{X}.weight"))
    for rows, columns in ODD_PARTS:
        np.testing.assert_array_equal(reader.read(f"{X}.weight", rows, columns), whole[rows, columns])


@pytest.mark.parametrize(
    "bits, size, act_order", [(2, 32, False), (3, 64, True), (4, 128, True), (4, 96, False), (8, -1, False)]
)
def test_parts_of_gptq_equal_slices_of_the_whole(tmp_path, bits, size, act_order):
    sample = Sample(bits=bits, size=size, act_order=act_order)
    said = {**GPTQ, "bits": bits, "group_size": size, "desc_act": act_order}
    parts_equal_the_whole(opened(write(tmp_path, named(sample.members), said)))


def test_two_inputs_of_far_groups_are_a_part_too(tmp_path):
    sample = Sample(size=32, act_order=True)
    reader = opened(write(tmp_path, named(sample.members), {**GPTQ, "group_size": 32, "desc_act": True}))
    pairs = list(zip(sample.group_of, sample.group_of[1:], strict=False))
    i = next(i for i, (one, two) in enumerate(pairs) if abs(one - two) > 2)
    found = reader.read(f"{X}.weight", ALL, slice(i, i + 2))
    np.testing.assert_array_equal(found, sample.meant[:, i : i + 2])


def test_parts_of_awq_equal_slices_of_the_whole(tmp_path, sample):
    parts_equal_the_whole(opened(write(tmp_path, named(sample.awq), AWQ)))


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("shape", [(OUT, IN), (OUT, 290)], ids=["whole blocks", "blocks over rows"])
def test_parts_of_nf4_equal_slices_of_the_whole(tmp_path, bnb, shape, double):
    sample = NF4Sample(bnb, shape=shape, double=double)
    parts_equal_the_whole(opened(write(tmp_path, named(sample.members), NF4)))


def test_parts_of_matrices_wider_than_a_tile_equal_slices_of_the_whole(tmp_path):
    sample = Sample(size=32, in_=64, out=8256)  # OUTPUTS is 4096
    folder = write(tmp_path, named(sample.members), {**GPTQ, "group_size": 32})
    whole = np.array(opened(folder).read(f"{X}.weight"))
    np.testing.assert_array_equal(whole, sample.meant)
    part = opened(folder).read(f"{X}.weight", slice(4090, 8200), slice(3, 61))
    np.testing.assert_array_equal(part, whole[4090:8200, 3:61])


def test_several_threads_may_read_at_once(tmp_path, sample):
    reader = opened(write(tmp_path, named(sample.awq), AWQ))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda o: reader.read(f"{X}.weight", slice(o, o + 1)), range(OUT)))
    np.testing.assert_array_equal(np.concatenate(found), sample.meant)


def peak(reader: Reader, rows: slice, columns: slice) -> int:
    """Bytes that numpy holds at most while a part is read, the part among them."""
    tracemalloc.start()
    reader.read(f"{X}.weight", rows, columns)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("rows, columns", [(slice(1000, 1064), ALL), (ALL, slice(1000, 1064))], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", ["gptq", "awq", "nf4"])
def test_memory_is_that_of_the_part(tmp_path, request, kind, rows, columns):
    size = 4096
    rng = np.random.default_rng(0)
    scales = np.ones((size // 64, size), np.float16)
    along, across = ((size // 8, size), (size, size // 8))
    qzeros = rng.integers(0, 2**31, (size // 64, size // 8), np.int32)
    if kind == "nf4":
        bnb = request.getfixturevalue("bnb")
        members, said = NF4Sample(bnb, shape=(size, size), double=True).members, NF4
    else:
        shape, said = (along, {**GPTQ, "group_size": 64}) if kind == "gptq" else (across, AWQ)
        members = {"qweight": rng.integers(0, 2**31, shape, np.int32), "qzeros": qzeros, "scales": scales}
    reader = opened(write(tmp_path, named(members), said))
    part = 64 * size * 4
    tile = 32 * 4096 * 4  # of unpacked integers, whatever the part
    assert peak(reader, rows, columns) < 2 * part + 3 * tile < size * size * 4 / 10


@pytest.mark.parametrize("control", [False, True], ids=["", "control"])
def test_opening_holds_a_few_zero_points_at_once_and_keeps_none(tmp_path, monkeypatch, control):
    in_, out = 2048, 4096
    rng = np.random.default_rng(0)
    members = {
        "qweight": np.zeros((in_ // 8, out), np.int32),
        "qzeros": rng.integers(0, 2**31, (in_, out // 8), np.int32),  # a group of each input: 4 MB, 32 MB unpacked
        "scales": np.ones((in_, out), np.float16),
        "g_idx": np.arange(in_, dtype=np.int32)[::-1].copy(),
        "bias": np.zeros(out, np.float16),
    }
    folder = write(tmp_path, named(members), {**GPTQ, "group_size": 1, "desc_act": True})
    if control:
        monkeypatch.setattr(survey, "AT_ONCE", 2**30)
    opened(folder)  # what is made once and for all
    tracemalloc.start()
    reader = opened(folder)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reader.stored[f"{X}.weight"].shape == (out, in_)
    assert (most < 16 * 10**6) is not control
    assert kept < 10**5


@pytest.mark.parametrize("control", [False, True], ids=["", "control"])
def test_what_was_looked_at_when_opening_is_released(tmp_path, sample, monkeypatch, control):
    seen, released, read = [], [], SafetensorsReader.read

    def watched(reader, name, *part):
        seen.append(read(reader, name, *part))
        return seen[-1]

    monkeypatch.setattr(SafetensorsReader, "read", watched)
    monkeypatch.setattr(safetensors, "release", (lambda array: None) if control else released.append)
    opened(write(tmp_path, named({**sample.members, "bias": np.zeros(OUT, np.float16)}), {**GPTQ, "group_size": 64}))
    assert len(seen) == 3  # qzeros, g_idx and the bias
    assert ({id(array) for array in seen} == {id(array) for array in released}) is not control


# --------------------------------------------------------------------------------------- what is said, and refused


def test_an_unpacked_checkpoint_is_left_to_its_own_reader(tmp_path):
    folder = write(tmp_path, {}, None)
    reader = SafetensorsReader(folder)
    assert packed.unpack(reader, folder) is reader


def test_older_gptq_folders_say_it_in_a_file_of_its_own(tmp_path, sample):
    folder = write(tmp_path, named(sample.members), None)
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64, "desc_act": False}))
    np.testing.assert_array_equal(opened(folder).read(f"{X}.weight"), sample.meant)


def test_older_awq_folders_say_it_in_a_file_of_its_own(tmp_path, sample):
    folder = write(tmp_path, named(sample.awq), None)
    said = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(said))
    np.testing.assert_array_equal(opened(folder).read(f"{X}.weight"), sample.meant)


def test_packed_bin_files_are_read_too(tmp_path, sample):
    from aquila_pd.checkpoint.sources.torch_bin import TorchBinReader

    config = factory.config(quantization_config={**GPTQ, "group_size": 64})
    folder = factory.write_bin(tmp_path, config, {NORM: np.ones(32, np.float32), **named(sample.members)})
    reader = packed.unpack(TorchBinReader(folder), folder)
    np.testing.assert_array_equal(reader.read(f"{X}.weight"), sample.meant)
    np.testing.assert_array_equal(reader.read(f"{X}.weight", slice(3, 9), slice(50, 99)), sample.meant[3:9, 50:99])
    reader.close()


HUGE = {  # member -> a view of one element, and how large it says it is
    "bias": (lambda torch: torch.zeros(1, dtype=torch.float16).expand(2**45)),
    "g_idx": (lambda torch: torch.zeros(1, dtype=torch.int32).expand(2**31)),
    "qzeros": (lambda torch: torch.zeros(1, 1, dtype=torch.int32).expand(2**20, 2**17)),
    "qweight": (lambda torch: torch.zeros(1, 1, dtype=torch.int32).expand(2**17, 2**20)),
    "weight.quant_state.bitsandbytes__nf4": (lambda torch: torch.zeros(1, dtype=torch.uint8).expand(2**36)),
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_small_file_with_an_endless_tensor_is_refused(tmp_path, sample, kind):
    import torch

    members = packers.nf4(np.random.default_rng(2), (OUT, IN))[0] if "nf4" in kind else sample.members
    said = NF4 if "nf4" in kind else {**GPTQ, "group_size": 64}
    tensors = {name: torch.from_numpy(value.copy()) for name, value in named(members).items()}
    factory.write_config(tmp_path, factory.config(quantization_config=said))
    torch.save({**tensors, f"{X}.{kind}": HUGE[kind](torch)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"{kind} in pytorch_model.bin has .* elements, more than its storage"):
        open_source(tmp_path)


@pytest.mark.parametrize("value", ["x" * 1500, [0] * 500, 10**1500, "\x1b[2J"], ids=["text", "list", "number", "tty"])
@pytest.mark.parametrize("key", ["quant_method", "bits", "group_size", "checkpoint_format", "dynamic", "else", None])
def test_what_is_said_is_not_repeated_at_length(tmp_path, sample, key, value):
    said = {**GPTQ, "group_size": 64, key: value} if key else value
    try:
        words = "\n".join(opened(write(tmp_path, named(sample.members), said)).notes)
    except CheckpointError as error:
        words = str(error)
    assert len(words) < 1000 and "\x1b" not in words


def test_words_that_are_not_known_cannot_steer_a_terminal(tmp_path, sample):
    said = {**GPTQ, "group_size": 64, "a\x1b[2J": 1, "b" * 10**5: 1}
    words = "\n".join(opened(write(tmp_path, named(sample.members), said)).notes)
    assert len(words) < 1500 and "\x1b" not in words and r"a\x1b[2J" in words


@pytest.mark.parametrize(
    "said, found",
    [
        ({**GPTQ, "group_size": 2**31}, "group_size = 2147483648; known: -1 and whole numbers"),
        ({**AWQ, "group_size": 10**30}, "group_size = 1000000"),
        ({**GPTQ, "quant_method": "hqq"}, "quant_method = 'hqq'; known: 'gptq', 'awq', 'bitsandbytes'"),
        ({"bits": 4}, "quant_method = None"),
        ({**GPTQ, "bits": 5}, "bits = 5; known: 2, 3, 4, 8"),
        ({**GPTQ, "bits": True}, "bits = True"),
        ({**GPTQ, "bits": None}, "does not say bits"),
        ({**GPTQ, "group_size": 0}, "group_size = 0"),
        ({**GPTQ, "group_size": "128"}, "group_size = '128'"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'; known: 'gptq', 'gptq_v2'"),
        ({**GPTQ, "is_marlin_format": True}, "is_marlin_format = True"),
        ({**GPTQ, "pack_dtype": "int64"}, "pack_dtype = 'int64'"),
        ({**GPTQ, "dynamic": {"+:.*up.*": {"bits": 8}}}, "dynamic = '+:.*up.*'"),
        ({**AWQ, "version": "gemv"}, "version = 'gemv'; known: 'gemm'"),
        ({**AWQ, "version": "gemv_fast"}, "version = 'gemv_fast'"),
        ({**AWQ, "version": "marlin"}, "version = 'marlin'"),
        ({**AWQ, "version": None}, "does not say version"),
        ({**AWQ, "bits": 8}, "bits = 8; known: 4"),
        ({**AWQ, "zero_point": False}, "zero_point = False"),
        ({**AWQ, "group_size": None}, "group_size = None"),
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type = 'fp4'; known: 'nf4'"),
        ({**NF4, "load_in_4bit": False, "load_in_8bit": True}, "load_in_8bit = True; known: False"),
        ({"load_in_8bit": True}, "load_in_8bit = True"),
        ({**NF4, "bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage = 'bfloat16'"),
    ],
)
def test_packing_that_is_not_known_is_named(tmp_path, sample, said, found):
    message = refusal(write(tmp_path, named(sample.members), said))
    assert f"config.json says {found}" in message or f"config.json {found}" in message
    assert "Known are GPTQ in 2, 3, 4 and 8 bits" in message


def test_a_description_that_is_no_mapping_is_refused(tmp_path, sample):
    assert "quantization_config is 'gptq', not a mapping" in refusal(write(tmp_path, named(sample.members), "gptq"))


def test_a_rule_that_leaves_modules_out_is_no_obstacle(tmp_path, sample):
    said = {**GPTQ, "group_size": 64, "dynamic": {"-:.*down.*": {}}}
    np.testing.assert_array_equal(
        opened(write(tmp_path, named(sample.members), said)).read(f"{X}.weight"), sample.meant
    )


def test_words_that_are_not_known_are_shown(tmp_path, sample):
    reader = opened(write(tmp_path, named(sample.members), {**GPTQ, "group_size": 64, "rotation": "hadamard"}))
    assert any("in words that are not known here: rotation" in note for note in reader.notes)


def test_said_to_be_packed_but_not(tmp_path):
    assert "says that weights are packed by gptq, but no tensor is" in refusal(write(tmp_path, {}, GPTQ))


@pytest.mark.parametrize("kind", ["qweight", "weight.absmax", "SCB", "weight_scale_inv"])
def test_packed_but_not_said(tmp_path, kind):
    message = refusal(write(tmp_path, {f"{X}.{kind}": np.ones(4, np.float32)}, None))
    assert "1 tensors are packed" in message
    assert "neither quantization_config" in message


def test_every_misfit_is_listed_at_once(tmp_path, sample):
    said = {**GPTQ, "group_size": 64, "desc_act": True}
    beyond = np.array(sample.members["g_idx"])
    beyond[7] = 4
    tensors = {
        **named(without(sample.members, "scales"), "a"),
        **named(without(sample.members, "g_idx"), "b"),
        **named({**sample.members, "scales": sample.scales[:2]}, "c"),
        **named({**sample.members, "qzeros": sample.members["qzeros"].astype(np.int64)}, "d"),
        **named({**sample.members, "g_idx": beyond}, "e"),
        **named({**sample.members, "qweight": sample.members["qweight"].astype(np.float32)}, "f"),
        **named({**sample.members, "weight": np.ones((4, 4), np.float32)}, "g"),
        **named({**sample.members, "bias": np.ones(OUT, np.float16)}, "h"),
        **named(sample.members, "fine"),
    }
    message = refusal(write(tmp_path, tensors, said))
    for finding in (
        "a has g_idx, qweight, qzeros, but no scales",
        "b has no g_idx, which desc_act needs",
        "c.scales is F16 [2, 96], where F16 or BF16 or F32 [4, 96] was due",
        "d.qzeros is I64 [4, 12], where I32 [4, 12] was due",
        "e.g_idx names the groups 0 to 4 of 4",
        "f.qweight is F32 [32, 96], where I32 [in * 4 / 32, out] was due",
        "g has both weight and",
        "h.bias is not zero",
    ):
        assert finding in message
    assert "fine" not in message


def test_every_misfit_of_awq_is_listed_at_once(tmp_path, sample):
    tensors = {
        **named(without(sample.awq, "qzeros"), "a"),
        **named({**sample.awq, "qweight": sample.awq["qweight"][:100]}, "b"),
        **named({**sample.awq, "scales": sample.scales.astype(np.float64)}, "c"),
        **named(without(sample.members, "g_idx"), "d"),
    }
    message = refusal(write(tmp_path, tensors, AWQ))
    assert "a has" in message and "but no qzeros" in message
    assert "b.qweight has 100 rows, which are not whole groups of 64" in message
    assert "c.scales is F64" in message
    assert "d.qweight has 32 rows" in message  # packed along the inputs, as GPTQ does


def test_every_misfit_of_nf4_is_listed_at_once(tmp_path, bnb):
    single, double = NF4Sample(bnb).members, NF4Sample(bnb, double=True).members
    state = "weight.quant_state.bitsandbytes__nf4"
    tensors = {
        **named(without(single, state), "a"),
        **named({**single, state: np.frombuffer(b"{'not': json", np.uint8)}, "b"),
        **named({**single, "weight": single["weight"][:-1]}, "c"),
        **named({**double, "weight.absmax": single["weight.absmax"]}, "d"),
        **named(without(double, "weight.nested_quant_map"), "e"),
        **named(without(single, "weight"), "f"),
        **named({**without(single, state), state.replace("nf4", "fp4"): single[state]}, "g"),
    }
    message = refusal(write(tmp_path, tensors, NF4))
    for finding in (
        "a.weight has",
        "b.weight.quant_state.bitsandbytes__nf4 has blocksize = None",
        "c.weight is U8 [12287, 1], where U8 [12288, 1] was due",
        "d.weight.absmax is F32 [384], where U8 [384] was due",
        "e.weight has",
        "f.weight is not there",
        "g.weight.quant_state.bitsandbytes__fp4: packed as fp4; known: nf4",
    ):
        assert finding in message


def test_a_packed_model_opens_under_its_own_names(tmp_path):
    config = factory.config(quantization_config={**GPTQ, "group_size": 32, "sym": True})
    tensors, meant = factory.weights(config), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        out, in_ = tensors.pop(name).shape
        module = Sample(size=32, in_=in_, out=out, zeros=[[8] * out] * (in_ // 32))
        tensors |= named({**module.members, "bias": np.zeros(out, np.float16)}, name.removesuffix(".weight"))
        meant[name] = module.meant
    with open_source(factory.write_safetensors(tmp_path, config, tensors, shards=2)) as source:
        assert sorted(source.tensors) == sorted(factory.weights(config))
        for name, value in meant.items():
            np.testing.assert_array_equal(source.read(name), value)
        assert any("14 tensors are packed as GPTQ 4-bit" in note for note in source.notes)


# ------------------------------------------------------------------------------------------------ whole models


def gptq_module(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[dict, np.ndarray]:
    sample = Sample(size=16, act_order=True, in_=shape[1], out=shape[0], seed=int(rng.integers(2**31)))
    return {**sample.members, "bias": np.zeros(shape[0], np.float16)}, sample.meant


def awq_module(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[dict, np.ndarray]:
    sample = Sample(size=16, lowest=0, in_=shape[1], out=shape[0], seed=int(rng.integers(2**31)))
    return sample.awq, sample.meant


def nf4_double_module(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[dict, np.ndarray]:
    return packers.nf4(rng, shape, blocksize=32, nested=32)  # up to 64 blocks, so that some have two of blocks


KINDS = {
    "gptq": ({**GPTQ, "group_size": 16, "desc_act": True}, gptq_module),
    "awq": ({**AWQ, "group_size": 16}, awq_module),
    "nf4": (NF4, packers.nf4),
    "nf4 double": (NF4, nf4_double_module),
}


def write_model(folder: Path, kind: str, files: str) -> dict[str, np.ndarray]:
    """A whole packed model in two files; returns what its tensors mean, under Hugging Face's names."""
    said, make = KINDS[kind]
    config = factory.config(torch_dtype="float16", quantization_config=said)
    rng, tensors = np.random.default_rng(11), factory.weights(config)
    meant = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        members, meant[name] = make(rng, tensors.pop(name).shape)
        tensors |= named(members, name.removesuffix(".weight"))
    if files == "safetensors":
        factory.write_safetensors(folder, config, tensors, shards=2)
    else:
        write_bin_shards(folder, config, tensors)
    return meant


def write_bin_shards(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> None:
    import torch

    factory.write_config(folder, config)
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    placed = {name: files[i % 2] for i, name in enumerate(tensors)}  # members of a module lie apart
    for file in files:
        held = {name: torch.from_numpy(value.copy()) for name, value in tensors.items() if placed[name] == file}
        torch.save(held, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("files", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_model_is_converted_with_every_value_rounded_once(tmp_path, kind, files, dtype):
    meant = write_model(tmp_path / "source", kind, files)
    output = tmp_path / "output"
    options = {"dtype": dtype, "max_shard_size": "7777B", "workers": 3, "verify": "content"}
    summary = convert(tmp_path / "source", output, say=lambda text: None, **options)
    assert len(list(output.glob("*.safetensors"))) > 5 and summary.verified
    found, wanted = factory.load_folder(output), factory.expected(meant)
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        rounded = np.ascontiguousarray(value.astype(factory.DTYPES[dtype]))
        assert found[name].dtype == rounded.dtype
        assert found[name].tobytes() == rounded.tobytes(), name
    assert "quantization_config" not in json.loads((output / "config.json").read_text())


def test_control_rounding_twice_or_another_weight_is_noticed(tmp_path):
    """What the test above compares differs where it should."""
    meant = write_model(tmp_path, "nf4", "safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    once = meant[name].astype(ml_dtypes.bfloat16)
    assert (meant[name].astype(np.float16).astype(ml_dtypes.bfloat16) != once).any()
    assert (meant[name.replace("1", "0")].astype(ml_dtypes.bfloat16) != once).mean() > 0.5


@pytest.mark.parametrize("files", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_parts_are_right_from_several_threads(tmp_path, kind, files):
    meant = write_model(tmp_path, kind, files)
    edges = [(0, 1), (1, 2), (7, 9), (15, 17), (31, 33), (3, 61), (63, 64), (0, None)]
    names = [name for name in meant if name.endswith("_proj.weight")]
    wanted = [(name, slice(*rows), slice(*columns)) for name in names for rows in edges for columns in edges]
    order = np.random.default_rng(4).permutation(len(wanted))
    with open_source(tmp_path) as source, ThreadPoolExecutor(6) as pool:

        def right(i: int) -> bool:
            name, rows, columns = wanted[i]
            return np.array_equal(source.read(name, rows, columns), meant[name][rows, columns])

        assert all(pool.map(right, order.tolist()))
