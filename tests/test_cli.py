"""The command line: its words, merging and planning, what it prints where, its exit codes, what it imports."""

from __future__ import annotations

import errno
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import runner, toy, write_models
from interpreter import HERE, run_code, run_python
from safetensors.numpy import load_file, save_file

import peta_fast.cli as cli
from peta_fast.cli import _errors, _progress
from peta_fast.cli._planning import shard_bytes
from peta_fast.errors import CheckpointError, CompatibilityError, PetaFastError, RecipeError, ResourceError
from peta_fast.plan import make_plan
from peta_fast.recipe import load_recipe


@pytest.fixture
def folder(tmp_path):
    return write_models(tmp_path)


@pytest.fixture
def run(capsys):
    return runner(capsys)


# Commands and their words


def test_help_lists_every_file_of_the_folder(run):
    code, out, err = run("--help")
    files = {p.stem for p in Path(cli.__file__).parent.glob("[!_]*.py")}
    assert {"merge", "plan", "inspect", "diff", "verify", "bench", "demo", "doctor", "schema"} <= files
    assert (code, err) == (0, "")
    commands = {name.replace("_", "-") for name in files}
    assert all(re.search(rf"^  {name} +\w", out, re.M) for name in commands)


def test_no_words_at_all_is_a_call_for_help(run):
    assert run()[:2] == run("--help")[:2]


@pytest.mark.parametrize("name", cli.commands([]))
def test_every_command_has_help(name, run):
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert f"usage: peta-fast {name}" in out and "--debug" in out


def test_the_help_of_merge_says_which_flags_are_ignored(run):
    out = run("merge", "--help")[1]
    assert re.search(r"taken and ignored:\n +--lazy-unpickle +\w", out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mrege"], "Did you mean 'merge'?"),
        (["xyzzy"], "expected a command (adapter, bench, "),
        (["--xyzzy"], "expected a command (adapter, bench, "),
        (["merge", "recipe.yml"], "the following arguments are required: OUT"),
        (["merge", "recipe.yml", "out", "more"], "expected no more words, got 'more'"),
        (["merge", "recipe.yml", "out", "--forse"], "has no option --forse\nDid you mean --force?"),
        (["merge", "recipe.yml", "out", "--forc"], "has no option --forc"),
        (["merge", "recipe.yml", "out", "--threads", "-1"], "expected an integer from 0 on, got '-1'"),
        (["merge", "recipe.yml", "out", "--threads", "two"], "expected an integer from 0 on, got 'two'"),
        (["diff", "a", "b", "--tolerance", "nan"], "expected a number from 0 on, got 'nan'"),
        (["inspect"], "the following arguments are required: PATH"),
        (["inspect", "a", "--", "b"], "nothing may stand after '--', got 'b'"),
    ],
)
def test_words_that_do_not_fit_are_refused(words, said, run):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("peta-fast: UsageError: ") and said in err


@pytest.fixture
def other_commands(tmp_path, monkeypatch):
    """A folder of commands beside the real one, with a group in it."""
    (tmp_path / "weights_of").mkdir()
    (tmp_path / "weights_of" / "__init__.py").write_text('"""What is done with adapters."""')
    (tmp_path / "weights_of" / "re_scale.py").write_text(
        "from typing import Annotated\n"
        "from peta_fast.cli._parser import Argument, Option\n"
        "def re_scale(by: Annotated[float, Argument('BY', 'factor')],\n"
        "             names: Annotated[list[str] | None, Option('--name', help='which')] = None,\n"
        "             loud: Annotated[bool, Option('--loud/--no-loud', '-l', help='louder')] = True) -> int:\n"
        "    '''Scale it.'''\n"
        "    print(by, names, loud)\n"
        "    return 7\n"
    )
    monkeypatch.setattr(cli, "FOLDER", str(tmp_path))
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    yield
    for name in [n for n in sys.modules if n.startswith("peta_fast.cli.weights_of")]:
        del sys.modules[name]


def test_a_file_is_a_command_and_a_folder_a_group(other_commands, run):
    assert re.search(r"^  weights-of  What is done with adapters\.$", run("--help")[1], re.M)
    assert re.search(r"^  re-scale  Scale it\.$", run("weights-of", "--help")[1], re.M)
    words = ("re-scale", "2", "--no-loud", "--name", "x", "--name=y")
    assert run("weights-of", *words) == (7, "2.0 ['x', 'y'] False\n", "")
    assert run("weights-of", "re-scale", "-l", "0.5") == (7, "0.5 None True\n", "")
    code, _, err = run("weights-of", "rescale")
    assert code == 2 and "Did you mean 're-scale'?" in err


