"""The directory on disk: reading and writing it, its locks, and what was tuned with it.

``Datastore.open`` reads one, ``DatastoreWriter`` writes one, ``datastore.manifest`` says which
files it has and what they hold. A line that opens a file of a datastore belongs here, but for what
``search`` does: it reads and writes the index, and reads keys again from their file. Imports from
the root only.
"""

from .datastore import Datastore
from .fingerprint import dictionary_fingerprint, file_fingerprint, weights_fingerprint
from .manifest import read_manifest
from .tuned import read_tuned, save_tuned, tuned_for
from .writer import DatastoreWriter, value_dtype

__all__ = [
    "Datastore",
    "DatastoreWriter",
    "dictionary_fingerprint",
    "file_fingerprint",
    "read_manifest",
    "read_tuned",
    "save_tuned",
    "tuned_for",
    "value_dtype",
    "weights_fingerprint",
]
