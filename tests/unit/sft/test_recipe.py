"""Recipes: what is read, what is refused, and that a person finds the place of everything that is wrong at once."""

import json
import os
from pathlib import Path

import pytest
import yaml
from effort import tries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import ROOT

from aquila_pd.data.settings import DataSpec, Source
from aquila_pd.sft.recipe.load import LoraSpec, Optim, Recipe, Stage, load_recipe, load_values
from aquila_pd.utils.errors import RecipeError

RECIPES = ROOT / "recipes"
SMALL = """
model: base
output: run
stages:
  - name: one
    data: {train: {files: rows.jsonl}}
"""


@pytest.fixture
def load(tmp_path):
    """load(text, *overrides) -> Recipe."""

    def load(text: str, *overrides: str) -> Recipe:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return load


@pytest.fixture
def findings(load):
    """findings(text, *overrides) -> the indented lines of the error."""

    def findings(text: str, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return [line.strip() for line in str(caught.value).split("\n") if line.startswith("  ")]

    return findings


def in_stage(*lines: str) -> str:
    """The small recipe with more keys in its stage; the first of them stands in line 7."""
    return SMALL + "".join(f"    {line}\n" for line in lines)


# ------------------------------------------------------------------------------------------------- what is read


def test_what_is_left_out_has_its_default(load, tmp_path):
    recipe = load(SMALL)
    data = DataSpec((Source((str(tmp_path / "rows.jsonl"),)),))
    assert recipe == Recipe(
        str(tmp_path / "base"), str(tmp_path / "run"), (Stage("one", data),), name="recipe", seed=0, export="merged"
    )
    assert recipe.text == SMALL


def test_numbers_may_be_written_as_people_write_them(load):
    optim = (
        load(in_stage("optim: {lr: 1e-5, min_lr: 1E-6, eps: .5, weight_decay: 1, betas: [0.9, 1_0.e-2]}"))
        .stages[0]
        .optim
    )
    assert optim == Optim(lr=1e-5, min_lr=1e-6, eps=0.5, weight_decay=1.0, betas=(0.9, 0.1))
    assert yaml.safe_load("1e-5") == "1e-5"  # the reason: to YAML 1.1 this is text


def test_text_is_what_stands_there_whatever_yaml_makes_of_it(load):
    spec = load("""
name: 2024-01-01
model: base
output: run
stages:
  name: on
  data: {train: {files: [1, 0x10, a.jsonl]}, languages: [zh, no], sources: "yes"}
""")
    (stage,) = spec.stages
    assert (spec.name, stage.name, stage.data.languages, stage.data.sources) == (
        "2024-01-01",
        "on",
        ("zh", "no"),
        ("yes",),
    )
    assert [Path(file).name for file in stage.data.train[0].files] == ["1", "0x10", "a.jsonl"]
    assert yaml.safe_load("no") is False  # the reason


def test_defaults_are_shared_and_a_stage_says_what_is_different(load):
    first, second = load("""
model: base
output: run
defaults:
  method: lora
  lora: {r: 16, alpha: 32}
  optim: {lr: 1e-4, warmup_ratio: 0.1}
  data: {held_out: 0.1, train: {files: all.jsonl}}
stages:
  - name: one
  - name: two
    lora: {r: 4}
    optim: {warmup_steps: 3}
    data: {train: [{files: [a, b], weight: 2.5}]}
""").stages
    assert first.lora == LoraSpec(r=16, alpha=32.0) and second.lora == LoraSpec(r=4, alpha=32.0)
    assert first.optim == Optim(lr=1e-4, warmup_ratio=0.1)
    assert second.optim == Optim(lr=1e-4, warmup_steps=3), "the other way to say a warmup takes the place of the first"
    assert second.data.held_out == 0.1 and second.data.train[0].weight == 2.5 and len(second.data.train) == 1


def test_anchors_and_merges_of_yaml_work(load):
    first, second = load("""
model: base
output: run
stages:
  - &one
    name: one
    epochs: 2
    optim: &optim {lr: 1e-4, clip: 0.5}
    data: &data {train: {files: a.jsonl}}
  - <<: *one
    name: two
    optim: {<<: *optim, lr: 1e-5}
""").stages
    assert (second.epochs, second.data, second.optim) == (2.0, first.data, Optim(lr=1e-5, clip=0.5))


def test_paths_are_those_of_the_recipes_folder_and_of_overrides_those_of_the_current_one(load, tmp_path, monkeypatch):
    text = SMALL.replace("files: rows.jsonl", "files: [../rows/*.jsonl, ~/rows.jsonl, /all/rows]")
    monkeypatch.chdir(tmp_path.parent)
    recipe = load(text, "output=here", "stages.0.data.contamination=[gsm8k.jsonl]")
    assert recipe.model == str(tmp_path / "base")
    assert recipe.output == str(tmp_path.parent / "here")
    (spec,) = (stage.data for stage in recipe.stages)
    assert spec.contamination == (str(tmp_path.parent / "gsm8k.jsonl"),)
    assert spec.train[0].files == (f"{tmp_path.parent}/rows/*.jsonl", os.path.expanduser("~/rows.jsonl"), "/all/rows")


def test_the_digest_names_what_is_asked_and_neither_comments_nor_the_folder(load, tmp_path):
    digest = load(SMALL).digest
    assert load("# words\n" + SMALL.replace("name: one", "name:   'one'  # same")).digest == digest
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.yaml").write_text(SMALL)
    assert load_recipe(tmp_path / "other" / "recipe.yaml").digest == digest
    assert load(SMALL, "stages.0.optim.lr=2e-5").digest != digest
    assert load(SMALL, "seed=1").digest != digest
    assert load(SMALL.replace("rows.jsonl", "other.jsonl")).digest != digest


# Of the shipped recipes, by the reader that manifests of earlier runs were written with: another one is another run.
DIGESTS = {
    "aquila2_34b_lora": "c0a7a9a2c7676c875932017489bcfcd27d53f7687db49d239b2aa543b7755680",
    "aquila2_34b_qlora": "5c02c0d659ebe0636d819e7bca177c46a8575695edccc05062d689c4332937da",
    "aquila2_7b_full": "7b798434d31d8a85de1ff0c82562ed28cf60212a1028dab0026f6b90f15bd69b",
    "aquila2_7b_lora": "8ff65c478fc9738b8d9dfc7d9bfa63ebd0eafad047264bd87ec3b74fe0df5f8a",
    "aquila2_7b_qlora": "bf1b3245cb0b27020619186ec174c36d05920cb1249d1e218fdf66961199978b",
    "infinity_two_stage": "ffd02704f0e8d9985e24ef1c0e183c5bdac2d06d98788940981a022dfdbc7092",
    "infinity_two_stage_34b": "139aaa7a8d6f8fc3170d023317d009fc8fb6b2cba1c08ba991cf69f7937db57d",
    "tiny": "b02b0430006ce51de8cb707ce63e76d1c4afae9409744c61ae799c3acb6c3bb8",
}


def test_digests_are_those_of_earlier_manifests():
    assert {name: load_recipe(RECIPES / f"{name}.yaml").digest for name in DIGESTS} == DIGESTS


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_survives_being_kept(path):
    recipe = load_recipe(path)
    kept = load_values(json.loads(json.dumps(recipe.values())), text=recipe.text, written=recipe.written)
    assert kept == recipe and (kept.text, kept.digest) == (recipe.text, recipe.digest)


def test_the_shipped_recipes_say_what_was_published():
    assert {path.stem for path in RECIPES.glob("*.yaml")} >= {"infinity_two_stage", "tiny", "aquila2_34b_qlora"}
    infinity = load_recipe(RECIPES / "infinity_two_stage.yaml")
    assert [stage.name for stage in infinity.stages] == ["foundation", "chat"]
    for stage in infinity.stages:
        assert (stage.epochs, stage.global_batch, stage.method) == (3, 528, "full")
        assert stage.optim == Optim(1e-5, 0.0, "cosine", warmup_steps=40, weight_decay=0.0, betas=(0.9, 0.95), clip=1.0)
    for name in ("aquila2_7b_lora", "aquila2_7b_qlora", "aquila2_34b_lora", "aquila2_34b_qlora", "aquila2_7b_full"):
        (stage,) = load_recipe(RECIPES / f"{name}.yaml").stages
        assert stage.method == name.rpartition("_")[2]
        assert stage.optim == Optim(9.65e-6, schedule="linear", warmup_ratio=0.1, weight_decay=0.1)
        assert (stage.epochs, stage.lora) == (5, LoraSpec(8, 16.0, 0.05, ("q_proj", "v_proj")))


# ------------------------------------------------------------------------------------------- what is refused


def test_all_that_is_wrong_is_said_at_once_with_its_line(findings):
    assert findings("""
model: base
output: run
defaults:
  lr_rate: 1e-5
stages:
  - name: one
    data: {train: {files: a, weight: -1}, held_out: 2}
    optim: {lr_rate: 1e-4}
    epochs: 0
    method: loar
  - data: [a]
    length: 1e3
    recompute: perhaps
""") == [
        "defaults.lr_rate: unknown key (line 5); did you mean optim.lr?",
        "stages.0.data.train.weight: it is -1 and must be more than 0 (line 8)",
        "stages.0.data.held_out: it is 2 and must be less than 1 (line 8)",
        "stages.0.optim.lr_rate: unknown key (line 9); did you mean lr?",
        "stages.0.epochs: it is 0 and must be more than 0 (line 10)",
        "stages.0.method: it is 'loar' and must be 'full', 'lora' or 'qlora' (line 11); did you mean lora?",
        "stages.1.name: it is missing (line 12)",
        "stages.1.data: it is a list and must be keys and values (line 12)",
        "stages.1.length: it is '1e3' and must be a whole number (line 13)",
        "stages.1.recompute: it is 'perhaps' and must be true or false (line 14)",
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "optim.lr"),
        ("lr", "optim.lr"),
        ("optm", "optim"),
        ("epoch", "epochs"),
        ("num_train_epochs", "epochs"),
        ("per_device_train_batch_size", "micro_batch"),
        ("gradient_accumulation_steps", "global_batch"),
        ("lora_rank", "lora.r"),
        ("target_modules", "lora.targets"),
        ("max_seq_length", "length"),
        ("seed", "seed"),
        ("held_out", "data.held_out"),
    ],
)
def test_an_unknown_key_is_told_the_right_one(findings, key, meant):
    assert findings(in_stage(f"{key}: 1")) == [f"stages.0.{key}: unknown key (line 7); did you mean {meant}?"]


