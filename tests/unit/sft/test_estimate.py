"""Estimates against what others measured, what the trainer counts, and what a process really holds."""

import json
import math

import numpy as np
import pytest

from aquila_pd.architecture.weight_map import Dims, weights
from aquila_pd.data.packing import plan_epoch
from aquila_pd.data.samples import Samples, SamplesWriter
from aquila_pd.data.settings import DataSpec, Source
from aquila_pd.ops.linear_cross_entropy import BLOCK_BYTES
from aquila_pd.sft.estimate.dry_run import dry_run
from aquila_pd.sft.estimate.flops import adapter_parameters, parameters, projections, trained_parameters, work
from aquila_pd.sft.estimate.memory import (
    LOGITS_AT_ONCE,
    NF4_BYTES,
    Rows,
    activations,
    layer_values,
    logits,
    memory,
)
from aquila_pd.sft.estimate.rows import BYTES_PER_TOKEN, amount
from aquila_pd.sft.estimate.stage import GIB, Machine, Model, estimate, large, stage_info
from aquila_pd.sft.loop.batches import Packs, Steps
from aquila_pd.sft.recipe.load import LoraSpec, Stage, load_recipe
from aquila_pd.utils.errors import DataError

DIMS_7B = Dims(vocab=100008, d=4096, q=4096, kv=4096, ff=11008, layers=32)
DIMS_34B = Dims(vocab=100008, d=6144, q=6144, kv=1024, ff=24576, layers=60)
CONFIG = dict(
    architectures=["AquilaForCausalLM"],
    model_type="aquila",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
CPU = Machine(1, "CPU", False)
A100 = 312e12
SPEC = DataSpec((Source(("rows.jsonl",)),))


def stage(**changes) -> Stage:
    return Stage("one", SPEC, **changes)


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "base"


@pytest.fixture
def samples(tmp_path):
    """40 samples of 5 to 60 tokens, of which half are targets; each is seen 1.5 times an epoch."""
    folder = tmp_path / "prepared" / "train"
    folder.mkdir(parents=True)
    with SamplesWriter(folder) as writer:
        for row, length in enumerate(np.random.default_rng(0).integers(5, 60, 40), 1):
            is_target = np.arange(length) >= length // 2
            writer.add(np.arange(length) % 300, is_target, file=0, row=row, weight=1.5)
        writer.finish(["rows.jsonl"])
    return Samples.open(folder)


# ------------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize(("dims", "billions"), [(DIMS_7B, 7.30), (DIMS_34B, 33.69)])
def test_parameters_are_those_of_the_weight_table(dims, billions):
    assert parameters(dims) == sum(math.prod(weight.hf_shape) for weight in weights(dims))
    assert parameters(dims) / 1e9 == pytest.approx(billions, abs=0.01)


def test_adapters_have_the_size_that_paddle_gives_them():
    from sft_factory import stage as tiny_stage
    from sft_factory import tiny_model

    lora = LoraSpec(r=3, targets=("q_proj", "v_proj", "down_proj"), dora=True)
    of = tiny_stage(method="lora", lora=lora)
    model = tiny_model(of)
    trainable = sum(p.size for p in model.parameters() if not p.stop_gradient)
    assert trainable == adapter_parameters(model.config.dims, lora) == trained_parameters(model.config.dims, of)


# ---------------------------------------------------------------------------------------- against the published


def test_one_speed_explains_the_published_times_of_full_and_lora():
    """7B, 4 rows of 2048 on one A100: 2.67 s a step for all weights, 2.04 for LoRA, both with recompute.

    The two differ by the weight gradients alone, so a right count of FLOPs gives both the same share of the peak.
    """
    shares = {}
    for method, seconds in (("full", 2.67), ("lora", 2.04), ("qlora", 2.14)):
        of_token = work(DIMS_7B, stage(method=method, recompute=True), keys=1024, labels=1.0)
        shares[method] = of_token.done * 4 * 2048 / seconds / A100
    assert shares["full"] == pytest.approx(shares["lora"], rel=0.02)
    assert 0.5 < shares["qlora"] < shares["lora"], "unpacking takes time that is no FLOP"
    # the control: LoRA counted with weight gradients would run at another share of the peak
    wrong = work(DIMS_7B, stage(recompute=True), keys=1024, labels=1.0).done * 4 * 2048 / 2.04 / A100
    assert wrong != pytest.approx(shares["full"], rel=0.2)


def published_logits(dims: Dims, rows: int) -> float:
    """Bytes: in half precision and in float32, their softmax, both gradients, of all places at once."""
    return 16.0 * rows * dims.vocab


def published_set_up(dims: Dims, rows: int, *, nf4: bool = False) -> float:
    """GB of weights, activations and logits as the published runs held them: one pass in bfloat16 with recompute,
    logits of every place, no optimizer on the card (which would not have had room for 7.3e9 * 12 bytes)."""
    packed = dims.layers * sum(out * in_ for out, in_ in projections(dims)) if nf4 else 0
    held = 2 * (parameters(dims) - packed) + NF4_BYTES * packed
    return (held + activations(dims, rows, half=True, again=True) + published_logits(dims, rows)) / 1e9


def test_published_memory_is_explained_part_by_part():
    """7B, 4 rows of 2048 on one A100-80G: 43.9 GB full, 29.4 LoRA, 19.9 QLoRA.

    10 %: GB may be 1e9 or 2**30, and libraries hold some of it. Full training keeps its optimizer elsewhere (43.9 GB
    have no room for 87 of it), so it is weights, gradients in bfloat16 and the rest.
    """
    rows = 4 * 2048
    assert published_set_up(DIMS_7B, rows) == pytest.approx(29.4, rel=0.1)
    assert published_set_up(DIMS_7B, rows, nf4=True) == pytest.approx(19.9, rel=0.1)
    assert published_set_up(DIMS_7B, rows) + 2 * parameters(DIMS_7B) / 1e9 == pytest.approx(43.9, rel=0.1)
    # the control: without the logits, which a vocabulary of 100,000 makes large, none of it would fit
    assert published_set_up(DIMS_7B, rows) - published_logits(DIMS_7B, rows) / 1e9 < 0.7 * 29.4


def test_the_published_34b_figure_is_one_of_two_rows_and_not_four():
    """37.7 GB and 8.22 s a step for QLoRA at 4096: four rows would need more than the card's peak, and 60 GB."""
    of_token = work(DIMS_34B, stage(method="qlora", recompute=True), keys=2048, labels=1.0)
    assert of_token.done * 4 * 4096 / 8.22 > A100
    assert published_set_up(DIMS_34B, 4 * 4096, nf4=True) > 1.5 * 37.7
    assert published_set_up(DIMS_34B, 2 * 4096, nf4=True) == pytest.approx(37.7, rel=0.1)


def test_activations_of_a_layer_are_those_of_the_literature():
    """Korthikanti et al., 2022: 34 bytes a token and hidden value in half precision, without scores (which flash
    attention spares); theirs has dropout masks and a wider MLP of two matrices, ours three matrices."""
    assert layer_values(DIMS_7B, fused=True) * 2 == pytest.approx(34 * 4096, rel=0.1)


# ------------------------------------------------------------------------------------------------- FLOPs


def test_flops_of_a_token_are_six_a_weight_or_four_under_adapters():
    short = dict(keys=0, labels=1.0)
    linear = sum(out * in_ for out, in_ in projections(DIMS_34B)) * 60 + 100008 * 6144
    assert work(DIMS_34B, stage(), **short).needed == 6 * linear
    lora = stage(method="lora")
    assert work(DIMS_34B, lora, **short).needed == 4 * linear + 6 * adapter_parameters(DIMS_34B, lora.lora)
    assert work(DIMS_34B, stage(recompute=True), **short).again == 2 * linear
    assert work(DIMS_34B, stage(recompute=True), **short).needed == 6 * linear, "MFU does not count what is done twice"


def test_attention_and_the_head_cost_what_they_look_at():
    base = work(DIMS_7B, stage(), keys=0, labels=0.0).needed
    assert work(DIMS_7B, stage(), keys=100, labels=0.0).needed - base == 3 * 4 * 4096 * 100 * 32
    assert work(DIMS_7B, stage(), keys=0, labels=0.5).needed - base == 6 * 100008 * 4096 / 2


# ------------------------------------------------------------------------------------------------- memory


def parts(of: Stage, *, devices: int = 1, dims: Dims = DIMS_7B, half: bool = True, labels: float = 1.0) -> dict:
    return memory(of, dims, Rows(labels, 512), heads=32, devices=devices, half=half, gpu=True).parts


def test_bytes_of_each_trained_weight():
    count = parameters(DIMS_7B)
    half, single = parts(stage()), parts(stage(), half=False)
    assert sum(half[name] for name in ("weights", "gradients", "optimizer")) == 18 * count
    assert sum(single[name] for name in ("weights", "gradients", "optimizer")) == 16 * count


def test_sharding_cuts_what_its_stage_says():
    whole = parts(stage(), devices=8)
    found = parts(stage(sharding="stage1"), devices=8)
    for part in ("weights", "gradients", "optimizer"):
        assert found[part] == whole[part] / (8 if part == "optimizer" else 1)


def test_logits_are_those_of_one_block_and_recompute_holds_few_activations():
    many = parts(stage(micro_batch=4, length=4096))
    head = 100008 * 4096 * (4 + 2)  # its gradient, while it is summed
    assert many["logits"] == BLOCK_BYTES // (4 * 100008) * 100008 * 8 + head
    assert parts(stage(length=256, micro_batch=1), labels=0.25)["logits"] == 64 * 100008 * 8 + head
    few = parts(stage(micro_batch=4, length=4096, recompute=True))
    assert few["logits"] == many["logits"] and few["activations"] < many["activations"] / 10


def test_nf4_takes_half_a_byte_and_adapters_next_to_nothing():
    full, lora, qlora = (parts(stage(method=method)) for method in ("full", "lora", "qlora"))
    assert lora["weights"] == pytest.approx(full["weights"], rel=1e-3)
    assert lora["optimizer"] + lora["gradients"] < 0.1e9
    assert qlora["weights in NF4"] + qlora["weights"] == pytest.approx(5.0e9, rel=0.02)


def test_logits_are_held_in_blocks_of_the_size_that_is_estimated():
    assert LOGITS_AT_ONCE == BLOCK_BYTES
    assert logits(DIMS_7B, 1e6, half=True) < 2 * BLOCK_BYTES < logits(DIMS_7B, 1e6, half=True) * 1.01


# --------------------------------------------------------------------------------------------- rows and steps


def test_packs_and_steps_of_prepared_rows_are_the_trainers(samples, model_folder, tmp_path):
    of = stage(length=128, epochs=2.5, global_batch=4)
    found = amount(of, seed=3, prepared=samples.folder)

    def plan_of(epoch: int):
        return plan_epoch(samples, length=128, seed=3, epoch=epoch, folder=tmp_path / "plans")

    packs = Packs(samples, plan_of, epochs=2.5, length=128, pad_id=0)
    steps = Steps(packs, global_batch=4, max_steps=None)
    one = estimate(of, Model.read(model_folder), CPU, found)
    assert found.exact and (one.packs, one.steps) == (len(packs), steps.steps)
    seen = sum(steps.counts(step).tokens for step in range(steps.steps))
    assert one.tokens == pytest.approx(seen, rel=0.1), "the last, short packs of an epoch differ"
    assert found.samples == 60 and found.tokens == 1.5 * samples.lengths.sum()


def test_max_steps_ends_it_sooner(samples, model_folder):
    of = stage(length=128, epochs=2, global_batch=4, max_steps=3)
    found = amount(of, seed=0, prepared=samples.folder)
    one = estimate(of, Model.read(model_folder), CPU, found)
    assert (one.steps, one.packs) == (3, 12)
    assert one.tokens == pytest.approx(found.tokens * 12 / np.mean(found.packs))


def test_rows_of_files_are_estimated_and_that_is_said(tmp_path):
    text = "word " * 94  # 470 bytes, as many as 100 tokens have
    row = {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(1000)))
    spec = DataSpec((Source((str(tmp_path / "*.jsonl"),), weight=2.0),), held_out=0.1)
    found = amount(Stage("one", spec, length=512), seed=0, prepared=None)
    assert found.samples == pytest.approx(1800, rel=0.01) and not found.exact
    assert found.tokens == pytest.approx(1800 * 2 * len(text) / BYTES_PER_TOKEN, rel=0.01)
    assert found.packs[0] == pytest.approx(found.tokens / 512, rel=0.01)
    assert "estimated from 1 file, before filters" in found.source
    with pytest.raises(DataError, match="no file"):
        amount(stage(), seed=0, prepared=None)


