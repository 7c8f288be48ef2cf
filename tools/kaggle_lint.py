"""Lint what goes to Kaggle: the metadata of both kernels and both datasets and the scripts, by Kaggle's real rules.

    python tools/kaggle_lint.py

The official client checks little of this: it ignores unknown keys, turns the internet on by default, takes a retired
accelerator and pushes under another slug than the one asked for. One line a finding: file, key, what is wrong, the fix.
"""

from __future__ import annotations

import json
from pathlib import Path

from lib.jobs import lint
from lib.project import InputError, make_parser, run_tool


def main(argv: list[str] | None = None) -> int:
    """Lint the repository's own metadata files and its scripts."""
    parser = make_parser(__doc__, "0 nothing to report, 2 findings", "--json")
    kernels, datasets = [lint.KERNEL_METADATA, lint.EMBED_METADATA], [lint.DATASET_METADATA, lint.PAIRS_METADATA]
    parser.add_argument("--kernel-metadata", type=Path, nargs="*", default=kernels, metavar="FILE")
    parser.add_argument("--dataset-metadata", type=Path, nargs="*", default=datasets, metavar="FILE")
    arguments = parser.parse_args(argv)
    findings = []
    for path in arguments.kernel_metadata:
        findings += lint.lint_kernel_metadata(path)
        script = path.parent / str(lint.read_metadata(path).get("code_file", ""))
        if script.is_file():  # a code_file that does not exist is a finding of the metadata
            findings += lint.lint_script(script)
    for path in arguments.dataset_metadata:
        findings += lint.lint_dataset_metadata(path)
    if arguments.json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
        return InputError.exit_code if findings else 0
    lint.refuse(findings)
    print("nothing to report")
    return 0


if __name__ == "__main__":
    run_tool(main)
