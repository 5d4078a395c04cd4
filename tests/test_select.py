# SPDX-License-Identifier: Apache-2.0
"""Which artifact serves a call on which device, and what that takes of its verification: on manifests that are made up."""

import dataclasses
import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch

import tvmmoe
from tvmmoe import loader, select, torch_op
from tvmmoe.arguments import validate
from tvmmoe.loader import Entry, Manifest
from tvmmoe.testing import make_case

TARGETS = {
    (8, 0): ("sm80",),
    (8, 6): ("sm80",),
    (8, 9): ("sm80",),
    (9, 0): ("sm90a", "sm80"),
    (10, 0): ("sm100a", "sm80"),
    (10, 3): ("sm100a", "sm80"),
    (11, 0): ("sm80",),
    (12, 0): ("sm120a", "sm80"),
    (12, 1): ("sm120a", "sm80"),
    (7, 5): (),
}


# GPUs that are not there.
NAMES = {torch.device("cuda", 0): "NVIDIA H100 80GB HBM3", torch.device("cuda", 1): "NVIDIA H200"}


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    """As a user's environment is; and nothing remembered from one test to the next."""
    for name in (select.ALLOW_UNVERIFIED, select.FP8):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", NAMES.get)
    caches = (torch_op.selected_plan, torch_op._warn_once, select.targets_of, select.gpu_name)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def made_up(**states: str) -> Manifest:
    """A manifest with one file and two tile heights a target, bf16 on all but sm120a; ``sm90a="measured"``."""
    files = {f"{target}/moe.so": dict(target=target, verified=state) for target, state in states.items()}
    entries = []
    for target in states:
        formats = ("mxfp8",) if target == "sm120a" else ("bf16", "mxfp8")
        for tile_m, low, high in ((8, 0, 4), (64, 4, None)):
            entries.append(Entry(target, "mxfp4", formats, tile_m, low, high, f"m{tile_m}", f"{target}/moe.so"))
    return Manifest(Path("made_up"), files, tuple(entries))


def problem(num_tokens: int = 8, activation_format: str = "bf16", device: str = "cpu"):
    real = validate(**torch_op.with_defaults(**make_case(num_tokens=num_tokens)))
    form = type(real.activation_format)[activation_format]
    return dataclasses.replace(real, activation_format=form, device=torch.device(device))


def selected(source: Manifest, capability: tuple[int, int], **options) -> str:
    return select.select(source, select.cuda_targets(*capability), problem(**options)).target


