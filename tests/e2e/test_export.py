"""Exported folders: transformers computes what peft does, no trace of an adapter is left, a run finds its result."""

import json
import shutil

import chat_factory
import checkpoint_factory as factory
import ml_dtypes
import numpy as np
import paddle
import pytest
import twins
from lora_twins import KINDS, our_logits, peft_model, spec, torch_logits
from peft import PeftModel
from transformers import AutoModelForCausalLM as TorchAuto
from transformers import LlamaForCausalLM

from aquila_pd import AquilaForCausalLM, cli
from aquila_pd.adapters import export, peft_files
from aquila_pd.adapters.export import copy_adapter, merge_folder
from aquila_pd.adapters.lora import adapter_state, attach, merge
from aquila_pd.adapters.merged_source import MergedSource
from aquila_pd.checkpoint import transaction
from aquila_pd.checkpoint.convert import convert
from aquila_pd.checkpoint.io.manifest import MANIFEST, check_manifest
from aquila_pd.quantization.nf4 import quantize_model
from aquila_pd.sft.export_command import find
from aquila_pd.sft.recipe.load import load_recipe
from aquila_pd.sft.run.manifest import Manifest
from aquila_pd.text.loading import load
from aquila_pd.tokenization.chat_templates import find_template
from aquila_pd.utils.errors import CheckpointError, ConfigError, OutputError
from aquila_pd.utils.files import files_under

TARGETS = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")
PLAIN = ("v_proj", "gate_proj", "norm", "embed_tokens", "lm_head")  # weights without an adapter


def silent(line: str) -> None:
    pass


