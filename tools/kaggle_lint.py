"""Lint what goes to Kaggle: the metadata of both kernels and both datasets and the scripts, by Kaggle's real rules.

    python tools/kaggle_lint.py

The official client checks little of this: it ignores unknown keys, turns the internet on by default, takes a retired
accelerator and pushes under another slug than the one asked for. One line a finding: file, key, what is wrong, the fix.
"""

from __future__ import annotations

import json
from pathlib import Path

from lib.jobs.lint import (
    DATASET_METADATA,
    EMBED_METADATA,
    KERNEL_METADATA,
    PAIRS_METADATA,
    lint_dataset_metadata,
    lint_kernel_metadata,
    lint_script,
    read_metadata,
    refuse,
)
from lib.project import InputError, make_parser, run_tool


def main(argv: list[str] | None = None) -> int | None:
    """Lint the repository's own metadata files and its scripts."""
    parser = make_parser(
        "Lint the metadata of kernels and datasets and the kernels' scripts by Kaggle's rules.",
        "python tools/kaggle_lint.py --json",
        "0 nothing to report, 2 findings",
        "--json",
    )
    parser.add_argument(
        "--kernel-metadata", type=Path, nargs="*", default=[KERNEL_METADATA, EMBED_METADATA], metavar="FILE"
    )
    parser.add_argument(
        "--dataset-metadata", type=Path, nargs="*", default=[DATASET_METADATA, PAIRS_METADATA], metavar="FILE"
    )
    arguments = parser.parse_args(argv)
    findings = []
    for path in arguments.kernel_metadata:
        findings += lint_kernel_metadata(path)
        script = path.parent / str(read_metadata(path).get("code_file", ""))
        if script.is_file():  # a code_file that does not exist is a finding of the metadata
            findings += lint_script(script)
    for path in arguments.dataset_metadata:
        findings += lint_dataset_metadata(path)
    if arguments.json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
        return InputError.exit_code if findings else 0
    refuse(findings)
    print("nothing to report")
    return 0


if __name__ == "__main__":
    run_tool(main)
