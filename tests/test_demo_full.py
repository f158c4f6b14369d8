"""The full demonstration in its rehearsal: every kind, merge and track runs; what is written follows from stages."""

from __future__ import annotations

import io
import json
import os
import signal
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from peta_fast.cli import main
from peta_fast.demo.full import chain as chains
from peta_fast.demo.full import kinds, pool, run, sentences, text, tracks
from peta_fast.demo.full.chain import Chain
from peta_fast.demo.full.claims import Claim, judged
from peta_fast.demo.full.merges import LEFT_OUT, METHODS, Chosen
from peta_fast.demo.full.results import TrackResult
from peta_fast.demo.full.settings import DIGITS, FULL, TEXT, TINY
from peta_fast.demo.full.stages import Stage, fingerprint, published
from peta_fast.demo.train import reproducible
from peta_fast.errors import PetaFastError, ResourceError
from peta_fast.ops.gram import unpack

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

NAMES = [DIGITS] if text.missing() else [DIGITS, TEXT]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The rehearsal by two processes: its folder, what run_full returned, what it printed."""
    out, printed = tmp_path_factory.mktemp("full") / "out", io.StringIO()
    found = run.run_full(out, seed=1, quick=True, jobs=2, console=Console(file=printed, width=100))
    return out, {track.name: track for track in found}, printed.getvalue()


@pytest.fixture(scope="module")
def digits():
    """The tiny digits track, its base untrained."""
    return tracks.track_of(DIGITS, TINY.tracks[DIGITS], 0)


def chain(out, kind: str, track: str = DIGITS) -> Chain:
    return Chain(out, TINY, 1, track, kind, lambda *stage: None)


def trained(kind: str, track, task: str) -> dict[str, torch.Tensor]:
    model = kinds.trainable(kind, track, 0)
    tracks.train(model, track, task, epochs=1, learning_rate=1e-2, seed=0)
    return kinds.trained_state(kind, model)


# --- sentences


@pytest.fixture
def library(tmp_path):
    (tmp_path / "single.py").write_text(
        '"""Reads the lines of a file one by one. It is the only reader here that counts.\n\n>>> examples(1, 2) are '
        'left out of it all\n"""\nraise SystemExit("imported")\n'
    )
    (tmp_path / "folder" / "tests").mkdir(parents=True)
    (tmp_path / "folder" / "a.py").write_text('class A:\n    """Writes what the single module has read to a disk."""\n')
    (tmp_path / "folder" / "b.py").write_text('def f():\n    """Reads the lines of a file one by one."""\n')
    (tmp_path / "folder" / "tests" / "c.py").write_text('"""Nobody should ever read this sentence here."""\n')
    return tmp_path


def test_documentation_is_parsed_file_by_file_without_tests_and_without_imports(library):
    assert list(sentences.documentation("folder", library)) == [
        "", "Writes what the single module has read to a disk.", "", "Reads the lines of a file one by one.",
    ]  # fmt: skip


def test_sentences_are_prose_of_five_to_sixteen_words(library):
    (found,) = (list(sentences.sentences(t)) for t in sentences.documentation("single", library))
    assert found == ["Reads the lines of a file one by one.", "It is the only reader here that counts."]
    assert list(sentences.sentences("Too short. " + "word " * 17 + "ends here.")) == []


def test_what_names_a_package_or_stands_in_two_is_left_out(library, monkeypatch):
    monkeypatch.setitem(sentences.TASKS, "made", ("single", "folder"))
    assert sentences.collected("made", library) == [["It is the only reader here that counts."], []]


def test_a_package_without_source_is_named(library):
    with pytest.raises(PetaFastError, match="source of the package 'absent'"):
        list(sentences.documentation("absent", library))


@pytest.mark.parametrize("task", list(sentences.TASKS))
def test_splits_share_no_sentence_and_hold_every_label_of_this_python(task):
    most = {"train": 60, "validation": 16, "test": 32}
    parts = sentences.split(task, 0, most)
    keys = {name: {sentences.plain(s.text) for s in part} for name, part in parts.items()}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]
    for name, part in parts.items():
        held = np.bincount([s.label for s in part], minlength=4)
        assert (held > 0).all() and (held <= most[name]).all()
        assert not any(package in s.text.lower() for s in part for package in sentences.TASKS[task])
    assert sentences.split(task, 0, most) == parts != sentences.split(task, 1, most)


def test_label_sets_share_no_package():
    packages = [p for task in sentences.TASKS.values() for p in task]
    assert len(set(packages)) == len(packages)