def torch_folder(path, *, dtype: str = "float32"):
    """The tiny chat model as torch has it, as a LLaMA that transformers knows, with its tokenizer."""
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype}
    config = factory.config(**{**chat_factory.SIZES, **llama})
    factory.write_safetensors(path, config, factory.weights(config, dtype=dtype))
    return chat_factory.write_aquila_tokenizer(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same base model for torch and for Paddle."""
    place = tmp_path_factory.mktemp("base")
    source = torch_folder(place / "hf")
    convert(source, place / "pd", verify="none", chat_template="aquila-v1", say=silent)
    return source, place / "pd"


def torch_adapter(source, folder, kind: str):
    """A random adapter by peft on the torch model; its files, and the model with it."""
    model = peft_model(LlamaForCausalLM.from_pretrained(source, attn_implementation="eager"), spec_of(kind))
    model.save_pretrained(folder)
    return model.eval()


def spec_of(kind: str):
    return spec(**KINDS[kind], targets=TARGETS)


def our_adapter(base, folder, *, packed: tuple[str, ...] = (), kind: str = "lora"):
    """A random adapter of ours on the Paddle model, and that model."""
    model = AquilaForCausalLM.from_pretrained(str(base)).eval()
    if packed:
        quantize_model(model, packed)
    attach(model, spec_of(kind))
    for parameter in adapter_state(model).values():
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    peft_files.save(folder, model, spec_of(kind), base=base)
    return model


def tensors_of(folder) -> dict[str, np.ndarray]:
    return factory.load_folder(folder)


# ---------------------------------------------------------------------------------------------------- the round


@pytest.mark.parametrize("kind", KINDS)
def test_back_in_transformers_it_computes_what_peft_does(folders, kind, tmp_path):
    source, base = folders
    theirs = torch_adapter(source, tmp_path / "adapter", kind)
    merge_folder(base, tmp_path / "adapter", tmp_path / "merged")
    ids = twins.ids()
    expected = torch_logits(theirs, ids)
    ours = AquilaForCausalLM.from_pretrained(str(tmp_path / "merged")).eval()
    twins.assert_close(our_logits(ours, ids), expected, 1e-4, "our logits")
    convert(tmp_path / "merged", tmp_path / "hf", framework="torch", say=silent)
    back = TorchAuto.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    twins.assert_close(torch_logits(back, ids), expected, 1e-4, "logits in transformers")
    plain = LlamaForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    assert (torch_logits(plain, ids) - expected).abs().max() > 1, "control: the adapter does something"


def test_our_adapter_in_peft_computes_what_the_export_does(folders, tmp_path):
    source, base = folders
    our_adapter(base, tmp_path / "adapter")
    merge_folder(base, tmp_path / "adapter", tmp_path / "merged")
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(source), tmp_path / "adapter").eval()
    ids = twins.ids()
    ours = AquilaForCausalLM.from_pretrained(str(tmp_path / "merged")).eval()
    twins.assert_close(our_logits(ours, ids), torch_logits(theirs, ids), 1e-4, "logits")


def test_a_torch_folder_is_a_base_too(folders, tmp_path):
    source, base = folders
    our_adapter(base, tmp_path / "adapter", kind="dora")
    merge_folder(base, tmp_path / "adapter", tmp_path / "of-paddle", template="aquila-v1")
    merge_folder(source, tmp_path / "adapter", tmp_path / "of-torch", template="aquila-v1")
    assert factory.digests(tmp_path / "of-paddle") == factory.digests(tmp_path / "of-torch")


@pytest.mark.parametrize("change", ["scaling", "transposed factors"])
def test_control_wrong_arithmetic_is_noticed(folders, change, tmp_path, monkeypatch):
    source, base = folders
    theirs = torch_adapter(source, tmp_path / "adapter", "lora")
    values = peft_files.Adapter.values

    def turned(self, projection):
        A, B, magnitude = values(self, projection)
        return A.T.reshape(A.shape), B, magnitude

    if change == "scaling":
        monkeypatch.setattr("aquila_pd.adapters.merged_source.scaling_of", lambda spec: 1.0)
    else:
        monkeypatch.setattr(peft_files.Adapter, "values", turned)
    merge_folder(base, tmp_path / "adapter", tmp_path / "merged")
    ids = twins.ids()
    ours = AquilaForCausalLM.from_pretrained(str(tmp_path / "merged")).eval()
    with pytest.raises(AssertionError, match="differ"):
        twins.assert_close(our_logits(ours, ids), torch_logits(theirs, ids), 1e-4)


# ------------------------------------------------------------------------------------------------ the folder


def test_the_folder_is_a_converted_one_without_a_trace_of_the_adapter(folders, tmp_path):
    _, base = folders
    our_adapter(base, tmp_path / "adapter")
    merge_folder(base, tmp_path / "adapter", tmp_path / "merged")
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert list(before) == list(after)
    for name, value in after.items():
        same = any(part in name for part in PLAIN)
        assert value.shape == before[name].shape and value.dtype == before[name].dtype
        assert (value == before[name]).all() == same, name
    names = files_under(base)
    assert files_under(tmp_path / "merged") == names
    for path in map((tmp_path / "merged").joinpath, names):
        if path.suffix in (".json", ".safetensors"):
            assert b"lora" not in path.read_bytes() and b"adapter" not in path.read_bytes(), path.name
        if not (path.name == MANIFEST or path.suffix == ".safetensors"):
            assert path.read_bytes() == (base / path.relative_to(tmp_path / "merged")).read_bytes(), path.name
    agree, findings, others = check_manifest(tmp_path / "merged", workers=1)
    assert (agree, findings, others) == (len(names) - 1, [], [])


def test_the_chat_loader_and_paddlenlps_auto_class_load_it(folders, tmp_path):
    from paddlenlp.transformers import AutoModelForCausalLM

    _, base = folders
    model = our_adapter(base, tmp_path / "adapter")
    merge_folder(base, tmp_path / "adapter", tmp_path / "merged", template="aquila")
    ids = twins.ids()
    loaded = load(tmp_path / "merged", needs_template=True)
    assert loaded.prompts.name == "aquila"
    auto = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged")).eval()
    for found in (loaded.model, auto):
        assert isinstance(found, AquilaForCausalLM)
        twins.assert_close(our_logits(found, ids), our_logits(model, ids).numpy(), 1e-4, "logits")


@pytest.mark.parametrize("kind", KINDS)
def test_merging_files_gives_what_merging_the_model_gives(folders, kind, tmp_path):
    _, base = folders
    model = our_adapter(base, tmp_path / "adapter", kind=kind)
    merge_folder(base, tmp_path / "adapter", tmp_path / "files")
    merge(model)
    for name, value in tensors_of(tmp_path / "files").items():
        twins.assert_close(value, model.state_dict()[name].numpy(), 1e-6, name)


def test_half_precision_stays_and_each_value_is_rounded_once(tmp_path):
    convert(torch_folder(tmp_path / "hf", dtype="bfloat16"), tmp_path / "pd", verify="none", say=silent)
    our_adapter(tmp_path / "pd", tmp_path / "adapter")
    merge_folder(tmp_path / "pd", tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    base, values = tensors_of(tmp_path / "pd"), peft_files.read(tmp_path / "adapter")
    for name, value in tensors_of(tmp_path / "merged").items():
        A, B = (values.get(f"{name.removesuffix('.weight')}.{kind}") for kind in ("lora_A", "lora_B"))
        expected = base[name]
        if A is not None:
            expected = (expected.astype(np.float32) + np.float32(1.5) * (A @ B)).astype(ml_dtypes.bfloat16)
        assert value.dtype == ml_dtypes.bfloat16
        assert np.mean(value == expected) > 0.999, name  # a product in another order may round the other way


# ------------------------------------------------------------------------------------------------ QLoRA


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_qlora_is_merged_onto_what_it_was_trained_on(folders, kind, tmp_path):
    _, base = folders
    packed = ("q_proj", "v_proj", "down_proj")  # of which v_proj has no adapter
    model = our_adapter(base, tmp_path / "adapter", packed=packed, kind=kind)
    said = []
    merge_folder(base, tmp_path / "adapter", tmp_path / "trained", say=said.append)
    assert "q_proj, v_proj, down_proj: what NF4 left of them, as trained" in "\n".join(said)
    ids = twins.ids()
    trained = AquilaForCausalLM.from_pretrained(str(tmp_path / "trained")).eval()
    twins.assert_close(our_logits(trained, ids), our_logits(model, ids).numpy(), 1e-4, "logits")

    merge_folder(base, tmp_path / "adapter", tmp_path / "original", onto="original")
    merge(model, onto=base)
    original = AquilaForCausalLM.from_pretrained(str(tmp_path / "original")).eval()
    twins.assert_close(our_logits(original, ids), our_logits(model, ids).numpy(), 1e-4, "logits")
    distance = our_logits(original, ids) - our_logits(trained, ids)
    assert float(distance.abs().max()) > 0.1, "control: the two are not the same model"


# ------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize("kind, packed", [("lora", ()), ("dora", ()), ("lora", TARGETS), ("dora", TARGETS)])
def test_a_part_has_the_same_bits_however_it_is_cut(folders, kind, packed, tmp_path, monkeypatch):
    _, base = folders
    for name, size in {"ROWS": 8, "COLUMNS": 4, "AT_ONCE": 100}.items():
        monkeypatch.setattr(f"aquila_pd.adapters.merged_source.{name}", size)
    our_adapter(base, tmp_path / "adapter", kind=kind)
    adapter = peft_files.open_adapter(tmp_path / "adapter")
    with export.open_source(base) as opened:
        source = MergedSource(opened, adapter, packed=packed)
        for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
            whole = source.read(name)
            assert whole.shape == source.tensors[name].shape
            for rows, columns in [((0, 5), (3, 20)), ((7, 9), (0, 32)), ((13, 16), (31, 32)), ((2, 2), (1, 3))]:
                rows, columns = slice(*rows), slice(*columns)
                assert (source.read(name, rows, columns) == whole[rows, columns]).all()


def test_the_number_of_threads_changes_nothing(folders, tmp_path, monkeypatch):
    _, base = folders
    our_adapter(base, tmp_path / "adapter", packed=("q_proj",), kind="dora")
    merge_folder(base, tmp_path / "adapter", tmp_path / "one", workers=1)
    monkeypatch.setattr("aquila_pd.checkpoint.io.pipeline.LARGEST", 1000)  # bytes: many parts
    merge_folder(base, tmp_path / "adapter", tmp_path / "three", workers=3)
    assert factory.digests(tmp_path / "one") == factory.digests(tmp_path / "three")


# ------------------------------------------------------------------------------------------------ refusals


def test_what_does_not_fit_is_said_before_anything_is_written(folders, tmp_path):
    _, base = folders
    our_adapter(base, tmp_path / "adapter")
    other = torch_folder(tmp_path / "hf")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    cases = [
        (tmp_path / "nowhere", {}, CheckpointError, "does not exist. Say with --base"),
        (tmp_path / "adapter", {}, CheckpointError, "is an adapter"),
        (other, {}, CheckpointError, r"does not fit the model"),
        (base, dict(onto="somewhere"), ConfigError, "trained or original"),
        (base, dict(template="aquilla"), Exception, "aquilla"),
        (base, dict(workers=0), ConfigError, "at least 1"),
    ]
    for given, options, error, said in cases:
        with pytest.raises(error, match=said):
            merge_folder(given, tmp_path / "adapter", tmp_path / "merged", **options)
    values = peft_files.read(tmp_path / "adapter")
    model = AquilaForCausalLM.from_pretrained(str(base))
    attach(model, spec_of("lora"))
    for name, parameter in adapter_state(model).items():
        parameter.set_value(values[name])
    adapter_state(model)["aquila.layers.1.mlp.up_proj.lora_B"].set_value(paddle.full([4, 52], float("nan")))
    peft_files.save(tmp_path / "adapter", model, spec_of("lora"))
    with pytest.raises(CheckpointError, match=r"NaN or infinite values:\n  .*layers\.1\.mlp\.up_proj\.lora_B"):
        merge_folder(base, tmp_path / "adapter", tmp_path / "merged")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("merged")]


def test_what_is_there_already_is_not_touched(folders, tmp_path):
    _, base = folders
    our_adapter(base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.txt").write_text("mine")
    for options in ({}, dict(overwrite=True)):
        with pytest.raises(OutputError):
            merge_folder(base, tmp_path / "adapter", tmp_path / "merged", **options)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["thesis.txt"]
    for inside in (base / "merged", tmp_path / "adapter" / "merged"):
        with pytest.raises(OutputError, match="never written to"):
            merge_folder(base, tmp_path / "adapter", inside)
    merge_folder(base, tmp_path / "adapter", tmp_path / "again")
    before = factory.digests(tmp_path / "again")
    merge_folder(base, tmp_path / "adapter", tmp_path / "again", overwrite=True)
    assert factory.digests(tmp_path / "again") == before


def test_a_disk_that_fails_leaves_nothing(folders, tmp_path, monkeypatch):
    _, base = folders
    our_adapter(base, tmp_path / "adapter")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transaction, "write_manifest", full)
    monkeypatch.setattr(transaction.Journal, "worth_keeping", 0)
    with pytest.raises(OutputError, match="No space left"):
        merge_folder(base, tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_run_that_was_stopped_goes_on_where_it_was(folders, tmp_path, monkeypatch):
    _, base = folders
    our_adapter(base, tmp_path / "adapter", kind="dora")
    monkeypatch.setattr(export, "DEFAULT_SHARD_SIZE", "30KB")
    merge_folder(base, tmp_path / "adapter", tmp_path / "whole")
    write_weights, written = transaction.write_weights, []

    def killed(source, plan, journal, **options):
        record = journal.record

        def stop_after_two(file, finished, **settings):
            record(file, finished, **settings)
            written.append(file)
            if len(written) == 2:
                raise KeyboardInterrupt

        journal.record = stop_after_two
        return write_weights(source, plan, journal, **options)

    monkeypatch.setattr(transaction, "write_weights", killed)
    with pytest.raises(KeyboardInterrupt):
        merge_folder(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr(transaction, "write_weights", write_weights)
    said = []
    merge_folder(base, tmp_path / "adapter", tmp_path / "merged", say=said.append)
    assert any("2 shards finished by an earlier run" in line for line in said)
    assert factory.digests(tmp_path / "merged") == factory.digests(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ the command


RECIPE = """
model: {base}
output: {run}
stages:
  - name: foundation
    method: full
    data: {{train: {{files: rows.jsonl}}}}
  - name: chat
    method: lora
    template: aquila
    data: {{train: {{files: rows.jsonl}}}}
"""


@pytest.fixture
def a_run(folders, tmp_path):
    """A run folder of two stages, the first one done."""
    _, base = folders
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(base=base, run=tmp_path / "run"))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    model = {"folder": str(base), "digest": "", "files": {}}
    Manifest.start(tmp_path / "run", recipe, model=model, environment={"devices": 1, "device": "cpu", "versions": {}})
    shutil.copytree(base, tmp_path / "run" / "stages" / "foundation" / "result")
    return tmp_path / "run"


def export_in_shell(*arguments) -> int:
    return cli.main(["export", *map(str, arguments)])


def test_a_run_is_exported_from_its_last_stage_with_that_stages_template(a_run, folders, tmp_path, capsys):
    _, base = folders
    assert export_in_shell(a_run, "--output", tmp_path / "out") == 1
    assert "--stage exports one that is done: foundation" in capsys.readouterr().err
    our_adapter(base, a_run / "stages" / "chat" / "result")
    assert find(a_run).template == "aquila"
    assert export_in_shell(a_run, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "LoRA, r 4, scaling 1.5, on q_proj" in said and "template aquila, as asked" in said
    recorded = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"]
    assert recorded == find_template("aquila").jinja()
    assert export_in_shell(a_run, "--stage", "foundation", "--output", tmp_path / "first") == 0
    assert all((value == tensors_of(base)[name]).all() for name, value in tensors_of(tmp_path / "first").items())
    assert export_in_shell(a_run, "--stage", "caht", "--output", tmp_path / "other") == 1
    assert "It has foundation, chat" in capsys.readouterr().err


def test_an_adapter_alone_is_copied_for_peft(a_run, folders, tmp_path, capsys):
    source, base = folders
    model = our_adapter(base, a_run / "stages" / "chat" / "result")
    assert export_in_shell(a_run, "--adapter", "--base", source, "--output", tmp_path / "adapter") == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(source)
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(source), tmp_path / "adapter").eval()
    ids = twins.ids()
    twins.assert_close(torch_logits(theirs, ids), our_logits(model, ids).numpy(), 1e-4, "logits")
    assert export_in_shell(a_run, "--adapter", "--output", tmp_path / "adapter") == 1
    assert "exists and holds" in capsys.readouterr().err
    assert export_in_shell(a_run, "--stage", "foundation", "--adapter", "--output", tmp_path / "none") == 1
    assert "ended with a full model" in capsys.readouterr().err


def test_what_is_no_run_and_no_adapter_is_told_apart(folders, tmp_path, capsys):
    _, base = folders
    assert export_in_shell(base, "--output", tmp_path / "out") == 1
    assert "is a model already" in capsys.readouterr().err
    assert export_in_shell(tmp_path, "--output", tmp_path / "out") == 1
    assert "is neither" in capsys.readouterr().err
    our_adapter(base, tmp_path / "adapter")
    assert export_in_shell(tmp_path / "adapter", "--stage", "one", "--output", tmp_path / "out") == 1
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert export_in_shell(tmp_path / "adapter", "--output", tmp_path / "out") == 1
    assert "Say so with --base" in capsys.readouterr().err
    assert export_in_shell(tmp_path / "adapter", "--base", base, "--output", tmp_path / "out") == 0


def test_copying_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no adapter"):
        copy_adapter(tmp_path, tmp_path / "out")
