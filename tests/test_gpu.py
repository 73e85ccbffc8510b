"""What needs a GPU; on a machine without one none of this is verified."""

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, build, evaluate
from helpers import all_distances, assert_nearest, random_keys

from fairseq_knnlm.index import SearchIndex, build_index, gpu_available

COUNT, DIMENSION = 20_000, 32
on_torch = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
on_faiss = pytest.mark.skipif(not gpu_available(), reason="FAISS sees no GPU")
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.npy"
    np.save(path, random_keys(1, COUNT, DIMENSION))
    return np.load(path, mmap_mode="r")


@on_faiss
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat", "IVF64,PQ16", "IVF64,SQ8"])
def test_a_gpu_finds_what_a_cpu_finds(keys, tmp_path, factory, metric):
    path = str(tmp_path / "index.faiss")
    build_index(keys, factory, metric, path, str(tmp_path / "work"), lambda line: None)
    queries = random_keys(2, 300, DIMENSION).astype(np.float32)
    on_gpu, on_cpu = (
        SearchIndex(path, metric, None, device).search(queries, 20, nprobe=16)
        for device in ("cuda", "cpu")
    )
    np.testing.assert_allclose(on_gpu.distances, on_cpu.distances, rtol=0.02, atol=0.05)
    exact = SearchIndex(path, metric, keys, "cuda").search(queries, 20, nprobe=64)
    if factory in ("Flat", "IVF64,Flat"):
        assert_nearest(exact.distances, exact.ids, all_distances(queries, keys, metric))


@on_torch
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_on_a_gpu_are_those_on_a_cpu(data, checkpoints, datastores, tmp_path, architecture):
    build(data, checkpoints[architecture], tmp_path / "datastore", "--knn-index", "Flat", cpu=False)
    found, expected = (
        np.load(folder / "keys.npy").astype(np.float32)
        for folder in (tmp_path / "datastore", datastores[architecture])
    )
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.01)


@on_torch
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_perplexity_on_a_gpu_is_that_on_a_cpu(data, checkpoints, datastores, architecture):
    flags = (
        "--gen-subset", "valid", "--tokens-per-sample", 32,
        "--knn-datastore", datastores[architecture], "--knn-k", 16, "--knn-temperature", 10,
    )  # fmt: skip
    found = evaluate(data, checkpoints[architecture], *flags, cpu=False)
    assert found == pytest.approx(evaluate(data, checkpoints[architecture], *flags), rel=1e-3)
