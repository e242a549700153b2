"""The processor's choice, the table of versions, doctor and the commands, with invented machines and installations."""

import os
import re
import runpy
import socket
import subprocess
import sys

import pytest
from paths import ROOT

import aquila_pd
from aquila_pd import cli, doctor
from aquila_pd.runtime import mkl, versions
from aquila_pd.runtime.mkl import decide
from aquila_pd.utils.errors import AquilaError, InstallationError

AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: X: 2\nflags\t\t: fpu avx avx2 fma bmi2\nbugs\t\t:\n"
OLD_AMD = AMD.replace(" avx2", "")
ZEN4 = AMD.replace(" avx2", " avx2 avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512_bf16")
INTEL = AMD.replace("AuthenticAMD", "GenuineIntel")
HYGON = AMD.replace("AuthenticAMD", "HygonGenuine")
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm\nCPU implementer\t: 0x41\n"


def on(cpuinfo: str, *, machine: str = "x86_64", chosen: str | None = None, paddle_loaded: bool = False):
    return decide(cpuinfo, machine=machine, chosen=chosen, paddle_loaded=paddle_loaded)


# ------------------------------------------------------------------------------------------------ processor


@pytest.mark.parametrize("cpuinfo", [AMD, HYGON])
def test_avx2_kernels_are_chosen_where_mkl_would_not_look(cpuinfo):
    assert (on(cpuinfo).action, on(cpuinfo).value) == ("set", "5")


def test_avx512_kernels_are_chosen_where_all_of_their_instructions_are_there():
    assert on(ZEN4).value == "7" and "AVX-512" in on(ZEN4).reason
    for one in ("avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"):  # without it MKL's path is no valid program
        assert on(ZEN4.replace(f" {one} ", " ")).value == "5", one


@pytest.mark.parametrize(
    ("decision", "reason"),
    [
        (on(INTEL), "GenuineIntel"),
        (on(OLD_AMD), "no AVX2"),
        (on(AMD.replace(" fma", "")), "no AVX2 with FMA"),
        (on(ARM, machine="aarch64"), "aarch64"),
        (on(""), "no /proc/cpuinfo"),
        (on(AMD, chosen="1"), "already"),
        (on(AMD, chosen=""), "already"),
        (on(AMD, paddle_loaded=True), "Paddle was loaded first"),
    ],
)
def test_everything_else_is_left_alone_with_the_reason(decision, reason):
    assert decision.action == "left alone"
    assert reason in decision.reason


def test_a_processor_that_needs_nothing_is_not_told_it_is_too_late():
    assert "GenuineIntel" in on(INTEL, paddle_loaded=True).reason


def fresh(monkeypatch, tmp_path, text: str, *, paddle_loaded: bool = False) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(mkl, "_last", None)
    monkeypatch.setattr(mkl, "first_block", lambda: (tmp_path / "cpuinfo").read_text().partition("\n\n")[0])
    monkeypatch.setattr(mkl.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(mkl, "sys", type("Sys", (), {"modules": {"paddle": 1} if paddle_loaded else {}}))


def test_the_variable_is_set_once_and_said_once(monkeypatch, tmp_path, caplog):
    fresh(monkeypatch, tmp_path, AMD)
    caplog.set_level("INFO", logger="aquila_pd")
    environ: dict[str, str] = {}
    first = mkl.prefer_fast_kernels(environ)
    environ_after_first = dict(environ)
    second = mkl.prefer_fast_kernels(environ)
    assert environ == environ_after_first == {"MKL_DEBUG_CPU_TYPE": "5"}
    assert first is second
    assert len(caplog.records) == 1
    assert "Matrix kernels set." in caplog.text


def test_the_users_own_value_stays(monkeypatch, tmp_path):
    fresh(monkeypatch, tmp_path, AMD)
    environ = {"MKL_DEBUG_CPU_TYPE": "4"}
    assert mkl.prefer_fast_kernels(environ).action == "left alone"
    assert environ == {"MKL_DEBUG_CPU_TYPE": "4"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"KMP_BLOCKTIME": "1"}),
        ({"KMP_BLOCKTIME": "infinite"}, {"KMP_BLOCKTIME": "infinite"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_sleep_soon_unless_the_user_has_said_how_they_wait(before, after):
    environ = dict(before)
    mkl.let_threads_sleep(environ)
    assert environ == after


def test_importing_the_package_lets_threads_sleep():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KMP_", "OMP_"))}
    code = "import aquila_pd, os; print(os.environ['KMP_BLOCKTIME'])"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "1\n"


def test_nothing_is_set_when_paddle_is_already_loaded(monkeypatch, tmp_path):
    fresh(monkeypatch, tmp_path, AMD, paddle_loaded=True)
    environ: dict[str, str] = {}
    assert "import aquila_pd before paddle" in mkl.prefer_fast_kernels(environ).reason
    assert environ == {}


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        (ZEN4, True),
        (ZEN4.replace("AuthenticAMD", "GenuineIntel"), True),
        (ZEN4.replace(" avx512vl", ""), False),
        (AMD, False),
        (INTEL, False),
        (ARM, False),
        ("", False),
    ],
)
def test_avx512_is_known_of_every_vendors_processors(monkeypatch, cpuinfo, found):
    monkeypatch.setattr(mkl, "first_block", lambda: cpuinfo)
    assert mkl.has_avx512.__wrapped__() is found


