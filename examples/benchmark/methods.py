"""kNN evaluation by every method, on one datastore: what it costs and how good it is."""

from quality import Judge, exhaustive_neighbors, exhaustive_search
from straightforward import Straightforward
from timing import Stopwatch, interleaved, median, was_held_up

from fairseq_knnlm.datastore.datastore import Datastore
from fairseq_knnlm.encoding.encode import encode
from fairseq_knnlm.encoding.key_extractor import extractor_of
from fairseq_knnlm.neighbors import Neighbors
from fairseq_knnlm.probability.knn import knn_log_probs
from fairseq_knnlm.probability.metrics import perplexity
from fairseq_knnlm.probability.mixture import mix
from fairseq_knnlm.scoring.scorer import make_scorer
from fairseq_knnlm.search.retriever import Retriever

MODEL, OURS = "language model", "fairseq_knnlm"


class Methods:
    """Every method on one datastore.

    Args:
        evaluation (Evaluation): what is evaluated.
        row (dict): of the datastore, from ``make_datastores``.
        settings (Namespace): of the command line.
        mixture (Mixture): what perplexities are of.
    """

    def __init__(self, evaluation, row, settings, mixture):
        self._evaluation, self._row, self._settings = evaluation, row, settings
        self._mixture = mixture
        self._datastore = Datastore.open(row["path"])
        self._retrievers = {
            (k, distances): self._open(k, distances)
            for k in settings.k
            for distances in ("index", "exact")
        }
        first = next(iter(self._retrievers.values()))
        evaluation.refuse_other(first)
        self._queries, self._forward_s = evaluation.queries(first, settings.queries)

    def _open(self, k, distances):
        settings = self._settings
        return Retriever.open(
            [self._row["path"]],
            k=k,
            nprobe=settings.knn_nprobe,
            distances=distances,
            device=settings.knn_device,
        )

    def measure(self, straightforward_index):
        """A row for every method; *straightforward_index*: the path of its index."""
        reference, rows = self._exhaustive()
        judge = Judge(self._queries, self._datastore, self._mixture, reference)
        for row in rows:
            row.update(judge(Neighbors(*(part[:, : row["k"]] for part in reference))))
        base = perplexity(self._queries.log_p_lm.cpu())
        rows.append(self._begin_row(MODEL, None, None, perplexity=base))
        measurements = {(MODEL, None, None): self._scoring(None)}
        for (k, distances), retriever in self._retrievers.items():
            figures = judge(retriever.search(self._queries.keys))  # loads the index, warms up
            rows.append(self._begin_row(OURS, k, distances, **figures))
            measurements[OURS, k, distances] = self._scoring(retriever)
        for size in self._settings.cache_sizes:
            rows.append(self._begin_row(f"cache of {size:,}", None, None))
            measurements[f"cache of {size:,}", None, None] = self._scoring(None, size)
        setting = "straightforward", max(self._settings.k), "exact"
        measurements[setting], figures = self._straightforward(judge, straightforward_index)
        rows.append(self._begin_row(*setting, **figures))
        self._add_times(rows, interleaved(measurements, self._settings.repeats))
        return rows

    def _begin_row(self, method, k, distances, **figures):
        names = ("share", "entries")
        row = {name: self._row[name] for name in names}
        return {**row, "method": method, "k": k, "distances": distances, **figures}

    @property
    def queries(self):
        """The tokens that quality is measured on."""
        return self._queries

    def _exhaustive(self):
        count, k, queries = len(self._queries.targets), max(self._settings.k), self._queries.keys
        search = exhaustive_search(self._datastore, queries.device)
        stopwatch = Stopwatch(self._evaluation.clock)
        ids = search.search(queries, k).ids
        times = stopwatch.read()
        reference = exhaustive_neighbors(queries, ids, self._datastore)
        search_s = times["seconds"]
        rows = [self._begin_row("exhaustive", k, "exact") for k in self._settings.k]
        for row in rows:
            if row["k"] == k:
                row.update(tokens=count, runs_s=[search_s + count * self._forward_s])
                row.update(cpu_s=times["cpu_s"], held_up=was_held_up([times]))
                row.update(knn_us_per_token=1e6 * search_s / count)
                row["tokens_per_s"] = count / row["runs_s"][0]
        return reference, rows

    def _scoring(self, retriever, cache_size=0):
        """A measurement of the scorer that ``fairseq-eval-lm --task knnlm_lm`` calls.

        Without a retriever and a cache it is that of the language model alone.
        """
        evaluation = self._evaluation
        task = evaluation.task
        settings = task.settings._replace(cache_size=cache_size)
        scorer = make_scorer(retriever, settings, None if retriever else task.key)
        samples = evaluation.samples(retriever)
        for sample in evaluation.batches(1):  # warms up
            scorer.generate([evaluation.model], sample)

        def score():
            stopwatch = Stopwatch(evaluation.clock)
            for sample in samples:
                scorer.generate([evaluation.model], sample)
            return {
                **stopwatch.read(),
                "tokens": sum(sample["ntokens"] for sample in samples),
            }

        return score

    def _straightforward(self, judge, index_path):
        """A measurement of the straightforward method, and its figures."""
        evaluation, settings = self._evaluation, self._settings
        method = Straightforward(self._datastore, index_path, max(settings.k), settings.knn_nprobe)
        samples = evaluation.batches(settings.straightforward_tokens)
        extractor = extractor_of(evaluation.model, next(iter(self._retrievers.values())).key)

        def score(samples=samples):
            stopwatch = Stopwatch(evaluation.clock)
            with extractor:
                for sample in samples:
                    encoded = encode(evaluation.model, sample, extractor)
                    found = method.search(encoded.keys)
                    neighbors = (part.to(evaluation.device) for part in found[:2])
                    log_p_knn = knn_log_probs(
                        *neighbors, sample["target"], self._mixture.temperature
                    )
                    mix(encoded.log_p_lm, log_p_knn, knn_lambda=self._mixture.knn_lambda)
            return {
                **stopwatch.read(),
                "tokens": sum(sample["ntokens"] for sample in samples),
            }

        # no more tokens than exhaustive search was run on; warms up as well
        count = min(len(self._queries.targets), sum(sample["ntokens"] for sample in samples))
        return score, judge(method.search(self._queries.keys[:count]))

    def _add_times(self, rows, runs):
        (model,) = (row for row in rows if row["method"] == MODEL)
        for row in sorted(rows, key=lambda row: row is not model):
            of_row = runs.get((row["method"], row["k"], row["distances"]))
            if of_row is None:  # exhaustive search
                continue
            tokens = of_row[0]["tokens"]
            token_us = 1e6 * median(of_row, "seconds") / tokens
            row.update(
                tokens=tokens,
                tokens_per_s=1e6 / token_us,
                cpu_s=median(of_row, "cpu_s"),
                held_up=was_held_up(of_row),
                knn_us_per_token=token_us - 1e6 / model["tokens_per_s"] if row is not model else 0,
                runs_s=[run["seconds"] for run in of_row],
            )
