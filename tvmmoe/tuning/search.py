# SPDX-License-Identifier: Apache-2.0
"""MetaSchedule's evolutionary search with XGBModel over one task; every correct candidate is recorded as it is measured."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import tvm
import tvm_ffi
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.schedule import Trace

from tvmmoe.tuning.records import database_of
from tvmmoe.tuning.tasks import Task, decisions, key_of
from tvmmoe.tuning.worker import Worker

BATCH = 16


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
    """Compiles a batch; decisions that are recorded already are not measured again."""

    def __init__(self, run: "Run") -> None:
        super().__init__()
        self.run = run

    def build(self, build_inputs):
        run, results = self.run, [None] * len(build_inputs)
        if run.deadline is not None and time.monotonic() > run.deadline:
            raise OutOfTime
        fresh = []
        for i, item in enumerate(build_inputs):
            config = decisions(Schedule(item.mod))
            key = key_of(config)
            if key in run.known:
                results[i] = ms.builder.BuilderResult(None, "recorded before")
            else:
                run.known.add(key)
                fresh.append((i, config, item.mod))
        built = run.target.build(run.task, [(config, mod) for _, config, mod in fresh], run.folder)
        for (i, config, _), (path, error) in zip(fresh, built, strict=True):
            run.configs[path] = run.configs.get(path, [])
            artifact = f"{path}#{len(run.configs[path])}"  # a library may hold several candidates
            run.configs[path].append(config)
            results[i] = ms.builder.BuilderResult(None, error) if error else ms.builder.BuilderResult(artifact, None)
            if error:
                run.errors.append((config, error))
        return results


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
        return [Measured(self.run_.measure(str(item.artifact_path))) for item in runner_inputs]


class Run:
    """The search of one task and what it has found."""

    def __init__(
        self,
        task: Task,
        target: ModuleType,
        database_dir: Path,
        folder: Path,
        worker: Worker,
        deadline: float | None = None,
        progress: Callable[["Run"], None] = lambda run: None,
    ) -> None:
        self.task, self.target, self.folder, self.worker, self.deadline = task, target, folder, worker, deadline
        self.progress = progress
        self.mod = task.workload()
        self.database = database_of(database_dir)
        self.workload = self.database.commit_workload(self.mod)
        self.configs: dict[str, list[dict[str, int]]] = {}
        self.errors: list[tuple[dict[str, int], str]] = []
        self.us: dict[tuple, float] = {}  # by decisions, in order of measurement
        for record in self.database.get_all_tuning_records():
            if record.workload.same_as(self.workload) or tvm_ffi.structural_equal(record.workload.mod, self.mod):
                self.us[key_of(self.config_of(record.trace))] = 1e6 * float(record.run_secs[0])
        self.num_resumed = len(self.us)
        self.known = set(self.us)
        self.cost_model = ms.cost_model.XGBModel(
            extractor=Features(task, target), num_warmup_samples=BATCH, num_tuning_cores=2, adaptive_training=False,
            verbose_eval=0, early_stopping_rounds=10,
        )  # fmt: skip

    def config_of(self, trace: Trace) -> dict[str, int]:
        """Decisions of a recorded trace on today's definition."""
        sch = Schedule(self.mod)
        trace.apply_to_schedule(sch, remove_postproc=True)
        return decisions(sch)

    def measure(self, artifact: str):
        """Result of a built candidate; a correct one is recorded at once, so that nothing is lost by stopping."""
        path, index = artifact.rsplit("#", 1)
        config = self.configs[path][int(index)]
        reply = self.worker.measure(self.task, path, config)
        if "us" in reply:
            self.us[key_of(config)] = reply["us"]
            self.record(self.trace_of(config), [reply["us"] * 1e-6])
        else:
            self.errors.append((config, reply["error"]))
        self.progress(self)
        if "us" in reply:
            return ms.runner.RunnerResult([reply["us"] * 1e-6], None)
        return ms.runner.RunnerResult(None, reply["error"])

    def record(self, trace: Trace, run_secs: list[float]) -> None:
        args_info = ms.arg_info.ArgInfo.from_entry_func(self.mod, remove_preproc=False)
        target = self.target.tvm_target()
        self.database.commit_tuning_record(ms.database.TuningRecord(trace, self.workload, run_secs, target, args_info))

    def trace_of(self, config: dict[str, int]) -> Trace:
        """A point of the space, as its trace."""
        sch = Schedule(self.mod)
        self.target.space(self.task, sch)
        sampled = [inst for inst in sch.trace.insts if inst.kind.name == "SampleCategorical"]
        chosen = {}
        for inst, value in zip(sampled, config.values(), strict=True):
            chosen[inst] = [int(candidate) for candidate in inst.attrs[0]].index(value)
        trace = Trace(sch.trace.insts, chosen)
        assert self.config_of(trace) == config, config
        return trace

    def measure_default(self) -> None:
        """The hand-chosen decisions come first: whatever is found is compared with them."""
        config = self.target.default(self.task)
        if key_of(config) in self.known:
            return
        trace = self.trace_of(config)
        sch = Schedule(self.mod)
        trace.apply_to_schedule(sch, remove_postproc=True)
        ((path, error),) = self.target.build(self.task, [(config, sch.mod)], self.folder)
        self.known.add(key_of(config))
        if error:
            self.errors.append((config, error))
            return
        self.configs[path] = [*self.configs.get(path, []), config]
        self.measure(f"{path}#{len(self.configs[path]) - 1}")

    def search(self, num_trials: int, seed: int = 0) -> None:
        """Measure until the task has ``num_trials`` records, failures counted."""
        self.measure_default()
        num_trials -= len(self.us)
        if num_trials <= 0:
            return
        space = ms.space_generator.ScheduleFn(
            lambda sch: self.target.space(self.task, sch), sch_rules=[], postprocs=[Legal(self.task, self.target)],
            mutator_probs={Mutate(seed): 1.0},
        )  # fmt: skip
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=64, init_min_unmeasured=BATCH, genetic_num_iters=3, genetic_max_fail_count=20
        )
        context = ms.TuneContext(
            mod=self.mod, target=self.target.tvm_target(), task_name=self.task.label, rand_state=seed + 1, num_threads=1,
            space_generator=space, search_strategy=strategy,
        )  # fmt: skip
        try:
            ms.tune.tune_tasks(
                tasks=[context], task_weights=[1.0], work_dir=str(self.folder), max_trials_global=num_trials,
                num_trials_per_iter=min(BATCH, num_trials), builder=Builder(self), runner=Runner(self),
                database=self.database, cost_model=self.cost_model, task_scheduler="round-robin",
                measure_callbacks=[ms.measure_callback.UpdateCostModel()],
            )  # fmt: skip
        except Exception:  # OutOfTime may arrive as another type: it has passed through TVM's C++
            if self.deadline is None or time.monotonic() < self.deadline:
                raise

    @property
    def best(self) -> tuple[dict[str, int], float] | None:
        """Fastest decisions and their time in us."""
        if not self.us:
            return None
        key = min(self.us, key=self.us.__getitem__)
        return dict(key), self.us[key]
