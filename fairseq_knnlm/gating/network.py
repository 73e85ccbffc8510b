"""The small network of the learned gate: features of a token to weights, or a worth.

After He et al. (2021), section 4.1: scalar features beside the hidden state, which is made smaller
first; here with fewer layers, for less text to learn from.
"""

import torch
import torch.nn.functional as F
from torch import nn

# Features are cut at so many standard deviations: one of a kind never seen moves nothing far.
_FARTHEST = 5.0


class GateNetwork(nn.Module):
    """log-weights of a mixture, up to what they have in common; or one number.

    sizes (dict): all arguments but the last, by name, to make another of the same kind with.

    Args:
        scalars (int): features besides the hidden state, which come first.
        states (int): numbers of the hidden state, which come last.
        outputs (int): numbers that it gives.
        hidden (int): units of a layer.
        reduced (int): numbers that the hidden state is made into.
        dropout (float): in training.
    """

    def __init__(
        self,
        scalars: int,
        states: int,
        outputs: int,
        hidden: int = 64,
        reduced: int = 32,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.sizes = {
            "scalars": scalars,
            "states": states,
            "outputs": outputs,
            "hidden": hidden,
            "reduced": reduced,
        }
        self.register_buffer("mean", torch.zeros(scalars + states))
        self.register_buffer("deviation", torch.ones(scalars + states))
        self.reduce = nn.Linear(states, reduced)
        self.layers = nn.ModuleList(
            [nn.Linear(scalars + reduced, hidden), nn.Linear(hidden, hidden)]
        )
        self.output = nn.Linear(hidden, outputs)
        self.dropout = nn.Dropout(dropout)

    def standardise(self, features: torch.Tensor) -> None:
        """Take mean and deviation of the features of a text, shape (N, F), for the scale."""
        self.mean.copy_(features.mean(dim=0))
        # A feature that never changes says nothing.
        self.deviation.copy_(features.std(dim=0)).clamp_(min=1e-6)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Outputs, shape (N, outputs), of features of shape (N, scalars + states)."""
        features = ((features - self.mean) / self.deviation).clamp(-_FARTHEST, _FARTHEST)
        scalars, states = features.tensor_split([self.sizes["scalars"]], dim=1)
        hidden = torch.cat([scalars, self.reduce(self.dropout(states))], dim=1)
        for layer in self.layers:
            hidden = self.dropout(F.relu(layer(hidden)))
        return self.output(hidden)
