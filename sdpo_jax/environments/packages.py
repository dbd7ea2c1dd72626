"""Where an installed package keeps its data: found without importing its code."""

from importlib import util
from pathlib import Path

from sdpo_jax.errors import UserError


def package_folder(name: str, missing: str) -> Path:
    """The folder of an installed package.

    Raises:
      UserError: with the message `missing`, if the package is.
    """
    spec = util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(missing)
    return Path(spec.submodule_search_locations[0])
