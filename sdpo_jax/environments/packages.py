"""Finds the folder of an installed package, for its data files, without importing its code."""

from importlib import util
from pathlib import Path

from sdpo_jax.errors import UserError


def package_folder(name: str, missing: str) -> Path:
    """The folder of an installed package.

    Raises:
      UserError: the package is not installed; the message is `missing`.
    """
    spec = util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(missing)
    return Path(spec.submodule_search_locations[0])
