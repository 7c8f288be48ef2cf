"""The kernel as a module: the one source of the model, the metric and the submission format.

    from lib import kernel
    kernel.evaluate(predictions, gallery)

It is loaded, and torch with it, when the first name is asked of it, once in a process.

`load_script` loads the other scripts that go to Kaggle in the same way.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lib.project import KERNEL

if TYPE_CHECKING:
    from pipeline import *  # noqa: F403 - what `kernel.` offers is what the script defines
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):  # the import system asks for those of every module
            raise AttributeError(name)
        return getattr(load_kernel(), name)


def recipe_names() -> list[str]:
    """The recipes, read from the script without loading it: for a help text."""
    for node in ast.parse(KERNEL.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "RECIPES":
            recipes = node.value.keys if isinstance(node.value, ast.Dict) else []
            return [ast.literal_eval(name) for name in recipes if name]
    return []


def load_kernel() -> ModuleType:
    """The module itself, for those who change it: a test."""
    return load_script(KERNEL)


@functools.cache
def load_script(path: Path) -> ModuleType:
    """A script as a module, loaded once in a process."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None  # it ends with .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module