def test_only_the_first_processor_is_read_and_a_missing_file_is_no_error(tmp_path):
    many = tmp_path / "cpuinfo"
    many.write_text("\n".join([AMD] + [INTEL] * 200))
    assert mkl.first_block(many) == AMD.rstrip("\n")
    assert mkl.first_block(tmp_path / "none") == ""


# ------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("version", "spec", "meets"),
    [
        ("3.0.0b4", "==3.0.0b4", True),
        ("3.0.0b3", "==3.0.0b4", False),
        ("2.13.0+cpu", "==2.13.0", True),
        ("0.2.6", "<0.3", True),
        ("0.3.0", "<0.3", False),
        ("0.10", ">=0.9", True),
        ("22", ">=22", True),
        ("22.0.1", "<22", False),
        ("0.19.4", ">=0.19,<0.20", True),
        ("0.20.0", ">=0.19,<0.20", False),
        ("anything", "", True),
    ],
)
def test_a_spec_is_read_as_pip_reads_it(version, spec, meets):
    assert versions.satisfies(version, spec) is meets


def test_every_tested_version_meets_its_own_pin_and_breaks_nothing():
    for row in versions.PINS:
        assert versions.satisfies(row.tested, row.spec) or not row.spec, row
        assert row.why and len({one.name for one in versions.PINS}) == len(versions.PINS)
        if row.tested:
            assert not any(versions.satisfies(row.tested, spec) for spec, _ in row.breaks), row


def test_the_constraints_of_make_venv_hold_the_tested_versions():
    lines = (ROOT / "requirements" / "tested.txt").read_text().splitlines()
    held = dict(line.split("==") for line in lines if not line.startswith("#"))
    held = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in held.items()}
    wanted = {re.sub(r"[-_.]+", "-", row.name).lower(): row.tested for row in versions.PINS if row.tested}
    assert wanted == {name: held.get(name) for name in wanted}


def test_the_table_in_the_installation_guide_is_this_table():
    guide = (ROOT / "docs" / "INSTALL.md").read_text()
    for row in versions.PINS:
        if row.spec:
            assert f"| {row.name} | `{row.spec}` | {row.tested} | {row.extra or 'always'} | {row.why} |" in guide


def test_neither_paddle_is_a_hard_requirement_and_tests_bring_what_they_compare_with():
    always = " ".join(versions.requirements())
    assert "paddlenlp==3.0.0b4" in always
    assert "paddlepaddle" not in always and "torch" not in always
    assert versions.extras()["cpu"] == ["paddlepaddle==3.3.1"]
    assert {"torch==2.13.0", "transformers==4.55.4"} <= set(versions.extras()["test"])
    assert "conflict" not in versions.extras()


def test_setup_can_read_the_table_where_nothing_is_installed():
    alone = runpy.run_path(str(ROOT / "aquila_pd" / "runtime" / "versions.py"))
    assert alone["requirements"]() == versions.requirements()


def test_the_package_and_its_metadata_name_one_version():
    assert aquila_pd.__version__ == versions.VERSION


@pytest.mark.parametrize("missing", ["paddle", "paddlenlp"])
def test_a_missing_library_is_an_import_error_that_says_what_to_install(monkeypatch, missing):
    monkeypatch.setattr(versions, "_importable", lambda name: name != missing)
    with pytest.raises(InstallationError) as caught:
        versions.require_paddle()
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, AquilaError)
    assert caught.value.name == missing
    for words in ('pip install "aquila_pd[cpu]"', "paddlepaddle-gpu", "3.3.1", "aquila-pd doctor"):
        assert words in str(caught.value)
    assert "http" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- doctor

TESTED = {row.name: row.tested for row in versions.PINS if row.tested}


def verdicts(**changes: str | None) -> dict[str, doctor.PackageRow]:
    """doctor's rows for the tested installation with some versions changed (None: not installed)."""
    present = TESTED | {name.replace("_", "-"): version for name, version in changes.items()}
    return {row.package: row for row in doctor.judge_all(present.get)}