def test_a_table_says_its_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    talk = [[{"from": "human", "value": "a b c"}, {"from": "gpt", "value": "d e f"}]] * 321
    pq.write_table(pa.table({"conversations": talk}), tmp_path / "rows.parquet")
    spec = DataSpec((Source((str(tmp_path / "rows.parquet"),)),))
    assert amount(Stage("one", spec), seed=0, prepared=None).samples == 321


def test_bytes_per_token_is_what_aquilas_tokenizer_makes_of_real_rows(shared):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = shared / "tokenizer"
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lines = (shared / "data" / "multi_turn.jsonl").read_text().splitlines()
    texts = [turn["value"] for line in lines for turn in json.loads(line)["conversations"]]
    tokens = sum(len(encoded.ids) for encoded in tokenizer.encode_batch(texts))
    assert sum(len(text.encode()) for text in texts) / tokens == pytest.approx(BYTES_PER_TOKEN, rel=0.05)


# ------------------------------------------------------------------------------------------------- time, log


def test_time_follows_from_a_peak_and_an_assumption_or_from_a_measured_speed(samples):
    model = Model(DIMS_7B, 32, 2048)
    of = stage(length=128, global_batch=8)
    found = amount(of, seed=0, prepared=samples.folder)
    cards = Machine.named(8, "NVIDIA A100-SXM4-80GB")
    one = estimate(of, model, cards, found, utilization=0.5)
    assert one.seconds == pytest.approx(one.work.done * one.tokens / (8 * 0.5 * A100))
    assert "assuming 50% of the 312 TFLOP/s" in one.speed
    measured = estimate(of, model, cards, found, tokens_per_s=1000.0)
    assert measured.seconds == pytest.approx(one.labels / 8000.0) and "given 1,000 tok/s" in measured.speed
    unknown = estimate(of, model, CPU, found)
    assert unknown.seconds is None and "nothing is known of the speed of CPU" in unknown.speed