def test_an_unknown_key_like_no_other_is_told_nothing(findings):
    assert findings(in_stage("zzz: 1")) == ["stages.0.zzz: unknown key (line 7)"]


def test_a_key_of_stages_at_the_top_is_told_its_place(findings):
    assert findings("epochs: 3\ndefault: {}" + SMALL) == [
        "epochs: unknown key (line 1); did you mean defaults.epochs?",
        "default: unknown key (line 2); did you mean defaults?",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("epochs: -1", "epochs: it is -1 and must be more than 0"),
        ("epochs: .inf", "epochs: it is '.inf' and must be a number"),
        ("epochs: '3'", "epochs: it is '3' and must be a number (line 7); without quotes it may be one"),
        ("epochs: 1:30", "epochs: it is '1:30' and must be a number"),
        ("epochs: [1]", "epochs: it is a list and must be a number"),
        ("epochs:", "epochs: it is empty and must be a number (line 7); leave the key out for its default"),
        ("length: 1", "length: it is 1 and must be at least 2"),
        ("micro_batch: 3", "micro_batch: 3 does not divide global_batch 32"),
        ("optim: {min_lr: 2e-5}", "optim.min_lr: it is 2e-05, above lr 1e-05"),
        ("optim: {min_lr: 1e-6, schedule: constant}",
         "optim.schedule: constant never falls to min_lr, which is 1e-06"),
        ("optim: {warmup_steps: 1, warmup_ratio: 0.1}",
         "optim.warmup_ratio: warmup_steps is there too; keep one of them"),
        ("optim: {betas: [0.9, 1]}", "optim.betas.1: it is 1 and must be less than 1"),
        ("length: 1_048_577", "length: it is 1_048_577 and must be at most 1,048,576"),
        ("optim: {betas: [0.9]}", "optim.betas.1: it is missing"),
        ("optim: {betas: [0.9, 0.9, 0.9]}", "optim.betas: it is a list and must be a list of 2"),
        ("optim: {betas: 0.9}", "optim.betas: it is '0.9' and must be a list"),
        ("optim: 1", "optim: it is '1' and must be keys and values"),
        ("lora: {r: 4}", "lora.r: method is full, so nothing uses it"),
        ("eval_every: 5", "eval_every: there is nothing to evaluate on; give data.held_out (a share of the rows) or "
         "data.evaluate (files)"),
        ("keep_best: true", "keep_best: eval_every is 0, so that nothing is evaluated before the end"),
        ("{max_steps: 5, optim: {warmup_steps: 6}}", "max_steps: it is 5, and the warmup alone takes 6 steps"),
    ],
)  # fmt: skip
def test_values_and_contradictions_are_found(findings, line, said):
    if line.startswith("{"):  # several keys
        lines = [f"{key}: {json.dumps(value)}" for key, value in yaml.safe_load(line).items()]
    else:
        lines = [line]
    assert findings(in_stage(*lines)) == [f"stages.0.{said}" if "(line" in said else f"stages.0.{said} (line 7)"]


