"""PaddleNLP's ways to load and save, on folders written here: Auto classes, strictness, dtypes, round trips."""

import json
import shutil

import ml_dtypes
import numpy as np
import paddle
import pytest
import safetensors.numpy
from paddlenlp.transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from safetensors import safe_open
from twins import BASE, assert_close, ids, paddle_model, torch_model

from aquila_pd import AquilaConfig, AquilaForCausalLM, AquilaForSequenceClassification, AquilaModel
from aquila_pd.utils.errors import AquilaError, CheckpointError, ConfigError, OutputError

SAME = 1e-5  # the same weights, run with and without spare room in a cache


@pytest.fixture(params=["gqa", "tied"])
def saved(request, tmp_path):
    """A model and the folder it was saved to."""
    model = paddle_model(torch_model(request.param), request.param)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.fixture
def folder(tmp_path):
    paddle_model(torch_model()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokens():
    return paddle.to_tensor(ids())


def change_weights(folder, change):
    """Rewrite model.safetensors with change(dict of arrays) applied."""
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    change(arrays)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", metadata={"format": "np"})


# ------------------------------------------------------------------------------------------ Auto classes


def test_auto_classes_load_a_saved_folder(saved, tokens):
    model, folder = saved
    expected = model(tokens)[0]
    config = AutoConfig.from_pretrained(str(folder))
    assert type(config) is AquilaConfig and config.num_key_value_heads == 2
    assert type(AutoModelForCausalLM.from_pretrained(str(folder))) is AquilaForCausalLM
    assert_close(AutoModelForCausalLM.from_pretrained(str(folder))(tokens)[0], expected, SAME)
    assert_close(AquilaForCausalLM.from_pretrained(folder, config=config)(tokens)[0], expected, SAME)
    base = AutoModel.from_pretrained(str(folder))
    assert type(base) is AquilaModel
    assert_close(base(tokens)[0], model.aquila(tokens)[0], SAME)


def test_sequence_classification_gets_a_new_head_and_says_so(folder, tokens, caplog):
    caplog.set_level("WARNING", logger="aquila_pd")
    model = AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=5)
    assert type(model) is AquilaForSequenceClassification and model.score.weight.shape == [32, 5]
    assert "score.weight is not in model: it is new and random" in caplog.text
    assert 0.01 < float(model.score.weight.std()) < 0.03
    assert_close(model.aquila(tokens)[0], AquilaModel.from_pretrained(folder)(tokens)[0], SAME)
    model.save_pretrained(folder.parent / "classifier")
    again = AquilaForSequenceClassification.from_pretrained(folder.parent / "classifier")
    assert_close(again(tokens)[0], model(tokens)[0], SAME)


def test_a_base_model_saved_alone_loads_alone_and_under_a_head(folder, tokens):
    base = AquilaModel.from_pretrained(folder)
    base.save_pretrained(folder.parent / "base")
    assert_close(AquilaModel.from_pretrained(folder.parent / "base")(tokens)[0], base(tokens)[0], SAME)
    classifier = AquilaForSequenceClassification.from_pretrained(folder.parent / "base")
    assert_close(classifier.aquila(tokens)[0], base(tokens)[0], SAME)
    with pytest.raises(CheckpointError, match=r"missing     lm_head\.weight"):
        AquilaForCausalLM.from_pretrained(folder.parent / "base")


# -------------------------------------------------------------------------------------------- strictness


def test_every_missing_unexpected_and_misshapen_weight_is_named(folder):
    def damage(arrays):
        del arrays["aquila.norm.weight"], arrays["aquila.layers.1.mlp.up_proj.weight"]
        arrays["aquila.layers.2.mlp.up_proj.weight"] = np.zeros([2, 2], dtype="float32")
        arrays["lm_head.weight"] = arrays["lm_head.weight"][:, :90].copy()

    change_weights(folder, damage)
    with pytest.raises(CheckpointError) as error:
        AquilaForCausalLM.from_pretrained(folder)
    for line in (
        "missing     aquila.norm.weight",
        "missing     aquila.layers.1.mlp.up_proj.weight",
        "unexpected  aquila.layers.2.mlp.up_proj.weight",
        "shape       lm_head.weight: file has [32, 90], config says [32, 101]",
    ):
        assert line in str(error.value)


