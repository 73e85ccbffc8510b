"""What a manifest must say: every field, its type and its range, and what belongs together.

The fields are explained in ``datastore.manifest``. Reader and writer of a datastore ask
``refuse_faulty``, so that nothing is written that would not be read. What a builder was given as
settings need not all be there, but is of the right kind where it is; ``require`` is for those who
cannot do without a part of it. Fields of other names are the builder's own.
"""

from collections.abc import Iterator, Sequence

from .. import files
from ..errors import UserError
from ..fields import (
    BOOLEAN,
    CHECKSUM,
    CHECKSUMS,
    MOST,
    POSITIVE,
    SHA256,
    TEXT,
    TEXTS_BY_NAME,
    Kind,
    Record,
    faults,
    is_whole,
    list_of,
    matching,
    one_of,
    or_null,
    whole,
)
from ..options import METRICS
from .layout import INDEX, KEYS, MANIFEST, POSITIONS, VALUES, manifest_layout, npy_bytes

FORMAT_VERSION = 1
# FAISS counts dimensions in 32 bits.
_MOST_DIMENSIONS = 2**31 - 1

_SIZE = {"size_bytes": whole(0)}
_VALUE_TYPES = one_of(["uint8", "uint16", "uint32", "uint64"])
_METRIC = one_of(METRICS)
_VERSION = Kind(str(FORMAT_VERSION), lambda v: is_whole(v, FORMAT_VERSION, FORMAT_VERSION))
_FILE_NAME = matching(r"(?!\.{1,2}$)[^/\0]+", "names of files in the directory")

# What decides the content of a datastore, as ``fairseq-knnlm-build`` and
# ``building.manifest_settings`` say it.
SETTINGS_FIELDS = {
    "key": Record({"type": TEXT, "layer": whole(0), "layers": whole(1)}, {}),
    "metric": _METRIC,
    "model": Record({"sha256": SHA256, "parameters": whole(0)}, {}),
    "dictionary": Record({"sha256": SHA256, "types": whole(1)}, {}),
    "data": Record({}, {"split": TEXT, "sha256": SHA256}),
    "context": Record(
        {},
        {
            "tokens_per_sample": whole(1),
            "context_window": whole(0),
            "sample_break_mode": TEXT,
            "add_bos_token": BOOLEAN,
            "fp16": BOOLEAN,
            "max_tokens": or_null(whole(1)),
            "batch_size": or_null(whole(1)),
        },
    ),
    "versions": TEXTS_BY_NAME,
}
_INDEX_FIELDS = Record(
    {"factory": TEXT, "metric": _METRIC, "nlist": or_null(whole(1)), "faiss_version": TEXT}, {}
)
_TEMPERATURE_FIELDS = Record(
    {"value": POSITIVE}, {"queries": whole(0), "k": whole(0), "nprobe": whole(1)}
)
_FILES_FIELDS = Record(
    {
        KEYS: Record({**_SIZE, "dtype": one_of(["float16"])}, {}),
        VALUES: Record({**_SIZE, "dtype": _VALUE_TYPES}, {}),
        INDEX: Record({**_SIZE, "checksums": CHECKSUMS}, {}),
    },
    {POSITIONS: Record({**_SIZE, "dtype": one_of(["int64"]), "checksums": CHECKSUMS}, {})},
)
# A builder's own files, which are compared with their sizes and checksums and not read.
_OTHER_FILE_FIELDS = Record(_SIZE, {"checksums": CHECKSUMS})
_CHUNKS_FIELDS = Record(
    {"rows": list_of(whole(0), "whole numbers >= 0"), KEYS: CHECKSUMS, VALUES: CHECKSUMS}, {}
)
MANIFEST_FIELDS = Record(
    {
        "format_version": _VERSION,
        "count": whole(0),
        "dimension": whole(1, _MOST_DIMENSIONS),
        "files": _FILES_FIELDS,
        "chunks": _CHUNKS_FIELDS,
        "index": _INDEX_FIELDS,
    },
    {
        "checksum": CHECKSUM,
        "model_dimension": whole(1, _MOST_DIMENSIONS),
        "temperature": _TEMPERATURE_FIELDS,
        **SETTINGS_FIELDS,
    },
)