def test_the_log_is_told_what_mfu_is_measured_by(samples):
    model, of = Model(DIMS_7B, 32, 2048), stage(recompute=True)
    info = stage_info(of, model, samples, Machine.named(2, "A100-40GB"), dtype="bfloat16", steps=10, step=4)
    lengths, targets = samples.lengths, samples.target_counts
    keys = (lengths * (lengths + 1) / 2).sum() / lengths.sum()
    expected = work(DIMS_7B, of, keys=keys, labels=targets.sum() / lengths.sum())
    assert info.flops_per_token == pytest.approx(expected.needed) and info.peak_flops == A100
    assert (info.stage, info.step, info.steps) == ("one", 4, 10) and "7.3 billion" in info.facts["trains"]


@pytest.mark.parametrize(
    ("number", "text"), [(12, "12"), (45_678, "45,678"), (4_194_304, "4.19 million"), (33_693_554_688, "33.7 billion")]
)
def test_large_numbers_are_said_in_words(number, text):
    assert large(number) == text


# --------------------------------------------------------------------------------------------------- dry run


@pytest.fixture
def recipe(tmp_path, model_folder):
    """recipe(*overrides) of two stages on the tiny model."""
    rows = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(rows) + "\n") * 50)
    (tmp_path / "recipe.yaml").write_text("""
model: base
output: run
defaults: {length: 128, global_batch: 2, data: {train: {files: rows.jsonl}}, optim: {warmup_ratio: 0.1}}
stages:
  - {name: one, epochs: 3}
  - {name: two, method: lora}
""")
    return lambda *overrides: load_recipe(tmp_path / "recipe.yaml", overrides)


