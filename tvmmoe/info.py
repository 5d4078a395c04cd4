# SPDX-License-Identifier: Apache-2.0
"""Environment, artifacts and what a call would select: ``python -m tvmmoe.info``; paste it into a bug report."""

import argparse
import json
import platform

import torch
import tvm_ffi

import tvmmoe
from tvmmoe import loader
from tvmmoe.select import targets_of


def report(device: torch.device) -> dict[str, object]:
    """Versions, the device's targets, and every artifact with whether its checksum holds."""
    source = loader.manifest()
    artifacts = {}
    for file, record in source.files.items():
        loader.load(source, file)
        artifacts[file] = {key: record[key] for key in ("target", "bytes", "verified", "tvm", "compiler")}
    return {
        "tvmmoe": tvmmoe.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "tvm_ffi": tvm_ffi.__version__,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "targets": list(targets_of(device)),
        "artifacts_dir": str(source.folder),
        "artifacts": artifacts,
        "entries": [
            f"{e.target} {'/'.join(e.activation_formats)} x {e.weight_format}: rows per expert "
            f"[{e.min_rows_per_expert}, {e.max_rows_per_expert}) -> {e.symbol}"
            for e in source.entries
        ],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tvmmoe.info", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args()
    content = report(torch.device(arguments.device))
    if arguments.json:
        print(json.dumps(content, indent=1))
        return
    for key, value in content.items():
        if isinstance(value, (dict, list)):
            print(f"{key}:")
            for item in value.items() if isinstance(value, dict) else value:
                print(f"  {item if isinstance(item, str) else f'{item[0]}  {item[1]}'}")
        else:
            print(f"{key}: {value}")


if __name__ == "__main__":
    main()
