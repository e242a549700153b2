"""A converted folder in use: the published usage text inside it without aquila_pd, and PaddleNLP's Auto classes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_factory import digests
from converted_folder import WITHOUT_THE_PACKAGE, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from twins import torch_model

from aquila_pd.checkpoint.convert import convert

PROMPT = "Hello, please introduce yourself.\n"
NEW = 24

# Word for word the published usage text; `path` is its one variable.
USAGE = """
from modeling_aquila_pd import AquilaForCausalLM
from tokenizer_aquila_pd import AquilaTokenizer
from paddlenlp.transformers import AutoConfig
config = AutoConfig.from_pretrained(path); tokenizer = AquilaTokenizer.from_pretrained(path)
model = AquilaForCausalLM.from_pretrained(path, config=config)
features = tokenizer("Hello, please introduce yourself.\\n", return_tensors="pd")
outputs = model.generate(**features, max_new_tokens=128)
print(tokenizer.batch_decode(outputs[0], skip_special_tokens=True))
"""


def write_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE of 300 entries with Aquila's two special names, trained here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "[CLS]", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROMPT, "please, please", "introduce", "你好"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "bos_token": "[CLS]", "eos_token": "</s>", "unk_token": "<|endoftext|>",'
        ' "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": true}'
    )
    return tokenizer


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(folder, torch model, tokenizer): a tiny Hugging Face folder with tokenizer, converted with the bundle."""
    work = tmp_path_factory.mktemp("converted")
    reference = torch_model("gqa", vocab_size=300, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    reference.save_pretrained(work / "torch")
    tokenizer = write_tokenizer(work / "torch")
    convert(work / "torch", work / "paddle", say=lambda _: None)
    return work / "paddle", reference, tokenizer


def expected_text(reference, tokenizer: Tokenizer, new: int) -> str:
    tokens = torch.tensor([tokenizer.encode(PROMPT).ids])
    with torch.no_grad():
        found = reference.generate(tokens, max_new_tokens=new, do_sample=False)[0, tokens.shape[1] :].tolist()
    return tokenizer.decode(found, skip_special_tokens=True)


def test_the_published_usage_text_runs_without_the_package(converted):
    folder, reference, tokenizer = converted
    printed = run(WITHOUT_THE_PACKAGE + USAGE, folder).strip().splitlines()[-1]
    text = expected_text(reference, tokenizer, 128)
    assert len(text) > 5 and printed == str([text])


@pytest.mark.slow
def test_the_bundled_modules_serve_the_auto_classes_too(converted):
    folder, _, _ = converted
    code = """
import modeling_aquila_pd
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
print(type(model).__module__, type(tokenizer).__module__)
"""
    found = run(WITHOUT_THE_PACKAGE + code, folder).split()[-2:]
    assert found == ["aquila_pd_code.modeling", "aquila_pd_code.tokenizer"]


@pytest.mark.slow
def test_bundled_modules_and_the_package_live_in_one_process(converted):
    """Whichever came first serves the Auto classes, and each loads with a config of the other."""
    folder, _, _ = converted
    code = """
import sys
sys.path.insert(0, "")
for module in {order}:
    __import__(module)
import aquila_pd, modeling_aquila_pd
from paddlenlp.transformers import AutoConfig
config = AutoConfig.from_pretrained(".")
for cls in (aquila_pd.AquilaForCausalLM, modeling_aquila_pd.AquilaForCausalLM):
    print(type(cls.from_pretrained(".", config=config)).__module__)
"""
    for order in (["aquila_pd", "modeling_aquila_pd"], ["modeling_aquila_pd", "aquila_pd"]):
        found = run(code.format(order=order), folder).split()[-2:]
        assert found == ["aquila_pd.modeling", "aquila_pd_code.modeling"]


def test_control_the_block_really_hides_the_package(converted):
    with pytest.raises(AssertionError, match="No module named 'aquila_pd'"):
        run(WITHOUT_THE_PACKAGE + "import aquila_pd", converted[0])


def test_auto_classes_with_the_package(converted):
    from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer

    folder, reference, tokenizer = converted
    model, ours = AutoModelForCausalLM.from_pretrained(str(folder)), AutoTokenizer.from_pretrained(str(folder))
    assert type(ours).__module__ == "aquila_pd.tokenizer"
    features = ours([PROMPT, "please"], padding=True, return_tensors="pd")
    assert features["attention_mask"][1].tolist() == [0] * (features["input_ids"].shape[1] - 1) + [1]
    out, _ = model.generate(**features, max_new_tokens=NEW)
    texts = ours.batch_decode(out, skip_special_tokens=True)
    assert texts[0] == expected_text(reference, tokenizer, NEW)


def test_loading_and_saving_again_gives_the_same_bytes(converted, tmp_path):
    """Conversion and save_pretrained write one format: the same weights are the same file."""
    from aquila_pd import AquilaForCausalLM

    folder, _, _ = converted
    AquilaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert digests(tmp_path)["model.safetensors"] == digests(folder)["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["configuration", "tokenizer", "modeling", "model.pretrained", "fusion_ops"])
def test_any_module_may_be_imported_first(module):
    code = f"import aquila_pd.{module}; from aquila_pd import AquilaForCausalLM, AquilaTokenizer; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("fine\n"), done.stderr