def test_version_and_module_entry():
    done = run_python("-m", "peta_fast", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"peta-fast \d+\.\d+\.\d+\n", done.stdout)


# merge


def test_merge_writes_the_weighted_sum(folder, run):
    code, out, err = run("merge", folder / "linear.yml", folder / "out")
    assert code == 0
    assert out.startswith(f"merged 4 tensors into {folder / 'out'}: ")
    merged, a, b = (load_file(folder / name / "model.safetensors") for name in ("out", "a", "b"))
    assert merged.keys() == a.keys()
    for name in merged.keys() - {"ids"}:
        exact = 0.25 * a[name].astype(np.float64) + 0.75 * b[name].astype(np.float64)
        np.testing.assert_allclose(merged[name], exact, rtol=0, atol=2e-7 * np.abs(exact).max())
    np.testing.assert_array_equal(merged["ids"], a["ids"])
    assert json.loads((folder / "out" / "config.json").read_text()) == {"architectures": ["Toy"]}


def test_json_of_merge_is_all_there_is_on_stdout(folder, run):
    code, out, err = run("merge", folder / "ties.yml", folder / "out", "--json")
    report = json.loads(out)
    assert code == 0 and report["out"] == str(folder / "out") and report["tensors"] == 4
    assert re.match(r"\w+: .+ of .+ \(\d+%\)", err.splitlines()[-1])


def test_quiet_leaves_stderr_empty(folder, run):
    code, out, err = run("merge", folder / "ties.yml", folder / "out", "-q")
    assert (code, err) == (0, "") and out.startswith("merged ")


def test_a_command_line_of_mergekit_runs_unchanged(folder, run):
    flags = (
        "-vv --lazy-unpickle --no-low-cpu-memory --copy-tokenizer --no-write-model-card --allow-crimes --no-cuda "
        "--trust-remote-code --async-write --write-threads 2 --lora-merge-cache x --num-threads 2 --random-seed 3 "
        "--out-shard-size 1K --clone-tensors --safe-serialization --no-multi-gpu --device cpu --quiet --verbose"
    )
    code, _, err = run("merge", folder / "ties.yml", *flags.split(), folder / "out")
    assert (code, err) == (0, "")
    assert len(list((folder / "out").glob("model-*-of-00003.safetensors"))) == 3


@pytest.mark.parametrize("flag", [["--device", "cuda"], ["--device=cuda:1"], ["--cuda"], ["--gpu-rich"]])
def test_a_gpu_wants_the_cuda_library(flag, folder, run, monkeypatch):
    from peta_fast import _cuda

    monkeypatch.setenv("PETA_FAST_CUDA_LIBRARY", "")
    _cuda.library.cache_clear()
    code, out, err = run("merge", folder / "ties.yml", folder / "gpu-out", *flag)
    _cuda.library.cache_clear()
    assert (code, out) == (5, "") and "it is not built" in err and "build-cuda" in err


@pytest.mark.parametrize("device", ["mps", "cuda:", "cuda:x", ""])
def test_a_device_that_is_none_is_refused(device, folder, run):
    code, out, err = run("merge", folder / "ties.yml", folder / "gpu-out", f"--device={device}")
    assert (code, out) == (2, "") and "expected cpu, cuda or cuda:N" in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1GiB", 2**30), ("1000", 1000), ("5B", 5 * 10**9), ("2M", 2 * 10**6)],
)
def test_shard_sizes(text, size):
    assert shard_bytes(text) == size


@pytest.mark.parametrize("option", ["--max-memory", "--max-shard-size"])
def test_a_size_that_is_none_is_a_fault_of_usage(option, folder, run):
    code, _, err = run("merge", folder / "ties.yml", folder / "out", option, "plenty")
    assert code == 2 and option in err and "'plenty'" in err