# --- stages


def test_a_stage_is_there_when_it_is_whole(tmp_path):
    stage = Stage(tmp_path / "folder" / "x")
    with pytest.raises(KeyboardInterrupt), published(stage.numbers_file) as partial:
        partial.write_text("{")
        raise KeyboardInterrupt
    assert not stage.done() and list((tmp_path / "folder").iterdir()) == []
    stage.write({"a": 1.5}, {"w": torch.tensor([[1.0, 2.0]]).T})
    assert stage.done() and stage.numbers() == {"a": 1.5} and stage.tensors()["w"].tolist() == [[1.0], [2.0]]


def test_a_stage_s_name_depends_on_what_it_depends_on(tmp_path):
    assert fingerprint(1, "a") != fingerprint(1, "b")
    settings = TINY.tracks[DIGITS]

    def marks(**changed) -> list[str]:
        regime = replace(TINY, tracks={DIGITS: replace(settings, **changed)})
        made = Chain(tmp_path, regime, 0, DIGITS, "lora", print)
        first = [made.finetune_stage("rotated"), made.merge_stage("ties"), made.merge_stage("regmean")]
        return [stage.mark for stage in first]

    before = marks()
    assert [a == b for a, b in zip(marks(scalings=(0.1,)), before, strict=True)] == [True, False, True]
    assert [a == b for a, b in zip(marks(statistics=9), before, strict=True)] == [True, True, False]
    assert not any(a == b for a, b in zip(marks(rank=2), before, strict=True))
    assert not any(a == b for a, b in zip(marks(base_epochs=1), before, strict=True))


# --- tracks


@pytest.mark.skipif(bool(text.missing()), reason="pip install 'peta_fast[demo-full]'")
def test_upper_layers_on_lower_states_are_the_bert_itself():
    """On two sentences, one of them padded, against what the whole BERT gives."""
    bert, texts = text.pretrained(), ["Return the header.", "Send a request to the server and wait until it answers."]
    lower = text.lower_states(bert, 3, texts)
    kept = lower["attention_mask"].bool()
    assert not kept.all()
    with torch.no_grad():
        upper = text.SentenceEncoder(torch.nn.ModuleList(bert.encoder.layer[3:])).eval()
        exact = bert(**text.tokenized(texts)).last_hidden_state
        torch.testing.assert_close(upper.states(**lower)[kept], exact[kept], rtol=1e-4, atol=1e-5)
        features = torch.stack([row[mask].mean(0) for row, mask in zip(exact, kept, strict=True)])
        expected = text.SHARPNESS * features / features.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(upper(**lower), expected, rtol=1e-4, atol=1e-4)


# --- kinds


def test_attention_trains_projections_alone_and_nobody_else_moves(digits):
    state = trained("attention", digits, "rotated")
    assert {name.split(".")[-2] for name in state} == {"query", "key", "value", "dense"} and len(state) == 12
    base = digits.base.state_dict()
    assert all(not torch.equal(tensor, base[name]) for name, tensor in state.items())