def test_a_square_weight_left_untransposed_loads_and_only_numbers_can_tell(folder, tokens):
    """Why the converter is checked against values and logits: no shape check sees this."""
    expected = AquilaForCausalLM.from_pretrained(folder)(tokens)[0]
    name = "aquila.layers.0.self_attn.o_proj.weight"
    change_weights(folder, lambda arrays: arrays.update({name: arrays[name].T.copy()}))
    with pytest.raises(AssertionError):
        assert_close(AquilaForCausalLM.from_pretrained(folder)(tokens)[0], expected, 1e-2)


def test_a_torch_folder_is_recognised_and_the_way_out_named(tmp_path):
    torch_model().save_pretrained(tmp_path / "torch")
    config = json.loads((tmp_path / "torch" / "config.json").read_text())
    config.update(model_type="aquila", architectures=["AquilaForCausalLM"])
    (tmp_path / "torch" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"convert the folder with `aquila-pd convert` first"):
        AquilaForCausalLM.from_pretrained(tmp_path / "torch")


def test_loading_draws_no_random_numbers(folder, monkeypatch):
    """PaddleNLP's own path spends nearly all its time initializing what it then overwrites."""

    def never(*_, **__):
        raise AssertionError("a weight was initialized")

    monkeypatch.setattr(AquilaForCausalLM, "_init_weights", never)
    monkeypatch.setattr(paddle, "normal", never)
    AquilaForCausalLM.from_pretrained(folder)


def test_a_loaded_model_trains(folder, tokens):
    model = AquilaForCausalLM.from_pretrained(folder)
    model.train()
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters())
    losses = []
    for _ in range(3):
        loss = model(tokens, labels=tokens)[0]
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[2] < losses[0]


# ------------------------------------------------------------------------------------------------ dtypes


