"""What torch.hub finds in this repository: ``knnlm``, see ``fairseq_knnlm.hub``.

lm = torch.hub.load(REPOSITORY, "knnlm", MODEL, CHECKPOINT, DATA, knn_datastore=DIR, source="local")
"""

from fairseq_knnlm.hub import from_pretrained as knnlm  # noqa: F401

dependencies = ["fairseq", "faiss", "torch"]