def refuse_faulty(path: str, manifest) -> None:
    """Refuse a manifest that is not what the tables say, or whose parts contradict each other.

    Args:
        path (str): the directory, for the message.
        manifest: what was read, or is to be written.

    Raises:
        UserError: naming every field that is wrong, what it must be and what it is.
    """
    # What belongs together is compared once each part is what it must be.
    found = list(faults(manifest, MANIFEST_FIELDS)) or list(contradictions(manifest))
    if found:
        raise UserError(
            f"{path}/{MANIFEST} is no manifest that this release reads: {'; '.join(found)}; build "
            "the datastore again, or read it with the release that wrote it"
        )


def settings_faults(settings: dict) -> list[str]:
    """What is wrong with the settings of a builder, which become part of a manifest.

    Args:
        settings (dict): JSON; fields of other names are the builder's own.
    """
    found = list(faults(settings, Record({}, SETTINGS_FIELDS)))
    return found or list(_key_and_context(settings))


def require(path: str, manifest: dict, names: Sequence[str], purpose: str) -> None:
    """Refuse a datastore whose builder left out what a purpose needs.

    Args:
        path (str): the directory, for the message.
        manifest (dict): of the datastore.
        names (sequence of str): fields.
        purpose (str): who needs them, in words that follow "which".

    Raises:
        UserError: naming the fields that are not there.
    """
    missing = [name for name in names if name not in manifest]
    if missing:
        raise UserError(
            f"{path}/{MANIFEST} does not say {', '.join(missing)}, which {purpose} needs: build "
            "the datastore with fairseq-knnlm-build, or with settings of building.manifest_settings"
        )


# -- what belongs together -------------------------------------------------------------------------


def contradictions(manifest: dict) -> Iterator[str]:
    """Where the parts of a manifest contradict each other, each part being well-formed.

    Args:
        manifest (dict): without ``faults`` against ``MANIFEST_FIELDS``.

    Yields:
        str: for each the name of a field, what it must be and what it is.
    """
    yield from _key_and_context(manifest)
    metric, of_index = manifest.get("metric"), manifest["index"]["metric"]
    if metric is not None and of_index != metric:
        yield f"index.metric must be {metric}, as metric says, got {of_index}"
    yield from _chunk_contradictions(manifest["count"], manifest["chunks"])
    for name, (shape, dtype) in manifest_layout(manifest).items():
        expected, found = npy_bytes(shape, dtype), manifest["files"][name]["size_bytes"]
        if found != expected:
            yield f"files.{name}.size_bytes must be {expected}, for {shape} {dtype}, got {found}"
    for name, entry in manifest["files"].items():
        yield from _file_contradictions(name, entry)


def _key_and_context(fields: dict) -> Iterator[str]:
    key, context = fields.get("key"), fields.get("context", {})
    if key is not None and key["layer"] >= key["layers"]:
        yield f"key.layer must be < {key['layers']}, which key.layers is, got {key['layer']}"
    window, tokens = context.get("context_window", 0), context.get("tokens_per_sample", MOST)
    if window >= tokens:
        yield (
            f"context.context_window must be < {tokens}, which context.tokens_per_sample is, got "
            f"{window}"
        )


def _chunk_contradictions(count: int, chunks: dict) -> Iterator[str]:
    ends = chunks["rows"]
    if any(end < start for start, end in zip(ends, ends[1:])):
        yield "chunks.rows must not decrease"
    if (ends[-1] if ends else 0) != count:
        yield f"chunks.rows must end with {count}, which count is, got {ends[-1] if ends else 0}"
    for name in (KEYS, VALUES):
        if len(chunks[name]) != len(ends):
            yield (
                f"chunks.{name} must have a checksum for each of the {len(ends)} chunks, got "
                f"{len(chunks[name])}"
            )


def _file_contradictions(name: str, entry) -> Iterator[str]:
    if not _FILE_NAME.holds(name):
        yield f"files must have {_FILE_NAME.expected}, got {name!r}"
        return
    found = list(faults(entry, _OTHER_FILE_FIELDS, f"files.{name}"))
    yield from found
    if found or "checksums" not in entry:
        return
    segments = -(-entry["size_bytes"] // files.SEGMENT_BYTES)
    if len(entry["checksums"]) != segments:
        yield (
            f"files.{name}.checksums must be {segments}, one for each {files.SEGMENT_BYTES} bytes, "
            f"got {len(entry['checksums'])}"
        )