@pytest.mark.parametrize("capability, targets", TARGETS.items())
def test_targets_of_a_gpu(capability, targets, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert select.targets_of(torch.device("cuda", 3)) == targets


def test_builds_serve_the_gpus_of_the_table():
    build = pytest.importorskip("tvmmoe.build")
    served = {
        (*divmod(int(chip[:-1]), 10), target.name)
        for target in build.CUDA_TARGETS.values()
        for gencode in target.gencodes
        for chip in re.findall(r"sm_(\d+a)", gencode)
    }
    table = {(*key, name) for key, name in select.CUDA_TARGETS.items() if name in build.CUDA_TARGETS}
    assert table == served


def test_manifest_has_known_states():
    assert {record["verified"] for record in loader.manifest().files.values()} <= set(select.VERIFIED)


def test_best_target_first_and_portable_last():
    every = made_up(sm80="measured", sm90a="measured", sm120a="measured", sm100a="measured")
    assert [selected(every, c) for c in ((9, 0), (10, 3), (8, 6))] == ["sm90a", "sm100a", "sm80"]
    assert selected(every, (12, 1), activation_format="mxfp8") == "sm120a"
    assert selected(every, (12, 1)) == "sm80"  # has bf16, which sm120a here has not
    assert selected(made_up(sm80="measured"), (9, 0)) == "sm80"


def test_range_of_rows_decides_the_tile():
    source = made_up(sm90a="measured")
    tiles = [select.select(source, ("sm90a",), problem(num_tokens=n)).tile_m for n in (8, 15, 16, 200)]
    assert tiles == [8, 8, 64, 64]  # 8 experts, 2 slots: 4 rows an expert from 16 tokens on


def test_a_gpu_that_was_measured_apart_has_its_own_ranges(monkeypatch):
    source = made_up(sm90a="measured")
    short, tall = source.entries
    apart = [dataclasses.replace(short, device_ranges=(("NVIDIA H200", 0, 2),))]
    apart += [dataclasses.replace(tall, device_ranges=(("NVIDIA H200", 2, None),))]
    source = Manifest(source.folder, source.files, tuple(apart))
    monkeypatch.setattr(loader, "manifest", lambda: source)
    monkeypatch.setattr(select, "targets_of", lambda device: ("sm90a",))
    monkeypatch.setattr(torch_op, "targets_of", select.targets_of)

    def tiles(device: str) -> list[int]:
        return [torch_op.selected_entry(problem(num_tokens=n, device=device)).tile_m for n in (7, 8, 15, 16)]

    assert tiles("cuda:1") == [8, 64, 64, 64] and tiles("cuda:0") == tiles("cpu") == [8, 8, 8, 64]


@pytest.mark.parametrize("value, target", [(None, "sm80"), ("0", "sm80"), ("1", "sm100a")])
def test_compiled_file_is_skipped_unless_allowed(value, target, monkeypatch):
    if value is not None:
        monkeypatch.setenv("TVMMOE_ALLOW_UNVERIFIED", value)
    assert selected(made_up(sm100a="compiled", sm80="measured"), (10, 0)) == target


def test_emulated_file_is_preferred_to_the_portable_one():
    assert selected(made_up(sm80="measured", sm120a="emulated"), (12, 0), activation_format="mxfp8") == "sm120a"


def test_nothing_but_a_compiled_file_names_the_variable_and_the_command():
    message = (
        r"^bf16 x mxfp4 on sm100a: sm100a/moe.so has been compiled but never run; set TVMMOE_ALLOW_UNVERIFIED=1 to use it "
        r"all the same, and verify it with python -m pytest -m gpu$"
    )
    with pytest.raises(tvmmoe.UnsupportedError, match=message):
        selected(made_up(sm100a="compiled", sm90a="measured"), (10, 0))


def test_device_without_artifact_names_what_would_build_one(monkeypatch):
    with pytest.raises(tvmmoe.UnsupportedError, match=r"no bf16 x mxfp4 artifact for sm80; shipped: sm90a .*--target sm80\)"):
        selected(made_up(sm90a="measured"), (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(tvmmoe.UnsupportedError, match=r"artifact for sm75, expected sm80 or newer; .*tvmmoe.info\)$"):
        selected(made_up(sm90a="measured"), (7, 5), device="cuda:3")


@pytest.mark.parametrize("state, said", [("emulated", "passed the tests on another GPU"), ("compiled", "nothing of it has")])
def test_unverified_file_warns_once(state, said, monkeypatch):
    monkeypatch.setenv("TVMMOE_ALLOW_UNVERIFIED", "1")
    source = made_up(sm100a=state)
    monkeypatch.setattr(loader, "manifest", lambda: source)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with pytest.warns(tvmmoe.UnverifiedWarning, match=f"sm100a/moe.so has not run on .* target sm100a .*{said}") as record:
        for num_tokens in (8, 9, 200):
            torch_op.selected_entry(problem(num_tokens=num_tokens, device="cuda:3"))
    assert len(record) == 1


def test_measured_file_does_not_warn(monkeypatch):
    source = made_up(sm90a="measured")
    monkeypatch.setattr(loader, "manifest", lambda: source)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch_op.selected_entry(problem(device="cuda:3")).target == "sm90a"


def test_selection_is_made_once_a_problem(monkeypatch):
    """The state is looked at there, so a call that has been made before does not pay for it."""
    seen = []
    monkeypatch.setattr(torch_op, "select", lambda *args: seen.append(args[2]) or select.select(*args))
    sizes = dict(hidden_size=224, intermediate_size=160)  # that no other test calls with
    kwargs = make_case(num_tokens=3, **sizes)
    for _ in range(3):
        tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    assert len(seen) == 1
    tvmmoe.trtllm_fp4_block_scale_moe(**make_case(num_tokens=4, **sizes))
    assert len(seen) == 2


def with_fp8(verified: str = "measured") -> Manifest:
    """sm90a with fp8 accumulation for mxfp8 from 8 rows an expert on."""
    source = made_up(sm90a="measured")
    files = source.files | {"sm90a/fp8.so": dict(target="sm90a", verified=verified)}
    entry = Entry("sm90a", "mxfp4", ("mxfp8",), 128, 8, None, "fp8", "sm90a/fp8.so", accumulation="fp8")
    return Manifest(source.folder, files, (entry, *source.entries))


def symbol(source: Manifest, rows: int, activation_format: str = "mxfp8") -> str:
    p = problem(1, activation_format)
    p = dataclasses.replace(p, num_tokens=rows * p.num_experts // p.top_k)
    assert select.rows_per_expert(p) == rows
    return select.select(source, ("sm90a",), p).symbol


@pytest.mark.parametrize("value, chosen", [(None, "m64"), ("0", "m64"), ("", "m64"), ("1", "fp8")])
def test_fp8_accumulation_is_asked_for(value, chosen, monkeypatch):
    if value is not None:
        monkeypatch.setenv(select.FP8, value)
    assert symbol(with_fp8(), 8) == chosen


def test_fp8_accumulation_serves_its_own_calls_alone(monkeypatch):
    monkeypatch.setenv(select.FP8, "1")
    assert symbol(with_fp8(), 4) == symbol(with_fp8(), 8, "bf16") == "m64"
    assert symbol(with_fp8("compiled"), 8) == "m64"
    monkeypatch.setenv(select.ALLOW_UNVERIFIED, "1")
    assert symbol(with_fp8("compiled"), 8) == "fp8"


def test_fp8_variable_is_read_at_the_first_call_of_a_problem(monkeypatch):
    source = with_fp8()
    monkeypatch.setattr(loader, "manifest", lambda: source)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch_op, "plan", lambda problem, entry: entry.symbol)
    first, second = (problem(n, "mxfp8", "cuda:3") for n in (200, 300))
    assert torch_op.selected_plan(first) == "m64"
    monkeypatch.setenv(select.FP8, "1")
    assert [torch_op.selected_plan(p) for p in (first, second)] == ["m64", "fp8"]


@pytest.mark.parametrize("target", ["sm90a", "sm120a"])
@pytest.mark.parametrize("num_tokens", [1, 64, 4097])
def test_workspace_is_that_of_the_target(target, num_tokens):
    layout = importlib.import_module(f"tvmmoe.kernels.{target}.layout")
    p = problem(num_tokens=num_tokens)
    sizes = (p.num_tokens, p.top_k, p.hidden_size, p.intermediate_size, p.local_num_experts)
    entry = next(e for e in made_up(**{target: "measured"}).entries if e.tile_m == 64)
    extra = (p.weight_format,) if target == "sm120a" else ()
    pieces, _ = layout.slices(*sizes, 64, *extra)
    last = max(pieces.values(), key=lambda piece: piece.offset)
    assert 0 <= torch_op.entry_workspace_bytes(p, entry) - (last.offset + last.num_bytes) < 128
