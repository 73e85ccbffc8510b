"""A small passage with memories that a page or a terminal could take amiss."""

import numpy as np

from fairseq_knnlm.inspection.tokens import Guess, Memory, Passage, Token


def make_passage(
    texts=("<script>alert(1)</script>", "&amp;", "</s>", '"x"'), log_ratio=0.5, with_cache=False
):
    """A passage of these tokens, each with one memory, and with a cache that has one as well."""
    memory = Memory(
        1, "<b>", True, 1.5, 0.25, ["<i>", "a"], ["</p>", "http://x.test/"], 0, 1234, 5, 6, 2
    )
    tokens = [
        Token(i, text, i == 1, text == "</s>", 0.1, 0.2, 0.1 * np.exp(log_ratio), log_ratio,
              0.625, 0.25, 0.125, 0.02 if with_cache else None, 3,
              [memory], [Guess("<u>'", 0.3, False)], [Guess('"&gt;', 0.2, True)],
              [Guess("<s>&", 0.4, False)] if with_cache else [])
        for i, text in enumerate(texts)
    ]  # fmt: skip
    settings = {"checkpoint": "<c>.pt", "datastore": "d&e", "k": 9, "lambda": 0.5}
    return Passage("<source>", settings, tokens, datastores=1, with_cache=with_cache)
