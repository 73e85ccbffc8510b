"""Fingerprints that tell models, dictionaries and files apart."""

import hashlib

import torch

# Bytes of a file that are read at a time.
_READ_BYTES = 1 << 24


def weights_fingerprint(model) -> str:
    """SHA-256 of a model's weights, names and shapes included, as 64 hexadecimal digits.

    Of the parameters as loaded, before any conversion to half precision or move to a GPU.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        weights = parameter.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(weights.shape)}\n".encode())
        digest.update(memoryview(weights.numpy()).cast("B"))
    return digest.hexdigest()


def dictionary_fingerprint(dictionary) -> str:
    """SHA-256 of a dictionary's symbols in order; their counts do not matter."""
    symbols = "\n".join(dictionary[i] for i in range(len(dictionary)))
    return hashlib.sha256(symbols.encode()).hexdigest()


def file_fingerprint(*paths: str) -> str:
    """SHA-256 of the contents of files, one after another.

    Raises:
        OSError: if one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            for data in iter(lambda: file.read(_READ_BYTES), b""):
                digest.update(data)
    return digest.hexdigest()