@pytest.mark.parametrize("kind", ["lora", "linear_layer"])
def test_the_plain_network_with_an_adapter_s_changes_gives_its_answers(kind, digits):
    model, batch = kinds.trainable(kind, digits, 0), digits.batches("mirrored", "test", 20)[0]
    tracks.train(model, digits, "mirrored", epochs=1, learning_rate=1e-2, seed=0)
    space = kinds.space_of(kind, digits, 0)
    space.put(kinds.trained_state(kind, model))
    plain = kinds.with_changes(space) if kind == "linear_layer" else space.model
    with torch.no_grad():
        expected, before = (m(batch["pixels"]) for m in (model, digits.base))
        torch.testing.assert_close(plain(batch["pixels"]), expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2


def test_a_tangent_model_scores_its_whole_grid_in_one_pass(digits):
    step = trained("linear_model", digits, "inverted")
    space = kinds.space_of("linear_model", digits, 0)
    found = digits.accuracies_along(space.put(step), "inverted", "test", (0.0, 0.5, 3.0))
    for scaling, accuracy in found.items():
        model = space.put({name: scaling * tensor for name, tensor in step.items()})
        assert digits.accuracy(model, "inverted", "test") == pytest.approx(accuracy, abs=1 / 40)
    assert found[0.0] == digits.accuracy(digits.base, "inverted", "test")


def test_the_fisher_of_a_tangent_model_is_that_of_its_linear_logits(digits):
    """d logits / d step is what one entry's unit step adds, so (dL/dw)^2 follows without a gradient."""
    task, name = "inverted", "model.layers.2.fc2.delta_B"
    space, state = kinds.space_of("linear_model", digits, 0), trained("linear_model", digits, "inverted")
    found = kinds.statistics_of(space, state, task)[name.replace(".delta_B", ".weight.fisher")]
    batch = digits.batches(task, "train", 1000, most=digits.settings.statistics)[0]

    def logits(step) -> torch.Tensor:
        with torch.no_grad():
            return space.put({**state, name: step})(batch["pixels"]).double()

    at = logits(state[name])
    error = at.softmax(-1) - torch.nn.functional.one_hot(batch["labels"], 10)
    for place in ((0, 0), (17, 3), (63, 7)):
        moved = state[name].clone()
        moved[place] += 1.0
        exact = (error * (logits(moved) - at)).sum(-1).square().mean().item()
        assert found[place].item() == pytest.approx(exact, rel=2e-2, abs=1e-4 * found.max().item())


# --- merges


def test_regmean_of_steps_solves_for_the_inputs_that_the_steps_see(digits):
    """dB (sum_t Z_t^T Z_t) = sum_t dB_t Z_t^T Z_t with rows z = A0 x, off-diagonals times 0.9, in fp64."""
    tasks, layer = ("rotated", "inverted"), "layers.1.fc1"
    space = kinds.space_of("linear_layer", digits, 0)
    states = [trained("linear_layer", digits, task) for task in tasks]
    known = [kinds.statistics_of(space, state, task) for state, task in zip(states, tasks, strict=True)]
    merged = Chosen(space, tasks, states, 0).merged("regmean", None, known)
    left, right = 0.0, 0.0
    for task, state in zip(tasks, states, strict=True):
        rows = []
        model, module = space.put(state), space.model.get_submodule(layer)
        handle = module.register_forward_hook(lambda m, x, y, rows=rows: rows.append(x[0].reshape(-1, x[0].shape[-1])))
        batch = digits.batches(task, "train", 1000, most=digits.settings.statistics)[0]
        with torch.no_grad():
            model(batch["pixels"])
        handle.remove()
        z = rows[0].double() @ module.A0.T.double()
        gram = 0.9 * z.T @ z + 0.1 * (z.T @ z).diagonal().diag()
        left, right = left + gram, right + state[f"{layer}.delta_B"].double() @ gram
    exact = torch.linalg.solve(left, right.T).T
    torch.testing.assert_close(merged[f"{layer}.delta_B"].double(), exact, rtol=1e-3, atol=1e-4 * exact.abs().max())
    assert unpack(known[0][f"{layer}.input_gram"]).shape == (8, 8)


def test_element_wise_merges_are_those_of_the_papers(digits):
    tasks = ("rotated", "inverted", "mirrored")
    space = kinds.space_of("attention", digits, 0)
    states = [trained("attention", digits, task) for task in tasks]
    chosen, name = Chosen(space, tasks, states, 0), "layers.0.attention.value.weight"
    base, tuned = space.origin[name].double(), [s[name].double() for s in states]
    found = {m: chosen.merged(m, v)[name].double() for m, v in (("average", None), ("task_arithmetic", 0.3))}
    torch.testing.assert_close(found["average"], sum(tuned) / 3, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["task_arithmetic"], base + 0.3 * (sum(tuned) - 3 * base), rtol=0, atol=1e-6)
    dropped = ((chosen.merged("dare", 1.0)[name] - space.origin[name]).abs() > 1e-7).double().mean()
    assert dropped == pytest.approx(1 - 0.8**3, abs=0.05)


# --- the whole


def test_every_kind_and_method_is_there_or_left_out_by_name(rehearsal):
    out, found, _ = rehearsal
    assert list(found) == NAMES
    text_of = (out / "results.md").read_text(encoding="utf-8")
    for track in found.values():
        assert list(track.merges) == list(kinds.KINDS)
        for kind, methods in track.merges.items():
            assert list(methods) == [m for m in METHODS if (m, kind) not in LEFT_OUT]
    for why in LEFT_OUT.values():
        assert why in text_of


def test_pairs_and_all_tasks_are_merged(rehearsal):
    for name, track in rehearsal[1].items():
        count = len(track.tasks)
        assert count == {DIGITS: 4, TEXT: 3}[name]
        for methods in track.merges.values():
            for ((*subsets,),) in methods.values():
                merged = [tuple(row["tasks"]) for row in subsets]
                assert len(set(merged)) == len(merged) == count * (count - 1) // 2 + 1 and track.tasks in merged
                assert all(set(row["test"]) == set(track.tasks) for row in subsets)


def test_the_tables_follow_from_the_accuracies(rehearsal):
    out, _, _ = rehearsal
    document = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for name in NAMES:
        track, summary = document["tracks"][name], document["summary"][name]
        for kind, methods in track["merges"].items():
            own = {task: numbers["test"][task] for task, numbers in track["finetunes"][kind][0].items()}
            for method, (rows,) in methods.items():
                every, pairs = rows[-1], [row for row in rows if len(row["tasks"]) == 2]
                normalized = statistics.fmean(every["test"][t] / own[t] for t in own)
                both = statistics.fmean(statistics.fmean(r["test"][t] / own[t] for t in r["tasks"]) for r in pairs)
                absolute = statistics.fmean(r["test"][t] for r in pairs for t in r["tasks"])
                assert summary["all"][kind][method] == pytest.approx([normalized, 0])
                assert summary["all_absolute"][kind][method][0] == pytest.approx(
                    statistics.fmean(every["test"].values())
                )
                assert summary["pairs"][kind][method][0] == pytest.approx(both)
                assert summary["pairs_absolute"][kind][method][0] == pytest.approx(absolute)


def test_validation_picks_and_the_stored_fine_tunes_score_what_is_told(rehearsal):
    out, found, _ = rehearsal
    for row in found[DIGITS].merges["full"]["task_arithmetic"][0]:
        assert row["candidates"][str(row["chosen"])] == max(row["candidates"].values()) == row["validation"]
    made = chain(out, "attention")
    stage = made.finetune_stage("inverted")
    with reproducible():
        model = made.space.put({**made.space.origin, **stage.tensors()})
        assert made.track.accuracy(model, "inverted", "test") == stage.numbers()["test"]["inverted"]


def test_pictures_are_drawn_and_statistics_are_gone(rehearsal):
    from matplotlib.image import imread

    out, _, _ = rehearsal
    for name in run.figures.FIGURES:
        pixels = imread(out / f"{name}.png")[..., :3]
        assert pixels.shape[1] > 1000 and len(np.unique((pixels[::4, ::4] * 255).reshape(-1, 3), axis=0)) > 20
    assert list(out.rglob("statistics-*")) == [] and list(out.rglob("*.partial*")) == []


def test_progress_says_what_is_left(rehearsal):
    lines = [line for line in rehearsal[2].splitlines() if line.startswith("[")]
    total = int(lines[0].partition("/")[2].partition("]")[0])
    assert len(lines) == total and lines[-1].startswith(f"[{total}/{total}]") and "about 0 min left" in lines[-1]


def test_a_second_run_finds_everything_and_says_the_same(rehearsal):
    out, found, _ = rehearsal
    before, printed = {f: f.stat().st_mtime_ns for f in out.rglob("*") if "stages" in f.parts}, io.StringIO()
    again = run.run_full(out, seed=1, quick=True, jobs=1, console=Console(file=printed, width=100))
    assert {t.name: t for t in again} == found
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert all("was there" in line for line in printed.getvalue().splitlines() if line.startswith("["))


def test_a_killed_process_loses_its_stage_and_the_next_ends_with_the_same_numbers(rehearsal, tmp_path):
    """Killed after its sixth stage, on one process; finished on this one."""
    out, found, _ = rehearsal
    made = chain(tmp_path, "attention")
    made.base_stage.path.parent.mkdir(parents=True)
    (tmp_path / made.base_stage.tensors_file.relative_to(tmp_path)).write_bytes(
        chain(out, "attention").base_stage.tensors_file.read_bytes()
    )
    worker = pool.start(tmp_path, TINY)
    worker.stdin.write(json.dumps({"seed": 1, "track": DIGITS, "kind": "attention"}) + "\n")
    worker.stdin.flush()
    told = [json.loads(worker.stdout.readline())["stage"] for _ in range(6)]
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    done = sum(s.done() for s in [*made.stages(), *map(made.statistics_stage, made.tasks)])
    assert told[:4] == [f"finetune {task}" for task in made.tasks] and 6 <= done <= 8
    lines = []
    made.tell = lambda name, seconds, outcome: lines.append((name, seconds))
    with reproducible():
        made.run()
    assert [seconds == 0 for _, seconds in lines[:6]] == [True] * 6 and any(seconds for _, seconds in lines)
    for method, (rows,) in found[DIGITS].merges["attention"].items():
        assert made.merge_stage(method).numbers()["subsets"] == rows


def test_an_error_in_a_process_is_told(tmp_path, monkeypatch):
    unit = pool.Unit(0, "no such track", "full")
    with pytest.raises(PetaFastError, match="no such track, full, seed 0: failed\n(?s:.*)KeyError") as told:
        pool.run_units(tmp_path, TINY, [unit, unit], 2, lambda *stage: None)
    assert "Traceback" in str(told.value)


def test_a_process_imports_the_package_that_started_it(tmp_path, monkeypatch):
    (tmp_path / "peta_fast").mkdir()
    (tmp_path / "peta_fast" / "__init__.py").write_text("raise SystemExit('sources of another version')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PetaFastError, match="no such track, full, seed 0: failed"):
        pool.run_units(tmp_path, TINY, [pool.Unit(0, "no such track", "full")] * 2, 2, lambda *stage: None)


def test_a_missing_bert_leaves_the_text_track_out_by_name(monkeypatch):
    monkeypatch.setattr(text, "PACKAGES", ("transformers", "no_such_package"))
    assert "no_such_package: pip install 'peta_fast[demo-full]'" in run.missing_tracks()[TEXT]
    with pytest.raises(PetaFastError, match="pip install"):
        text.pretrained()


def test_missing_sources_leave_the_text_track_out_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "PACKAGES", ())
    monkeypatch.setattr(sentences, "library", lambda: tmp_path)
    assert "source of the package 'email'" in run.missing_tracks()[TEXT]


def test_a_folder_with_other_things_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ResourceError, match="thesis.tex"):
        run.run_full(tmp_path, quick=True)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_command_passes_its_options_on(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("peta_fast.demo.full.run_full", lambda out, **options: asked.append((str(out), options)))
    assert main(["demo", "--full", "--quick", "--seed", "4", "--jobs", "3", "--out", "x"]) == 0
    assert main(["demo", "--full"]) == 0
    assert asked == [
        ("x", {"seed": 4, "quick": True, "jobs": 3}), ("peta_fast_demo_full", {"seed": 0, "quick": False, "jobs": None})
    ]  # fmt: skip
    assert main(["demo", "--jobs", "2"]) == 2
    assert "--full" in capsys.readouterr().err


def test_the_real_run_has_three_seeds_and_every_kind_in_both_tracks():
    assert FULL.seeds == 3
    for settings in FULL.tracks.values():
        assert list(settings.training) == list(kinds.KINDS)
    assert chains.tasks_of(TEXT) == tuple(sentences.TASKS)


# --- results, by hand


def result(own: list[dict], rows: list[list[dict]]) -> TrackResult:
    """Two tasks a, b; one kind, "full"; a seed each entry."""
    finetunes = [{task: {"test": scores} for task, scores in seed.items()} for seed in own]
    return TrackResult("made", ("a", "b"), [], {"full": finetunes}, {"full": {"ties": rows}}, {}, 0.0)


def test_scores_by_hand():
    own = [{"a": {"a": 0.8, "b": 0.2}, "b": {"a": 0.1, "b": 0.5}}]
    made = replace(result(own, [[{"tasks": ["a", "b"], "test": {"a": 0.4, "b": 0.5}}]]), base=[{}])
    assert made.normalized("full", "ties") == [pytest.approx((0.4 / 0.8 + 0.5 / 0.5) / 2)]
    assert made.pairs("full", "ties") == [pytest.approx(0.75)]
    assert made.absolute("full", "ties") == [pytest.approx(0.45)]
    assert made.by_number("full", "ties", 1) == [pytest.approx(((1 + 0.2 / 0.5) / 2 + (0.1 / 0.8 + 1) / 2) / 2)]


@pytest.mark.parametrize(
    ("better", "holds", "word"),
    [([0.9, 0.8], True, "holds"), ([0.6, 0.5], False, "does not"), ([0.9, 0.5], None, "unclear")],
)
def test_a_claim_is_judged_seed_by_seed(better, holds, word):
    found = judged(Claim("", "", lambda track: better, lambda track: [0.7, 0.7]), result([], []))
    assert (found.holds, found.word) == (holds, word)
    assert found.difference == pytest.approx(statistics.fmean(better) - 0.7)
    assert found.spread == pytest.approx(statistics.stdev([b - 0.7 for b in better]))