def test_a_seed_on_the_command_line_goes_before_the_recipes(folder, run):
    text = (folder / "dare.yml").read_text()
    (folder / "seven.yml").write_text(f"{text}seed: 7\n")
    run("merge", folder / "dare.yml", folder / "by_recipe")
    run("merge", folder / "seven.yml", folder / "recipe_seven")
    run("merge", folder / "dare.yml", folder / "option_seven", "--seed", "7")
    name = "layers.0.weight"
    merged = ("by_recipe", "recipe_seven", "option_seven")
    by_recipe, recipe_seven, option_seven = (load_file(folder / m / "model.safetensors")[name] for m in merged)
    np.testing.assert_array_equal(option_seven, recipe_seven)
    assert (option_seven != by_recipe).any()
    assert "# run with --seed 7" in (folder / "option_seven" / "README.md").read_text()


def test_compat_on_the_command_line_goes_before_the_recipes(folder, run):
    code, out, _ = run("plan", folder / "ties.yml", "--compat", "native", "--json")
    assert code == 0 and json.loads(out)["compat"] == "native"
    assert json.loads(run("plan", folder / "ties.yml", "--json")[1])["compat"] == "mergekit"
    assert run("plan", folder / "ties.yml", "--compat", "mergekti")[0] == 2


def test_a_merge_of_tensors_imports_no_more_than_it_needs(folder):
    found = run_code(
        "import sys\n"
        "from peta_fast.cli import main\n"
        f"assert main(['merge', {str(folder / 'ties.yml')!r}, {str(folder / 'out')!r}]) == 0\n"
        "print(sorted(m for m in ('torch', 'pydantic', 'transformers', 'typer', 'click', 'rich') if m in sys.modules))"
    )
    assert found.stdout.splitlines()[-1] == "[]", found.stderr


def test_a_process_keeps_idle_threads_of_numpy_from_spinning_and_ends_with_the_commands_code():
    found = run_code(
        "import os, sys\n"
        "import peta_fast.cli as cli\n"
        "cli.main = lambda: print('numpy' in sys.modules, os.environ['OPENBLAS_THREAD_TIMEOUT']) or 3\n"
        "from peta_fast.__main__ import run\n"
        "run()"
    )
    assert (found.stdout.split(), found.returncode) == (["False", "4"], 3), found.stderr


# plan


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder, run):
    dry = run("merge", folder / "ties.yml", folder / "out", "--dry-run")
    assert dry == run("plan", folder / "ties.yml") and dry[0] == 0
    assert not (folder / "out").exists()


def test_json_of_plan_is_the_plan(folder, run):
    code, out, err = run("plan", folder / "ties.yml", "--json", "--max-shard-size", "600")
    expected = make_plan(load_recipe(folder / "ties.yml"), max_shard_size=600).to_json()
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(expected))
    assert len(expected["shards"]) > 1


def test_the_table_of_a_plan_says_what_happens_to_every_tensor(folder, run):
    lines = run("plan", folder / "ties.yml")[1].splitlines()
    assert lines[0].split() == ["action", "tensor", "dtype", "shape", "parameters", "sources"]
    assert re.match(r"copy +ids +int64 +\[4\] +\(not floating point\)", lines[1])
    sources = f"{folder}/base <- {folder}/a {folder}/b"
    assert re.match(rf"merge +layers\.0\.weight +float32 +\[16, 8\] .*weight=\[1,0\.5\].* {sources}$", lines[2])
    assert any(re.match(r"tensors +1 copy, 3 merge; 1 file$", line) for line in lines)
    assert all(any(line.startswith(word) for line in lines) for word in ("reads", "writes", "memory", "disk", "time"))


def test_a_long_table_is_cut_and_says_so(folder, run):
    cut = run("plan", folder / "ties.yml", "--limit", "1")[1]
    assert "\n... 3 more; --all or --json shows them\n" in cut and "layers.0" not in cut
    assert "more; --all" not in run("plan", folder / "ties.yml", "--limit", "1", "--all")[1]


# Errors and exit codes


def test_a_recipe_error_is_2(folder, run):
    (folder / "ties.yml").write_text("merge_method: tise\nmodels: [{model: a}]\n")
    code, out, err = run("merge", folder / "ties.yml", folder / "out")
    assert (code, out) == (2, "")
    assert err.startswith("peta-fast: RecipeError: ") and "Traceback" not in err


def test_a_missing_recipe_is_2(folder, run):
    assert run("merge", folder / "none.yml", folder / "out")[0] == 2


