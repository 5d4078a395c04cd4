# SPDX-License-Identifier: Apache-2.0
"""MetaSchedule's evolutionary search with XGBModel over one task; every correct candidate is recorded as it is measured."""

import contextlib
import functools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import tvm
import xgboost
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.schedule import Trace

from tvmmoe.tuning.records import Database
from tvmmoe.tuning.tasks import Task, decisions, key_of, traced_decisions
from tvmmoe.tuning.worker import Worker

BATCH = 8
POPULATION = 32


class OutOfTime(Exception):
    """The time limit has passed; records so far are kept."""


@derived_object
class Legal(ms.postproc.PyPostproc):
    """Refuses decisions that cannot be built or cannot be fast."""

    def __init__(self, task: Task, target: ModuleType) -> None:
        super().__init__()
        self.task, self.target = task, target

    def _initialize_with_tune_context(self, context) -> None:
        pass

    def apply(self, sch: Schedule) -> bool:
        return self.target.is_legal(self.task, decisions(sch))

    def clone(self) -> "Legal":
        return Legal(self.task, self.target)


@derived_object
class Mutate(ms.mutator.PyMutator):
    """Changes one decision to another of its candidates."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def _initialize_with_tune_context(self, context) -> None:
        pass

    def apply(self, trace: Trace, _=None) -> Trace:
        sampled = [inst for inst in trace.insts if inst.kind.name == "SampleCategorical" and len(inst.attrs[0]) > 1]
        inst = self.random.choice(sampled)
        old = int(trace.decisions[inst])
        new = self.random.choice([i for i in range(len(inst.attrs[0])) if i != old])
        return Trace(trace.insts, {**dict(trace.decisions.items()), inst: new})

    def clone(self) -> "Mutate":
        return Mutate(self.random.randrange(2**31))


@derived_object
class Features(ms.feature_extractor.PyFeatureExtractor):
    """One row a candidate."""

    def __init__(self, task: Task, target: ModuleType) -> None:
        super().__init__()
        self.task, self.target = task, target

    def extract_from(self, context, candidates):
        rows = [self.target.features(self.task, decisions(c.sch)) for c in candidates]
        return [tvm.runtime.tensor(np.array([row], dtype="float32")) for row in rows]


@derived_object
class Builder(ms.builder.PyBuilder):
    """Compiles a batch. Decisions that are recorded already need no library: the runner knows their time."""

    def __init__(self, run: "Run") -> None:
        super().__init__()
        self.run = run

    def build(self, build_inputs):
        self.run.check_time()
        configs = [decisions(Schedule(item.mod)) for item in build_inputs]
        keys, errors = self.run.build(configs, [item.mod for item in build_inputs])
        pairs = zip(keys, errors, strict=True)
        return [ms.builder.BuilderResult(None if error else key, error or None) for key, error in pairs]


@derived_object
class Measured(ms.runner.PyRunnerFuture):
    """A result that is there already."""

    def __init__(self, result) -> None:
        super().__init__()
        self.value = result

    def done(self) -> bool:
        return True

    def result(self):
        return self.value


@derived_object
class Runner(ms.runner.PyRunner):
    """Checks and times one candidate after another in the worker."""

    def __init__(self, run: "Run") -> None:
        super().__init__()
        self.run_ = run

    def run(self, runner_inputs):
        return [Measured(self._result(str(item.artifact_path))) for item in runner_inputs]

    def _result(self, key: str):
        us, error = self.run_.measure(key)
        return ms.runner.RunnerResult(None if error else [us * 1e-6], error or None)


class Run:
    """The search of one task and what it has found."""

    def __init__(
        self,
        task: Task,
        target: ModuleType,
        database: Database,
        folder: Path,
        worker: Worker,
        deadline: float | None = None,
        progress: Callable[["Run"], None] = lambda run: None,
    ) -> None:
        self.task, self.target, self.folder, self.worker, self.deadline = task, target, folder, worker, deadline
        self.progress, self.database = progress, database
        self.mod = task.workload()
        self.errors: list[tuple[dict[str, int], str]] = []
        self.us: dict[tuple, float] = {}  # by decisions, in order of measurement
        for record in database.of(task, self.mod):
            self.us[key_of(traced_decisions(record.trace))] = 1e6 * float(record.run_secs[0])
        self.num_resumed = len(self.us)
        self.built: dict[str, tuple[str, dict[str, int]]] = {}  # library and decisions by what MetaSchedule calls them
        self.cost_model = ms.cost_model.XGBModel(
            extractor=Features(task, target), num_warmup_samples=BATCH, num_tuning_cores=1, adaptive_training=False,
            verbose_eval=0, early_stopping_rounds=10,
        )  # fmt: skip

    def check_time(self) -> None:
        """Raises OutOfTime after the deadline."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime

    @functools.cached_property
    def _space(self) -> Trace:
        """Any trace of the space."""
        sch = Schedule(self.mod)
        self.target.space(self.task, sch)
        return sch.trace

    @functools.cached_property
    def _args_info(self):
        return ms.arg_info.ArgInfo.from_entry_func(self.mod, remove_preproc=False)

    @functools.cached_property
    def _workload(self):
        return self.database.database.commit_workload(self.mod)

    def trace_of(self, config: dict[str, int]) -> Trace:
        """A point of the space, as its trace."""
        sampled = [inst for inst in self._space.insts if inst.kind.name == "SampleCategorical"]
        chosen = {}
        for inst, value in zip(sampled, config.values(), strict=True):
            chosen[inst] = [int(candidate) for candidate in inst.attrs[0]].index(value)
        trace = Trace(self._space.insts, chosen)
        assert traced_decisions(trace) == config, config
        return trace

    def module_of(self, config: dict[str, int]) -> tvm.IRModule:
        """The workload with a point's trace applied."""
        sch = Schedule(self.mod)
        self.trace_of(config).apply_to_schedule(sch, remove_postproc=True)
        return sch.mod

    def record(self, config: dict[str, int], us: float) -> None:
        """Append to the database."""
        target, run_secs = self.target.tvm_target(), [us * 1e-6]
        record = ms.database.TuningRecord(self.trace_of(config), self._workload, run_secs, target, self._args_info)
        self.database.database.commit_tuning_record(record)

    def build(self, configs: Sequence[dict[str, int]], mods: Sequence[tvm.IRModule]) -> tuple[list[str], list[str]]:
        """Compile what is not recorded; a key and an error, or "", of each."""
        keys = [repr(key_of(config)) for config in configs]
        errors = dict.fromkeys(keys, "")
        todo = {}
        for key, config, mod in zip(keys, configs, mods, strict=True):
            if key not in self.built:
                self.built[key] = ("", config)
                if key_of(config) not in self.us:
                    todo[key] = (config, mod)
        results = self.target.build(self.task, list(todo.values()), self.folder) if todo else []
        for (key, (config, _)), (library, error) in zip(todo.items(), results, strict=True):
            self.built[key] = (library, config)
            if error:
                errors[key] = error
                self.errors.append((config, error))
        return keys, [errors[key] for key in keys]

    def measure(self, key: str) -> tuple[float, str]:
        """(us, "") or (0, error) of a built candidate; a correct one is recorded at once, so that stopping loses nothing."""
        library, config = self.built[key]
        if key_of(config) in self.us:
            return self.us[key_of(config)], ""
        failed = next((error for other, error in self.errors if other == config), "")
        if failed:
            return 0.0, failed
        reply = self.worker.measure(self.task, library, config)
        if "us" in reply:
            self.us[key_of(config)] = reply["us"]
            self.record(config, reply["us"])
        else:
            self.errors.append((config, reply["error"]))
        self.progress(self)
        return reply.get("us", 0.0), reply.get("error", "")

    def measure_all(self, configs: Sequence[dict[str, int]]) -> None:
        """Measure these; the first one even after the deadline, so that every task has something."""
        fresh = [config for config in configs if key_of(config) not in self.us]
        keys, errors = self.build(fresh, [self.module_of(config) for config in fresh])
        for i, (key, error) in enumerate(zip(keys, errors, strict=True)):
            if i:
                self.check_time()
            if not error:
                self.measure(key)

    def search(self, num_trials: int, seed: int = 0) -> None:
        """Measure until the task has ``num_trials`` records, failures counted; all of a space that has no more points.

        The hand-chosen decisions come first: whatever is found is compared with them.
        """
        space = self.target.configs(self.task)
        try:
            self.measure_all(self.target.seeds(self.task)[:num_trials])
            if num_trials >= len(space):
                self.measure_all(space)
                return
            left = num_trials - len(self.us) - len(self.errors)
            if left > 0:
                self._evolve(left, seed + 1)
                # It may have come back to what was known; the trials that this left over go anywhere.
                tried = {*self.us, *(key_of(config) for config, _ in self.errors)}
                fresh = [config for config in space if key_of(config) not in tried]
                random.Random(seed).shuffle(fresh)
                self.measure_all(fresh[: num_trials - len(tried)])
        except Exception:  # OutOfTime may arrive as another type: it has passed through TVM's C++
            if self.deadline is None or time.monotonic() < self.deadline:
                raise

    def _evolve(self, num_trials: int, seed: int) -> None:
        """One run of MetaSchedule's search."""
        space = ms.space_generator.ScheduleFn(
            lambda sch: self.target.space(self.task, sch), sch_rules=[], postprocs=[Legal(self.task, self.target)],
            mutator_probs={Mutate(seed): 1.0},
        )  # fmt: skip
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=POPULATION, init_min_unmeasured=BATCH, genetic_num_iters=2, genetic_max_fail_count=20
        )
        with _without_stock_intrinsics(), _one_thread():
            context = ms.TuneContext(
                mod=self.mod, target=self.target.tvm_target(), task_name=self.task.label, rand_state=seed, num_threads=1,
                space_generator=space, search_strategy=strategy,
            )  # fmt: skip
            ms.tune.tune_tasks(
                tasks=[context], task_weights=[1.0], work_dir=str(self.folder), max_trials_global=num_trials,
                num_trials_per_iter=min(BATCH, num_trials), builder=Builder(self), runner=Runner(self),
                database=self.database.database, cost_model=self.cost_model, task_scheduler="round-robin",
                measure_callbacks=[ms.measure_callback.UpdateCostModel()],
            )  # fmt: skip

    @property
    def best(self) -> tuple[dict[str, int], float] | None:
        """Fastest decisions and their time in us."""
        if not self.us:
            return None
        key = min(self.us, key=self.us.__getitem__)
        return dict(key), self.us[key]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """XGBoost on one thread: waking up more takes longer than its work, and beside a measurement they would disturb it."""
    count = torch.get_num_threads()
    with xgboost.config_context(nthread=1):
        yield
    torch.set_num_threads(count)  # OpenMP's setting is one for all


@contextlib.contextmanager
def _without_stock_intrinsics() -> Iterator[None]:
    """TuneContext imports TVM's own tensor intrinsics, of which we use none: parsing them takes a minute."""
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]
