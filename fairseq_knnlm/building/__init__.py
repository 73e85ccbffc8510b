"""Building datastores: the dump, the index, and what both will cost.

``build_datastore`` does it all; ``dump`` and ``finish`` are its two halves. ``estimate_build`` says
beforehand what a build takes. Imports from every package but ``reporting``, ``plugin`` and ``cli``.
"""

from .build import build_datastore, dump, finish, key_of, manifest_settings
from .estimate import Estimate, estimate_build

__all__ = [
    "Estimate",
    "build_datastore",
    "dump",
    "estimate_build",
    "finish",
    "key_of",
    "manifest_settings",
]