@pytest.mark.parametrize("name", ["..", "a/b", "", "-a", "a.", "名", "x" * 65, "a\\b"])
def test_a_stages_name_must_do_as_a_folders(findings, name):
    (finding,) = findings(SMALL.replace("name: one", f"name: '{name}'"))
    assert "cannot name a folder everywhere" in finding


def test_two_stages_of_one_name_are_found_also_where_only_case_differs(findings):
    again = SMALL + "  - name: One\n    data: {train: {files: b}}\n"
    assert findings(again) == [
        "stages.1.name: stages.0.name is 'one', and each stage has a folder of its name (line 7)"
    ]


def test_lora_keys_that_no_stage_uses_are_found(findings, load):
    defaults = "defaults:\n  lora: {r: 4}"
    assert findings(defaults + SMALL) == [
        "defaults.lora: no stage has method lora or qlora, so nothing uses it (line 2)"
    ]
    load(defaults + in_stage("method: lora"))  # the control


def test_lora_targets_must_be_projections_of_the_model(findings):
    (finding,) = findings(in_stage("method: lora", "lora: {targets: [q_proj, Wq]}"))
    assert "it is 'Wq' and must be 'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj'" in finding


def test_an_output_in_the_models_folder_is_refused(findings, load):
    assert "would change the model" in findings(SMALL.replace("output: run", "output: base/run"))[0]
    assert "would change the model" in findings(SMALL.replace("output: run", "output: ./base"))[0]
    load(SMALL.replace("output: run", "output: base2"))  # the control


