# SPDX-License-Identifier: Apache-2.0
"""What a run of the gpu tests prints: by its arithmetic, and in a pytest of its own with a GPU that is made up."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import verification

from tvmmoe import loader

FILES = {
    "sm90a/a.so": dict(target="sm90a", verified="measured"),
    "sm120a/a.so": dict(target="sm120a", verified="emulated"),
    "sm120a/b.so": dict(target="sm120a", verified="compiled"),
    "sm80/a.so": dict(target="sm80", verified="measured"),
}
BLACKWELL, HOPPER = ("sm120a", "sm80"), ("sm90a", "sm80")
SUITE = [f"tests/{name}::test_one[cuda]" for name in ("test_op.py", "test_torch_op.py", "test_sm120a.py")]
EMULATED = [*SUITE[:2], "tests/test_sm90a.py::test_one", "tests/test_sm120a.py::TestEmulatedOperator::test_one[8]"]


def test_whole_suite_measures_the_best_target():
    assert verification.changes(SUITE, True, BLACKWELL, FILES) == {f"sm120a/{x}.so": "measured" for x in "ab"}


@pytest.mark.parametrize("missing", range(3))
def test_part_of_the_suite_measures_nothing(missing):
    assert not verification.changes(SUITE[:missing] + SUITE[missing + 1 :], True, BLACKWELL, FILES)


def test_unclean_run_measures_nothing():
    assert not verification.changes(SUITE, False, BLACKWELL, FILES)
    assert not verification.changes(EMULATED, False, HOPPER, FILES)


def test_measured_files_and_other_targets_stay():
    assert not verification.changes(SUITE[:2], True, HOPPER, FILES)
    assert not verification.changes(SUITE, True, ("sm80",), FILES)


def test_emulation_on_another_gpu_proves_what_was_only_compiled():
    assert verification.changes(EMULATED, True, HOPPER, FILES) == {"sm120a/b.so": "emulated"}


def test_portable_files_are_measured_where_better_ones_are_selected():
    files = FILES | {"sm80/a.so": dict(target="sm80", verified="compiled")}
    assert verification.changes(["test_sm80.py::test_one"], True, HOPPER, files) == {"sm80/a.so": "measured"}
    assert not verification.changes(["test_sm80.py::test_one"], True, ("sm80",), files)  # selected, so in every suite


def test_fp8_file_needs_its_own_suite():
    files = {f"sm90a/{name}": dict(target="sm90a", verified="compiled") for name in ("a.so", "moe_mxfp4_mxfp8_sm90a.so")}
    suite = [*SUITE[:2], "tests/test_sm90a.py::test_one"]
    assert verification.changes(suite, True, HOPPER, files) == {"sm90a/a.so": "measured"}
    assert verification.changes([*suite, "tests/test_gemm_fp8.py::test_one"], True, HOPPER, files).keys() == files.keys()


def test_target_without_files_is_passed_over():
    files = {"sm80/a.so": dict(target="sm80", verified="compiled")}
    suite = [*SUITE[:2], "test_sm80.py::test_one"]
    assert verification.changes(suite, True, ("sm100a", "sm80"), files) == {"sm80/a.so": "measured"}


def test_every_target_has_gpu_tests_of_its_own():
    """Without them no run would ever call its files measured."""
    for target in {record["target"] for record in loader.manifest().files.values() if record["target"].startswith("sm")}:
        text = Path(__file__).with_name(f"test_{target}.py").read_text()
        assert re.search(r"pytestmark = .*(gpu|on_hopper)|@pytest\.mark\.gpu", text), target


CONFTEST = """
import sys
from pathlib import Path
import torch
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: (12, 1)
torch.cuda.get_device_name = lambda device=None: "NVIDIA GB10"
exec(Path({tests!r}, "conftest.py").read_text())
"""
TEST = """
import os
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("x", [1, 2])
def test_one(x):
    assert os.environ["TVMMOE_ALLOW_UNVERIFIED"] == "1"
    if x == {skipped}:
        pytest.skip("not built")
    assert x < {limit}
"""


@pytest.mark.parametrize("limit, skipped, options, is_printed", [
    (3, 0, [], True), (2, 0, [], False), (3, 2, [], False), (3, 0, ["-k", "not 1"], False), (3, 0, ["test_op.py"], False),
])  # fmt: skip
def test_summary_of_a_run(limit, skipped, options, is_printed, tmp_path):
    folder = Path(__file__).parent
    (tmp_path / "conftest.py").write_text(CONFTEST.format(tests=str(folder)))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    for name in ("test_op.py", "test_torch_op.py", "test_sm120a.py"):
        limits = dict(limit=limit if name == "test_op.py" else 3, skipped=skipped if name == "test_sm120a.py" else 0)
        (tmp_path / name).write_text(TEST.format(**limits))
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    (artifacts / "manifest.json").write_text(json.dumps(dict(artifact_abi=1, files=FILES, entries=[])))
    path = ":".join([str(folder), *filter(None, sys.path)])
    environment = os.environ | {"TVMMOE_ARTIFACTS": str(artifacts), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *options]
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert ("passed" in out) and ("1 failed" in out) == (limit == 2)
    expected = [
        "The gpu tests passed on NVIDIA GB10. In artifacts/manifest.json:",
        '  "sm120a/a.so": "verified": "emulated" -> "measured"',
        '  "sm120a/b.so": "verified": "compiled" -> "measured"',
        "  python -m tvmmoe.build --target sm120a --verified measured",
    ]
    assert [line for line in out.splitlines() if line in expected] == (expected if is_printed else [])
