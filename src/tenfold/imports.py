"""Find a Python object that a recipe names: `package.module:name` or `path/to/file.py:name`.

Only recipes and command lines come here, which are the user's own. Artifacts never do: loading one
imports nothing that a file names.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from tenfold.errors import UserError, unknown_name

__all__ = ["import_object", "is_object_name"]


def is_object_name(name: str) -> bool:
    """Tell whether `name` has the form `module:name` or `file.py:name`."""
    module, colon, attribute = name.rpartition(":")
    return bool(colon and module) and attribute.isidentifier()


def import_object(name: str, kind: str) -> object:
    """Import what `name` points at; `kind` says in errors what was looked for.

    Raises:
        UserError: the form is wrong, the module can't be imported, or it has no such name.
    """
    if not is_object_name(name):
        raise UserError(f"{kind} {name!r}: expected package.module:name or file.py:name")
    source, _, attribute = name.rpartition(":")
    try:
        module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    except UserError:
        raise
    except Exception as error:  # whatever the user's own module raises while it is imported
        raise UserError(
            f"{kind} {name!r}: importing {source} failed: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise unknown_name(f"{kind} in {source}", attribute, public)
    found: object = getattr(module, attribute)
    return found


def _import_module(name: str) -> object:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        # A console script does not put the working folder on the path, where `nets.py` lies.
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _import_file(path: Path) -> object:
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of a Python file")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)  # so that its classes can be found by their module
    specification.loader.exec_module(module)
    return module