def test_a_dry_run_says_all_there_is_to_know_and_writes_nothing(recipe, tmp_path, samples):
    before = sorted(tmp_path.rglob("*"))
    found = dry_run(recipe(), CPU, prepared=lambda name: samples.folder if name == "one" else None, tokens_per_s=100.0)
    assert found.findings == [] and sorted(tmp_path.rglob("*")) == before
    for words in (
        "recipe: 2 stages on 1 x CPU",
        "Stage one (1 of 2)",
        "60 samples an epoch",
        "(counted in the prepared rows)",
        "a step    256 places: 2 times 1 pack",
        "trains    all 36,768 of 36,768 weights, in float32",
        "trains    lora of rank 8: 1,792 of 36,768 weights",
        "(estimated from 1 file, before filters and duplicates)",
        "MiB on each device:",
        "at the given 100 tok/s of a device",
        "All stages: about",
        "Nothing was started; nothing known stands in the way.",
    ):
        assert words in found.text
    assert max(map(len, found.lines)) <= 120 + len(str(tmp_path))


def test_a_dry_run_lists_everything_that_stands_in_the_way(recipe):
    asked = recipe("stages.0.data.train.files=none.jsonl", "stages.1.micro_batch=2", "stages.1.dtype=bfloat16")
    found = dry_run(asked, Machine(3, "CPU", False))
    assert [line.partition("\n")[0].partition(": ")[0] for line in found.findings] == [
        "Stage one",
        "one",
        "Stage two",
        "two",
    ]
    assert "What stands in the way:" in found.text and found.text.endswith("Nothing was started.")
    assert "weights" in found.text, "memory is known without rows"


