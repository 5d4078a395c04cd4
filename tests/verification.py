# SPDX-License-Identifier: Apache-2.0
"""What a gpu run shows about artifacts that had not run before: the change that the manifest then deserves."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FP8_FILE, FP8_SUITE = "moe_mxfp4_mxfp8_sm90a.so", "test_gemm_fp8.py"  # that serves where it is asked for alone
SUITES = ("test_op.py", "test_torch_op.py")  # of the selected target, beside its own test_<target>.py


def changes(
    passed: Iterable[str], is_clean: bool, targets: tuple[str, ...], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """File -> the state that it has earned, where that is better than what the manifest says.

    ``passed`` has the ids of gpu tests that passed, ``targets`` what this GPU runs, best first. Nothing is earned unless the
    run ``is_clean``: no gpu test failed or was left out of the files that ran.
    """
    ran = {Path(test.split("::")[0]).name for test in passed}
    emulated = {Path(test.split("::")[0]).name for test in passed if "::TestEmulatedOperator::" in test}
    own = next((target for target in targets if any(record["target"] == target for record in files.values())), None)
    earned: dict[str, str] = {}
    for file, record in files.items() if is_clean else ():
        target, before = record["target"], record["verified"]
        needed = {f"test_{target}.py", *(SUITES if target == own else ())}
        needed |= {FP8_SUITE} if Path(file).name == FP8_FILE else set()
        if target in targets and before != "measured" and needed <= ran:
            earned[file] = "measured"
        elif target not in targets and before == "compiled" and f"test_{target}.py" in emulated:
            earned[file] = "emulated"
    return earned


def lines(earned: Mapping[str, str], files: Mapping[str, Mapping[str, Any]], device: str) -> list[str]:
    """What to print: the change of manifest.json, and the commands that make it."""
    if not earned:
        return []
    commands = {(files[file]["target"], state): None for file, state in earned.items()}
    return [
        f"The gpu tests passed on {device}. In artifacts/manifest.json:",
        *(f'  "{file}": "verified": "{files[file]["verified"]}" -> "{state}"' for file, state in earned.items()),
        *(f"  python -m tvmmoe.build --target {target} --verified {state}" for target, state in commands),
    ]