def test_a_recipes_name_is_never_taken_for_its_text(folder, run):
    assert run("plan", "merge_method: linear")[0] == 2


def test_a_checkpoint_error_is_3(folder, run):
    (folder / "a" / "model.safetensors").write_bytes(b"\0" * 50)
    code, out, err = run("merge", folder / "ties.yml", folder / "out")
    assert (code, out) == (3, "") and err.startswith("peta-fast: CheckpointError: ")


def test_a_compatibility_error_is_4_and_ends_in_a_next_step(folder, run):
    save_file({**toy(1), "layers.0.weight": np.zeros((3, 3), np.float32)}, folder / "a" / "model.safetensors")
    code, out, err = run("merge", folder / "ties.yml", folder / "out")
    assert (code, out) == (4, "") and err.startswith("peta-fast: CompatibilityError: ")
    assert "'layers.0.weight'" in err and err.splitlines()[-1].startswith("Run `peta-fast ")


def test_a_resource_error_is_5(folder, run):
    run("merge", folder / "ties.yml", folder / "out")
    code, out, err = run("merge", folder / "ties.yml", folder / "out")
    assert (code, out) == (5, "") and err.startswith("peta-fast: ResourceError: ")
    assert run("merge", folder / "ties.yml", folder / "out", "--force")[0] == 0


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RecipeError("key", "is wrong", "Mend it."), 2, "peta-fast: RecipeError: key: is wrong\nMend it.\n"),
        (CheckpointError("file", "is cut off"), 3, "peta-fast: CheckpointError: file: is cut off\n"),
        (CompatibilityError("a", "lacks b"), 4, "peta-fast: CompatibilityError: a: lacks b\n"),
        (ResourceError("out", "is full"), 5, "peta-fast: ResourceError: out: is full\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x"),
            5,
            "peta-fast: OSError: x: No space left on device\n",
        ),
        (MemoryError(), 5, "peta-fast: MemoryError: not enough memory."),
        (KeyboardInterrupt(), 130, "peta-fast: interrupted.\n"),
        (BrokenPipeError(), 141, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_one_message_and_a_code(error, code, said, capsys):
    def fail():
        raise error

    found = _errors.guarded(fail, [], debug=False)
    err = capsys.readouterr().err
    assert found == code and err.startswith(said) and "Traceback" not in err
    if isinstance(error, PetaFastError):
        assert err == said


def test_a_defect_is_70_with_a_traceback(capsys):
    assert _errors.guarded(lambda: {}["gone"], [], debug=False) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err and "KeyError: 'gone'" in err and err.count("Traceback") == 1


def test_debug_shows_the_traceback(folder, run, monkeypatch):
    words = ("merge", folder / "none.yml", folder / "out")
    assert "Traceback" not in run(*words)[2]
    assert "Traceback" in run("--debug", *words)[2] and "Traceback" in run(*words, "--debug")[2]
    monkeypatch.setenv("PETA_FAST_DEBUG", "1")
    code, _, err = run(*words)
    assert code == 2 and "Traceback" in err


def test_an_interrupted_merge_names_the_command_that_continues_it(folder, run, monkeypatch):
    run("merge", folder / "ties.yml", folder / "whole")
    words = ["merge", folder / "ties.yml", folder / "a folder", "--force"]

    def interrupt(display, state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(_progress.Lines, "tell", interrupt)
        code, out, err = run(*words)
    assert (code, out) == (130, "") and not (folder / "a folder" / "model.safetensors").exists()
    command = shlex.split(err.splitlines()[-1])
    assert command == ["peta-fast", "merge", str(folder / "ties.yml"), str(folder / "a folder"), "--resume"]
    assert run(*command[1:])[0] == 0
    assert run("diff", folder / "a folder", folder / "whole")[0] == 0


def test_interrupted_before_anything_was_written_there_is_nothing_to_continue(folder, run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("peta_fast.run.run", interrupt)
    code, _, err = run("merge", folder / "ties.yml", folder / "out")
    assert (code, err) == (130, "peta-fast: interrupted.\n")


def test_a_closed_pipe_ends_the_program_quietly():
    with subprocess.Popen(
        [sys.executable, "-m", "peta_fast", "schema"], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        program.stdout.close()
        err = program.stderr.read()
    assert (program.returncode, err) == (141, b"")
