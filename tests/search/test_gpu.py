"""What needs a GPU; on a machine without one none of this is verified."""

import numpy as np
import pytest
import torch
from helpers.commands import ARCHITECTURES, build, evaluate
from helpers.searching import as_arrays, search_index, values_for
from helpers.small import all_distances, assert_nearest, quiet, random_keys

from fairseq_knnlm.search import exhaustive_search
from fairseq_knnlm.search.devices import gpu_available
from fairseq_knnlm.search.exhaustive_search import ExhaustiveSearch
from fairseq_knnlm.search.index_build import build_index, load
from fairseq_knnlm.search.index_search import IndexSearch
from fairseq_knnlm.search.retriever import Retriever

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
    build_index(keys, factory, metric, path, str(tmp_path / "work"), quiet)
    queries = random_keys(2, 300, DIMENSION).astype(np.float32)
    on_gpu, on_cpu = (
        search_index(path, metric, None, queries, 20, 16, device) for device in ("cuda", "cpu")
    )
    np.testing.assert_allclose(on_gpu.distances, on_cpu.distances, rtol=0.02, atol=0.05)
    exact = search_index(path, metric, keys, queries, 20, 64, "cuda")
    if factory in ("Flat", "IVF64,Flat"):
        assert_nearest(exact.distances, exact.ids, all_distances(queries, keys, metric))


@on_faiss
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_tensors_find_what_arrays_find(keys, tmp_path, metric):
    path = str(tmp_path / "index.faiss")
    build_index(keys, "IVF64,PQ16", metric, path, str(tmp_path / "work"), quiet)
    queries = random_keys(2, 300, DIMENSION).astype(np.float32)
    index = IndexSearch(None, values_for(COUNT), metric, index=load(path), nprobe=16, device="cuda")
    arrays = as_arrays(index.search(torch.from_numpy(queries), 20))
    on_gpu = index.search(torch.from_numpy(queries).cuda(), 20)
    assert all(part.is_cuda for part in on_gpu)
    np.testing.assert_allclose(as_arrays(on_gpu).distances, arrays.distances, rtol=1e-5)


@on_torch
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_exhaustive_search_on_a_gpu(keys, monkeypatch, metric, resident):
    monkeypatch.setattr(exhaustive_search, "_RESIDENT_SHARE", 0.5 if resident else 0)
    monkeypatch.setattr(exhaustive_search, "_KEYS", 3000)
    queries = random_keys(2, 300, DIMENSION).astype(np.float32)
    search = ExhaustiveSearch(keys, values_for(COUNT), metric, device=torch.device("cuda"))
    neighbors = search.search(torch.from_numpy(queries), 50)
    assert all(part.is_cuda for part in neighbors)
    assert_nearest(*as_arrays(neighbors), all_distances(queries, keys, metric))


@on_torch
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_neighbours_stay_on_the_gpu_that_searched(datastores, device):
    retriever = Retriever.open([datastores["plain"]], k=8, distances="exhaustive", device=device)
    queries = torch.from_numpy(retriever.datastores[0].keys[:50].astype(np.float32))
    on_gpu = retriever.search(queries.cuda())
    assert all(part.is_cuda for part in on_gpu)
    on_cpu = Retriever.open([datastores["plain"]], k=8, distances="exhaustive").search(queries)
    torch.testing.assert_close(on_gpu.distances.cpu(), on_cpu.distances, rtol=1e-4, atol=1e-4)


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
@pytest.mark.parametrize("distances", ["exact", "index", "exhaustive"])
def test_perplexity_on_a_gpu_is_that_on_a_cpu(
    data, checkpoints, datastores, architecture, distances
):
    flags = (
        "--gen-subset", "valid", "--tokens-per-sample", 32,
        "--knn-datastore", datastores[architecture], "--knn-k", 16, "--knn-temperature", 10,
        "--knn-distances", distances,
    )  # fmt: skip
    found = evaluate(data, checkpoints[architecture], *flags, cpu=False)
    assert found == pytest.approx(evaluate(data, checkpoints[architecture], *flags), rel=1e-3)
