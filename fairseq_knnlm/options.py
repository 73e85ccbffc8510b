"""What a datastore and a search can be asked for, and what they are where nothing is said.

Flags, arguments of Python and checks all take it from here. Needs no FAISS.
"""

# The measures of closeness: squared L2, and minus the inner product.
METRICS = ("l2", "ip")
# Whose distances count, see ``search.Retriever``.
DISTANCES = ("exact", "index", "exhaustive")
# Where is searched.
DEVICES = ("auto", "cpu", "cuda")

DEFAULT_KEY = "ffn-input"
DEFAULT_METRIC = METRICS[0]
DEFAULT_K = 1024
DEFAULT_NPROBE = 32
DEFAULT_DISTANCES = DISTANCES[0]
