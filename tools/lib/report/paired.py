"""Two runs on the images that both of them held out: the difference in MRR, and how sure it is."""

from __future__ import annotations

from pathlib import Path

from lib import kernel
from lib.data import FILES
from lib.project import InputError
from lib.report.measure import compare, other_run
from lib.runs import Run
from lib.weights import held_out, load_run, predict, repelled


def paired(one: Run, other: Run, data: Path) -> dict[str, dict[str, float]]:
    """The paired bootstrap of `one` less `other`, raw and cosine, from the predictions of their validated weights."""
    facts = kernel.file_facts(kernel.find_file(data, FILES[0]))
    for run in (one, other):
        if run.manifest.get("inputs", {}).get(FILES[0]) != facts:
            raise InputError(f"{run.folder}: was trained on other data than {data} holds; --data DIR names its own")
    bundle, _ = load_run(one.folder)
    held = held_out(bundle, data)
    _, theirs, _ = other_run(other.folder, bundle, held)
    return compare(repelled(bundle, predict(bundle, held, held.views)), theirs, held.images)