def test_a_dry_run_without_a_model_says_so_and_of_rows_what_it_can(recipe, model_folder):
    (model_folder / "config.json").unlink()
    found = dry_run(recipe(), CPU)
    assert [line.partition(":")[0] for line in found.findings] == ["model"]


def test_a_dry_run_knows_what_does_not_fit_and_what_would(recipe):
    little = Machine(1, "A100-0GB", True, 0.5 * GIB)
    found = dry_run(recipe(), little)
    assert len(found.findings) == 2 and "less is needed with recompute: true, or method: lora or qlora" in found.text
    assert dry_run(recipe(), Machine(1, "A100", True, 100 * GIB)).findings == []


def test_a_dry_run_points_at_what_is_seldom_meant(recipe):
    found = dry_run(recipe("stages.0.length=512", "stages.*.optim.warmup_steps=1000", "stages.*.epochs=1"), CPU)
    assert found.findings == []
    assert found.notes[0] == "one: length 512 is more than the model's 256"
    assert any("the warmup, 1,000 steps, is all of" in note for note in found.notes)


@pytest.mark.parametrize("name", ["A100-80GB", "NVIDIA A100-SXM4-80GB", "H100 80G"])
def test_the_memory_of_a_card_may_be_in_its_name(name):
    assert Machine.named(8, name).memory == 80 * GIB and Machine.named(8, "NVIDIA L40S").memory is None