def test_bf16_files_carry_the_standard_tag_and_reload_bit_for_bit(saved):
    model, folder = saved
    model.to(dtype="bfloat16")
    model.save_pretrained(folder.parent / "half", max_shard_size="20KB")
    shards = sorted((folder.parent / "half").glob("*.safetensors"))
    assert len(shards) > 1
    stored = {}
    for shard in shards:
        header = json.loads(shard.read_bytes()[8 : 8 + int.from_bytes(shard.read_bytes()[:8], "little")])
        assert {body["dtype"] for name, body in header.items() if name != "__metadata__"} == {"BF16"}
        with safe_open(shard, framework="pt") as file:  # torch reads what we call BF16
            stored.update({name: file.get_tensor(name).float().numpy() for name in file.keys()})  # noqa: SIM118  not a dict
    config = json.loads((folder.parent / "half" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    again = AquilaForCausalLM.from_pretrained(folder.parent / "half", dtype="bfloat16")
    for name, parameter in model.state_dict().items():
        assert (parameter.numpy() == again.state_dict()[name].numpy()).all(), name
        assert (parameter.astype("float32").numpy() == stored[name]).all(), name
    again.save_pretrained(folder.parent / "again", max_shard_size="20KB")
    for shard in shards:
        assert shard.read_bytes() == (folder.parent / "again" / shard.name).read_bytes()


def test_half_precision_checkpoints_come_up_as_float32_on_a_cpu_and_say_so(saved, tokens, caplog):
    if paddle.device.get_device() != "cpu":
        pytest.skip("this is about CPUs")
    model, folder = saved
    values = {name: p.astype("bfloat16").astype("float32").numpy() for name, p in model.state_dict().items()}
    model.to(dtype="bfloat16")
    model.save_pretrained(folder.parent / "half")
    caplog.set_level("INFO", logger="aquila_pd")
    again = AquilaForCausalLM.from_pretrained(folder.parent / "half")
    assert "bfloat16 checkpoint as float32" in caplog.text
    assert {p.dtype for p in again.parameters()} == {paddle.float32}
    assert all((p.numpy() == values[name]).all() for name, p in again.state_dict().items())
    assert bool(paddle.isfinite(again(tokens)[0]).all())


def test_the_published_release_tags_bf16_as_u16_and_loads(folder):
    """Paddle's own safetensors write the bits of bf16 as uint16; the published folder does too."""
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    change_weights(folder, lambda given: given.update({name: a.view(np.uint16) for name, a in half.items()}))
    model = AquilaForCausalLM.from_pretrained(folder)
    for name, parameter in model.state_dict().items():
        assert (parameter.numpy() == half[name].astype(np.float32)).all()


def test_keywords_reach_the_config_and_leave_a_given_one_alone(folder):
    given = AquilaConfig.from_pretrained(str(folder))
    for how in ({}, {"config": given}):
        model = AquilaForCausalLM.from_pretrained(folder, rope_theta=5e5, use_cache=False, **how)
        assert model.config.rope_theta == 5e5 and model.config.use_cache is False
    assert given.rope_theta == 1e4 and given.use_cache is True


def test_config_keywords_are_checked_like_the_file(folder, tokens):
    model = AquilaForCausalLM.from_pretrained(folder, rope_scaling={"rope_type": "linear", "factor": 4})
    assert model.config.rope_scaling == {"type": "linear", "factor": 4.0}
    assert bool(paddle.isfinite(model(tokens)[0]).all())
    for wrong in (dict(rope_scaling={"type": "yarn", "factor": 2.0}), dict(rope_theta=0), dict(num_key_value_heads=3)):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            AquilaForCausalLM.from_pretrained(folder, **wrong)


def test_a_misspelled_keyword_is_named(folder):
    for how in (dict(rope_tehta=5e5), dict(torch_dtyp="float32")):
        with pytest.raises(ConfigError, match="knows no " + next(iter(how))):
            AquilaForCausalLM.from_pretrained(folder, **how)
    with pytest.raises(ConfigError, match="knows no max_shard_sz"):
        AquilaForCausalLM.from_pretrained(folder).save_pretrained(folder.parent / "out", max_shard_sz="1GB")
    with pytest.raises(ConfigError, match="'fp32' is not known"):
        AquilaForCausalLM.from_pretrained(folder, dtype="fp32")


def test_dtypes_by_any_of_their_names(folder):
    for how in (dict(dtype=paddle.bfloat16), dict(torch_dtype="bfloat16"), dict(dtype="bfloat16")):
        model = AquilaForCausalLM.from_pretrained(folder, **how)
        assert model.lm_head.weight.dtype == paddle.bfloat16 and model.config.dtype == "bfloat16"


def test_a_subfolder(folder, tokens):
    expected = AquilaForCausalLM.from_pretrained(folder)(tokens)[0]
    found = AquilaForCausalLM.from_pretrained(folder.parent, subfolder=folder.name)(tokens)[0]
    assert_close(found, expected, 0.0)


def test_a_folder_without_weights_is_told_so(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: expected model\.safetensors"):
        AquilaForCausalLM.from_pretrained(folder)


def test_saving_onto_a_file_is_refused(folder):
    with pytest.raises(OutputError, match="is a file"):
        AquilaForCausalLM.from_pretrained(folder).save_pretrained(folder / "config.json")


def test_a_tied_model_with_another_head_in_its_file_is_refused(tmp_path, tokens):
    paddle_model(torch_model("tied"), "tied").save_pretrained(tmp_path)
    expected = AquilaForCausalLM.from_pretrained(tmp_path)(tokens)[0]
    change_weights(tmp_path, lambda a: a.update({"lm_head.weight": a["aquila.embed_tokens.weight"].T.copy()}))
    assert_close(AquilaForCausalLM.from_pretrained(tmp_path)(tokens)[0], expected, 0.0)
    change_weights(tmp_path, lambda a: a.update({"lm_head.weight": a["lm_head.weight"] * 1.5}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        AquilaForCausalLM.from_pretrained(tmp_path)


def test_a_weight_missing_in_pdparams_is_an_error_too(folder):
    AquilaForCausalLM.from_pretrained(folder).save_pretrained(folder.parent / "pd", safe_serialization=False)
    path = folder.parent / "pd" / "model_state.pdparams"
    state = paddle.load(str(path))
    del state["aquila.norm.weight"]
    paddle.save(state, str(path))
    with pytest.raises(CheckpointError, match=r"missing     aquila\.norm\.weight"):
        AquilaForCausalLM.from_pretrained(folder.parent / "pd")


def test_lora_is_saved_only_when_merged(folder, tokens):
    from paddlenlp.peft import LoRAConfig, LoRAModel

    model = AquilaForCausalLM.from_pretrained(folder)
    lora = LoRAModel(model, LoRAConfig(target_modules=[".*q_proj.*", ".*v_proj.*"], r=2, lora_alpha=4))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.set_value(paddle.full_like(parameter, 0.05))
    with pytest.raises(AquilaError, match="LoRA layers that are not merged"):
        model.save_pretrained(folder.parent / "merged")
    expected = model(tokens)[0]
    lora.merge()
    model.save_pretrained(folder.parent / "merged")
    again = AquilaForCausalLM.from_pretrained(folder.parent / "merged")
    assert_close(again(tokens)[0], expected, 1e-4)
    with pytest.raises(AssertionError):
        assert_close(again(tokens)[0], AquilaForCausalLM.from_pretrained(folder)(tokens)[0], 1e-2)


def test_generation_config_is_read(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 77, "max_new_tokens": 5}))
    assert AquilaForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 77
    path.unlink()
    assert AquilaForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 100


# ------------------------------------------------------------------------------------- PaddleNLP's own ways


def test_pdparams_and_safetensors_hold_the_same(saved, tokens):
    model, folder = saved
    model.save_pretrained(folder.parent / "pd", safe_serialization=False)
    assert (folder.parent / "pd" / "model_state.pdparams").is_file()
    again = AquilaForCausalLM.from_pretrained(folder.parent / "pd")
    assert_close(again(tokens)[0], model(tokens)[0], SAME)


@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_paddlenlps_convert_from_torch_finds_names_and_transpositions(kind, tmp_path, tokens):
    reference = torch_model(kind)
    reference.save_pretrained(tmp_path / "torch")
    config = AquilaConfig(**{**BASE, "tie_word_embeddings": kind == "tied"}, architectures=["AquilaForCausalLM"])
    config.save_pretrained(tmp_path / "torch")
    model = AquilaForCausalLM.from_pretrained(tmp_path / "torch", convert_from_torch=True)
    assert_close(model(tokens)[0], paddle_model(reference, kind)(tokens)[0], SAME)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "plain"])
def test_paddlenlps_trainer_trains_saves_and_resumes(folder, tmp_path, unified):
    from paddlenlp.trainer import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in ids(8, 10)]

    def trainer(output):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / output),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            save_steps=2,
            logging_steps=1,
            disable_tqdm=True,
            report_to=[],
            unified_checkpoint=unified,
        )
        model = AquilaForCausalLM.from_pretrained(folder)
        metrics = {"compute_metrics": lambda found: {"first": float(np.mean(found.predictions))}}
        return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:3], **metrics)

    with paddle.utils.unique_name.guard():  # as a process of its own would name its optimizer states
        straight = trainer("straight")
        straight.train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    with paddle.utils.unique_name.guard():
        resumed = trainer("parts")
        resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for name, parameter in straight.model.state_dict().items():
        assert_close(resumed.model.state_dict()[name], parameter, 1e-6, name)
    assert "eval_first" in straight.evaluate(), "outputs are gathered, so none may be a cache"
    again = AquilaForCausalLM.from_pretrained(tmp_path / "straight" / "checkpoint-4")
    assert_close(again.state_dict()["lm_head.weight"], straight.model.state_dict()["lm_head.weight"], 0.0)