def test_a_template_must_exist(findings):
    (finding,) = findings(in_stage("template: aquila-v9"))
    assert finding.startswith("stages.0.template: No chat template is called 'aquila-v9'") and "aquila-v2" in finding


# ----------------------------------------------------------------------------------------- damaged and hostile files


def test_a_key_that_is_there_twice_is_refused_with_both_lines(findings):
    assert findings(in_stage("epochs: 1", "epochs: 2")) == ["stages.0.epochs: the key is there twice (lines 7 and 8)"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "line 1, column 9"),
        ("a: *b", "found undefined alias 'b'"),
        ("a: &a [*a]", "an anchor contains itself (line 1)"),
        ("[" * 5000, "nested too deeply"),
        ("a: \x00", "special characters"),
        ("", "it holds no keys and values"),
        ("[1, 2]", "it holds no keys and values"),
        ("model: base\n---\nmodel: b", "expected a single document"),
        ("model: !!python/object/apply:os.system [ls]", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("? [a, b]\n: c", "a list or mapping is no key (line 1)"),
        ("<<: 3", "<< wants a mapping"),
        ("".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10 if i else 1}]\n" for i in range(9)), "more than 20,000 values"),
    ],
)
def test_what_is_no_recipe_is_refused_in_words(findings, text, said):
    assert said in " ".join(findings(text))


