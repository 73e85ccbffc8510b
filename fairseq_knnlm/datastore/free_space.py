"""Free space of a disk, asked for before a datastore is begun on it."""

import os
import shutil

from ..errors import UserError
from ..units import in_bytes
from .manifest import INDEX, KEYS, POSITIONS, VALUES


def free_bytes(path: str) -> int:
    """What a build at *path* may take: free space of its disk, and what its files take already."""
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    paths = (os.path.join(path, name) for name in (KEYS, VALUES, POSITIONS, INDEX))
    # The blocks are counted, not the sizes: rows that are not written yet take no space.
    taken = sum(512 * os.stat(name).st_blocks for name in filter(os.path.exists, paths))
    return shutil.disk_usage(folder).free + taken


def refuse_small_disk(path: str, needed: int, count: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        path (str): directory of the datastore, there already or not.
        needed (int): bytes of all files, the unfinished index included.
        count (int): entries.

    Raises:
        UserError: naming both sizes.
    """
    free = free_bytes(path)
    if needed > free:
        raise UserError(
            f"--knn-datastore {path} needs about {in_bytes(needed)} ({count:,} entries), "
            f"{in_bytes(needed - free)} more than its disk has free ({in_bytes(free)})"
        )
