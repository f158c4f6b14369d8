"""The verb that merges by one recipe at many points of a grid: in memory, one by one, or to checkpoints.

    for variant in sweep("ties.yml", grid={"weight": [0.2, 0.4], "density": [0.1, 0.2]}):
        print(variant.parameters, evaluate(variant.state))

Points that follow each other share a reading of the inputs: thresholds of all densities are found in one pass, task
vectors formed once in the cache, and each variant has the bits of its own merge.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peta_fast._grid import OTHER_KEYS, Axis, Grid, axes_of
from peta_fast._run_variants import Outcome, run_all
from peta_fast._sweep_results import Point, Results, SweepJournal, best_of, scores_of
from peta_fast._variant_memory import Variant, VariantMemory
from peta_fast.errors import RecipeError
from peta_fast.merging import MemorySource, parse_bytes, spelled_out
from peta_fast.plan import make_plan
from peta_fast.recipe import ModelRef, Recipe, document_of, load_recipe
from peta_fast.run import Progress, Report, run

MANY = 1000
"""Points that are not taken on without being told to."""


def sweep(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    grid: Mapping[str, Any] | Sequence[str],
    into: Any = None,
    method: str | None = None,
    base: Any = None,
    models: Sequence[Any] | None = None,
    compat: str | None = None,
    max_memory: str | int = "4GB",
    threads: int = 0,
    allow_nonfinite: bool = False,
    **parameters: Any,
) -> Sweep:
    """A recipe at every point of a grid. Iterate over it for the variants in memory, or call `evaluate` or `write`.

        sweep("ties.yml", grid=["weight=0.1:1.0:0.1", "density=0.1,0.2,0.5"])
        sweep(method="ties", base=state, models=[one, other], density=0.2, grid={"weight.0": [0, 0.5, 1]}, into=model)

    recipe      as `merge` takes it; or by keywords: method, base, models and parameters as in `merge` and
                `merge_state_dicts`, where base and models are folders or state dicts
    grid        key -> values, or texts such as "weight=0.1:1.0:0.1". A key of the method, seed or trim_scope; the key
                of one model is weight.NAME or weight.0. It takes the place of what the recipe says
    into        a model (anything with state_dict) or a dict of tensors that takes each variant in place. Each is made
                from the inputs anew, whatever the last one left there. Where base or models are the same memory, they
                are copied first, and what was there is put back at the end; else the last variant stays
    max_memory  of variants held at once, at least one is

    Raises RecipeError with all faults of recipe and grid.
    """
    if recipe is None and method is not None:
        sources, loaded, axes = _from_keywords(method, base, models or (), compat, parameters, grid)
    elif recipe is None or parameters or not method is base is models is None:
        raise RecipeError("sweep", "expected a recipe, or method, base, models and parameters")
    else:
        sources, axes = None, axes_of(grid)
        loaded = load_swept(recipe, axes, compat)
    return Sweep(
        loaded,
        Grid(loaded, axes),
        sources=sources,
        into=into,
        max_memory=parse_bytes(max_memory, "max_memory"),
        threads=threads,
        allow_nonfinite=allow_nonfinite,
    )


def load_swept(recipe, axes: Sequence[Axis], compat: str | None) -> Recipe:
    """The recipe; keys that the grid gives for all models may be missing in it. Raises RecipeError."""
    try:
        return load_recipe(recipe, compat=compat)
    except RecipeError as error:
        document = recipe if isinstance(recipe, Mapping) else document_of(recipe)
        shared = document.get("parameters") or {}
        given = {a.key: a.values[0] for a in axes if a.values and "." not in a.key and a.key not in OTHER_KEYS}
        if not isinstance(shared, Mapping) or given.keys() <= shared.keys():
            raise
        document = {**document, "parameters": {**given, **shared}}
        if not isinstance(recipe, Mapping):
            import yaml

            document = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        try:
            return load_recipe(document, compat=compat)
        except RecipeError:
            raise error from None


def _from_keywords(method: str, base, models, compat, parameters: Mapping[str, Any], grid):
    """Sources of state dicts, None where models are folders; the recipe; and the axes."""
    axes = axes_of(grid)
    in_memory = any(isinstance(m, Mapping) for m in (base, *models))
    sources, masks = None, parameters.get("mask")
    labels = [f"model {t}" for t in range(len(models))] if in_memory else models
    if in_memory:
        states = {"base": base} if base is not None else {}
        states |= dict(zip(labels, models, strict=True))
        sources = {ModelRef(label): MemorySource(label, state) for label, state in states.items()}
    if isinstance(masks, Mapping):
        parameters = {**parameters, "mask": "(in memory)"}
        sources[None] = MemorySource("mask", masks)
    given = {a.key: a.values[0] for a in axes if a.values and "." not in a.key and a.key not in parameters}
    label = "base" if in_memory and base is not None else base
    if parameters.get("dtype") is not None:
        parameters = {**parameters, "dtype": str(parameters["dtype"]).removeprefix("torch.")}
    try:
        loaded = load_recipe(spelled_out(method, label, labels, {**parameters, **given}), compat=compat)
    except RecipeError:  # of the grid's own values, the grid speaks better
        loaded = load_recipe(spelled_out(method, label, labels, parameters), compat=compat)
    return sources, loaded, axes


class Sweep:
    """A recipe and a grid; see `sweep`. len() is the number of points."""

    def __init__(self, recipe, grid: Grid, *, sources, into, max_memory: int, threads: int, allow_nonfinite: bool):
        self.recipe, self.grid, self.into = recipe, grid, into
        self.max_memory, self.threads, self.allow_nonfinite = max_memory, threads, allow_nonfinite
        self._memory_sources = sources

    def __len__(self) -> int:
        return len(self.grid)

    def __iter__(self) -> Iterator[Variant]:
        """The variants one by one, those that share most after each other; `index` is the place in the grid."""
        return self.variants()

    def variants(self, skip: Collection[int] = ()) -> Iterator[Variant]:
        """As iteration, without the points at these places."""
        hall = VariantMemory(
            self.grid, self._memory_sources, self.into, self.max_memory, self.threads, self.allow_nonfinite
        )
        try:
            places = (i for i in self.grid.order() if i not in skip)
            for window in _windows(places, self.grid.block(), hall.most_points()):
                yield from hall.variants(window)
        finally:
            hall.close()

    def evaluate(
        self,
        evaluator: Callable[[Any, dict[str, Any]], float | Mapping[str, float]],
        out: str | Path | None = None,
        *,
        best: str | None = None,
        metric: str | None = None,
        name: str = "",
        resume: bool = False,
        force: bool = False,
        yes: bool = False,
        tell: Callable[[Point, int], None] | None = None,
    ) -> Results:
        """Calls evaluator(state or model, parameters) for every variant; what it raises is recorded.

        out     folder for results.csv, results.json, results.png, the journal and, with `best` and models in files,
                the best variant
        best    "max" or "min"
        metric  which score of a dict counts; the first when not given
        name    of the evaluator, in the journal: a sweep resumes under the same name only
        tell    called with each point that is done, and how many are

        Raises RecipeError for more than 1,000 points without `yes`, CheckpointError when the inputs cannot be merged.
        """
        if best not in (None, "max", "min"):
            raise RecipeError("best", f"expected 'max' or 'min', got {best!r}")
        self.require_yes(yes)
        done: dict[int, Point] = {}
        if out is None:
            for point, index in self._evaluated(evaluator, set()):
                done[index] = point
                _check_metric(metric, done)
                if tell:
                    tell(point, len(done))
            return self._results(done, best, metric)
        with SweepJournal(Path(out), self._what(name), resume=resume, force=force) as journal:
            for index in range(len(self.grid)):
                if journal.has(self.grid.point(index)):
                    done[index] = journal.get(self.grid.point(index))
            for point, index in self._evaluated(evaluator, set(done)):
                journal.add(point)
                done[index] = point
                _check_metric(metric, done)
                if tell:
                    tell(point, len(done))
        results = self._results(done, best, metric)
        results.write(Path(out))
        if results.best is not None:
            self._write_best(results.best, Path(out) / "best")
        return results

    def write(
        self,
        out: str | Path,
        *,
        max_memory: str | int = "768MB",
        max_shard_size: str | int = "5GB",
        resume: bool = False,
        force: bool = False,
        yes: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[Outcome]:
        """Every variant as a checkpoint in a folder of its own below `out`, in the grid's order.

        Each is byte for byte what `merge` makes of that point's recipe. Returns what became of each; a variant that
        fails stops alone. Finished ones are not done again with `resume`.

        Raises RecipeError for more than 1,000 points without `yes`, ResourceError when the disk cannot take all.
        """
        self.require_yes(yes)
        if self._memory_sources is not None:
            raise RecipeError("sweep", "expected models in files to write checkpoints, got state dicts")
        memory, shard = parse_bytes(max_memory, "max_memory"), parse_bytes(max_shard_size, "max_shard_size")
        named = []
        for index in self.grid.order():
            plan = make_plan(self.grid.recipe_of(index, with_text=True), max_memory=memory, max_shard_size=shard)
            named.append((self.grid.name(index), plan, Path(out) / self.grid.name(index)))
        found = run_all(
            named, max_memory=memory, resume=resume, force=force, allow_nonfinite=self.allow_nonfinite,
            threads=self.threads, progress=progress,
        )  # fmt: skip
        by_name = {outcome.name: outcome for outcome in found}
        return [by_name[self.grid.name(index)] for index in range(len(self))]

    def require_yes(self, yes: bool) -> None:
        if len(self) > MANY and not yes:
            raise RecipeError(
                "grid", f"has {len(self):,} points; expected at most {MANY:,} unless asked for",
                "Say --yes (yes=True) to go through all of them.",
            )  # fmt: skip

    def _evaluated(self, evaluator, skip: set[int]) -> Iterator[tuple[Point, int]]:
        for variant in self.variants(skip):
            began = time.perf_counter()
            try:
                point = Point(variant.parameters, scores_of(evaluator(variant.state, dict(variant.parameters))))
            except (Exception, SystemExit) as error:
                point = Point(variant.parameters, error=f"{type(error).__name__}: {error}")
            yield dataclasses.replace(point, seconds=time.perf_counter() - began), variant.index

    def _results(self, done: Mapping[int, Point], best: str | None, metric: str | None) -> Results:
        points = [done[i] for i in sorted(done)]
        names = list(dict.fromkeys(name for p in points for name in p.scores))
        _check_metric(metric, done)
        metric = metric or (names[0] if names else "score")
        axes = {axis.key: axis.values for axis in self.grid.axes}
        return Results(axes, points, metric, best_of(points, metric, best) if best else None)

    def _what(self, name: str) -> dict[str, Any]:
        """What scores depend on beside the point."""
        recipe = dataclasses.replace(self.recipe, text="")
        files = []
        if self._memory_sources is None:
            plan = make_plan(self.recipe, max_memory=1 << 62)
            for source in plan.sources.values():
                files += [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in source.files]
        swept = {axis.key.partition(".")[0] for axis in self.grid.axes}
        settings = [str(recipe.base), repr(recipe.modules), sorted(map(repr, recipe.parameters.items()))]
        settings = [recipe.method, recipe.compat, recipe.dtype, recipe.out_dtype, *settings]
        settings += [getattr(recipe, key) for key in ("seed", "trim_scope") if key not in swept]
        return {"evaluator": name, "recipe": settings, "inputs": files}

    def _write_best(self, point: Point, out: Path) -> Report | None:
        if self._memory_sources is not None:
            return None
        index = next(i for i in range(len(self)) if self.grid.point(i) == dict(point.parameters))
        plan = make_plan(self.grid.recipe_of(index, with_text=True))
        return run(plan, out, resume=True, force=True, threads=self.threads, allow_nonfinite=self.allow_nonfinite)


def _check_metric(metric: str | None, done: Mapping[int, Point]) -> None:
    """Raises RecipeError when there are scores, but none of this name."""
    if metric is None or any(metric in point.scores for point in done.values()):
        return
    names = list(dict.fromkeys(name for point in done.values() for name in point.scores))
    if names:
        raise RecipeError("metric", f"expected one of {', '.join(names)}, got {metric!r}")


def _windows(order: Iterator[int], block: int, most: int) -> Iterator[list[int]]:
    """Runs of at most so many points whose thresholds are found together; whole blocks where they fit."""
    size = most // block * block or most
    held: list[int] = []
    for index in order:
        held.append(index)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held