WORDS = [
    "name",
    "data",
    "train",
    "files",
    "optim",
    "lr",
    "betas",
    "lora",
    "targets",
    "method",
    "epochs",
    "warmup_steps",
]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    top=st.dictionaries(st.sampled_from(["model", "output", "seed", "name", "export"]), VALUES, max_size=5),
    defaults=VALUES,
    stages=VALUES | st.lists(st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=6), max_size=3),
    override=st.sampled_from(
        ["", "stages.0.optim.lr=1", "stages.*.data={}", "defaults.lora.r=2", "seed=[1", "model.x=1"]
    ),
)
@settings(max_examples=tries(50, 150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_recipe_holds_it_is_a_recipe_or_an_error_in_words(tmp_path, top, defaults, stages, override):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({**top, "defaults": defaults, "stages": stages}, allow_unicode=True), encoding="utf-8"
    )
    try:
        load_recipe(path, [override] if override else [])
    except RecipeError as error:
        assert str(error)


def test_a_recipe_that_is_not_there_is_told_what_is(tmp_path):
    (tmp_path / "infinity.yaml").write_text(SMALL)
    with pytest.raises(RecipeError, match=r"There is no recipe .*infinty\.yaml\. In .* there are infinity\.yaml"):
        load_recipe(tmp_path / "infinty.yaml")


# ---------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_typed_like_the_file(load):
    two = SMALL + "  - name: two\n    data: {train: [{files: b}]}\n"
    recipe = load(
        two,
        "stages.0.optim.lr=2e-5",
        "stages[1].epochs = 2.5",
        "stages.*.recompute=true",
        "stages.1.data.train.0.files=[c.jsonl, d.jsonl]",
        "stages.1.lora={r: 2, targets: [k_proj]}",
        "stages.1.method=lora",
        "seed=7",
    )
    first, second = recipe.stages
    assert (first.optim.lr, second.epochs, first.recompute, second.recompute, recipe.seed) == (2e-5, 2.5, True, True, 7)
    assert second.lora == LoraSpec(r=2, targets=("k_proj",))
    assert [Path(file).name for file in second.data.train[0].files] == ["c.jsonl", "d.jsonl"]
    assert recipe.overrides[0] == "stages.0.optim.lr=2e-5"


def test_an_override_of_the_defaults_reaches_stages_that_say_nothing_else(load):
    text = "defaults: {epochs: 3}" + SMALL + "  - {name: two, epochs: 2, data: {train: {files: b}}}\n"
    assert [stage.epochs for stage in load(text, "defaults.epochs=1").stages] == [1, 2]


def test_an_override_of_one_warmup_takes_the_place_of_the_other(load):
    text = "defaults: {optim: {warmup_ratio: 0.1}}" + SMALL
    assert load(text, "stages.0.optim.warmup_steps=4").stages[0].optim == Optim(warmup_steps=4)


def test_null_gives_a_default_back(load):
    assert load(in_stage("template: aquila"), "stages.0.template=").stages[0].template is None


def test_a_change_of_method_does_not_trip_over_the_files_lora_but_over_ones_own(load, findings):
    text = in_stage("method: lora", "lora: {r: 4}")
    assert load(text, "stages.0.method=full").stages[0].method == "full"
    assert findings(text, "stages.0.method=full", "stages.0.lora.r=2") == [
        "stages.0.lora.r: method is full, so nothing uses it (given on the command line)"
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.0.epoch=1", "stages.0.epoch: unknown key (given on the command line); did you mean epochs?"),
        ("stages.0.epochs=many", "stages.0.epochs: it is 'many' and must be a number (given on the command line)"),
        ("stages.3.epochs=1", "stages: '3' is none of its 1 entries, which count from 0; * is all of them"),
        ("stages.0.name.x=1", "stages.0.name: 'one' has nothing inside it to override with 'x'"),
        ("stages.0.epochs", "'stages.0.epochs' is no override; they look like stages.0.optim.lr=2e-5"),
        ("stages..epochs=1", "'stages..epochs=1' is no override; they look like stages.0.optim.lr=2e-5"),
    ],
)
def test_a_wrong_override_is_told_apart_from_the_file(findings, override, said):
    assert findings(SMALL, override) == [said]


# ------------------------------------------------------------------------------------------------ what follows


def test_accumulation_follows_from_devices_and_refuses_what_does_not_divide():
    stage = Stage("one", DataSpec((Source(("a",)),)), global_batch=528, micro_batch=2)
    assert [stage.accumulation(devices) for devices in (1, 8)] == [264, 33]
    with pytest.raises(RecipeError, match=r"does not divide.*5 devices. Nearest that do: 520 and 530"):
        stage.accumulation(5)