def test_the_tested_installation_is_sound():
    rows = verdicts()
    assert {row.verdict for row in rows.values()} <= {"ok", "untested"}  # untested: this Python, perhaps
    assert all(row.verdict == "ok" for name, row in rows.items() if name != "python")
    assert doctor.Examination(list(rows.values())).sound


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("aistudio-sdk", "0.3.7", "import paddlenlp"),
        ("pyarrow", "22.0.0", "NumPy 2"),
        ("protobuf", "7.34.0", "Trainer"),
        ("numpy", "2.3.1", "NumPy 2"),
        ("tokenizers", "0.22.1", "less than 0.22"),
        ("transformers", "5.1.0", "tokenizers"),
        ("paddlepaddle", "2.6.2", "Paddle 3"),
        ("paddlenlp", "2.8.1", "differ"),
    ],
)
def test_a_version_known_to_break_is_named_with_its_mend(name, version, reason):
    rows = verdicts(**{name: version})
    assert rows[name].verdict == "breaks"
    assert reason in rows[name].note
    assert rows[name].run == f'pip install "{name}=={TESTED[name]}"'
    report = doctor.render(doctor.Examination(list(rows.values())))
    assert report.splitlines()[-2:] == [
        "This installation will not work.",
        f"  missing or not working together: {name}",
    ]


def test_paddleformers_in_the_same_environment_breaks_and_its_absence_is_not_mentioned():
    assert verdicts(paddleformers="1.2.0")["paddleformers"].run == "pip uninstall paddleformers"
    assert "paddleformers" not in verdicts()


def test_another_version_that_nobody_tried_is_untested_and_not_a_failure():
    rows = verdicts(paddlepaddle="3.2.0", safetensors="0.9.0", torch="2.13.0+cpu")
    assert rows["paddlepaddle"].verdict == "untested"
    assert rows["safetensors"].verdict == "ok" and "another version was tested" in rows["safetensors"].note
    assert rows["torch"].verdict == "ok"
    found = doctor.Examination(list(rows.values()))
    assert found.sound and "paddlepaddle" in doctor.verdict(found)


def test_optional_parts_may_be_absent_and_required_ones_may_not():
    rows = verdicts(torch=None, gguf=None, pytest=None)
    assert rows["torch"].verdict == rows["gguf"].verdict == rows["pytest"].verdict == "absent"
    assert "verify" in rows["torch"].note and rows["torch"].run == 'pip install "torch==2.13.0"'
    assert doctor.Examination(list(rows.values())).sound
    assert verdicts(rich=None)["rich"].verdict == "missing"


def test_a_gpu_paddle_fills_the_place_of_the_cpu_one_and_both_together_break():
    alone = verdicts(paddlepaddle=None, paddlepaddle_gpu="3.3.1")
    assert "paddlepaddle" not in alone
    assert alone["paddlepaddle-gpu"].verdict == "untested" and "CPU" in alone["paddlepaddle-gpu"].note
    assert verdicts(paddlepaddle_gpu="3.3.1")["paddlepaddle + paddlepaddle-gpu"].verdict == "breaks"


def test_a_python_outside_the_range_breaks():
    assert doctor.judge_python("3.9.18").verdict == "breaks"
    assert doctor.judge_python("3.11.7").verdict == "ok"
    assert doctor.judge_python("3.12.1").verdict == "untested"


def test_doctor_works_without_any_paddle_and_ends_with_status_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: real_examine({}.get))
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert 'pip install "paddlepaddle==3.3.1" (or, for a GPU, install paddlepaddle-gpu' in printed
    assert "This installation will not work." in printed and "matrix kernels" in printed


real_examine = doctor.examine


def test_a_library_that_is_installed_but_does_not_load_is_a_problem(monkeypatch):
    def no_import(name: str) -> str:
        return "yes, 1.0 s" if name == "other" else "no: ImportError: cannot import name 'download'"

    monkeypatch.setattr(doctor, "try_import", no_import)
    found = real_examine(TESTED.get)
    assert not found.sound
    assert found.problems == [
        "paddle does not load: no: ImportError: cannot import name 'download'",
        "paddlenlp does not load: no: ImportError: cannot import name 'download'",
    ]


def test_an_import_that_raises_anything_is_reported_on_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_library_for_doctor.py").write_text("raise RuntimeError('first\\nsecond')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.try_import("broken_library_for_doctor") == "no: RuntimeError: first"
    assert doctor.try_import("json").startswith("yes")


# ------------------------------------------------------------------------------------- commands and the harness


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb} " in printed for verb in cli.VERBS)


def test_an_unknown_verb_is_refused_with_the_ones_there_are(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fly"])
    assert ended.value.code == 2
    assert "doctor" in capsys.readouterr().err


def test_a_verb_gets_its_own_arguments_and_its_status_is_returned(monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "main", lambda argv: seen.append(argv) or 7)
    assert cli.main(["doctor", "--json", "--help"]) == 7
    assert seen == [["--json", "--help"]]


def test_a_named_error_is_one_message_and_status_1(monkeypatch, capsys):
    def fail(argv):
        raise AquilaError("There is no such folder.")

    monkeypatch.setattr(doctor, "main", fail)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "There is no such folder.\n"


def test_the_tests_cannot_reach_another_machine():
    with pytest.raises(OSError, match="stay off the network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)  # an address reserved for documentation


def test_ci_runs_the_whole_suite():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().rstrip().endswith("\nexec make test PYTEST_ARGS=--durations=40")
