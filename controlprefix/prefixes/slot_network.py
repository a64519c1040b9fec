"""SlotNetwork: slot embeddings -> keys and values, shared by training and user-code decoders."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SlotNetwork(nn.Module):
    """Linear, tanh, linear: from the embedding of a slot to its keys and values at one site.

    The output layer starts at zero, so that training starts exactly at the initialization.

    Args:
        width: Size of a slot's embedding.
        hidden_size: Size of the hidden layer.
        slot_size: Values of a slot at this site.
        column_groups: Index tensors that divide the slot's values into groups, each with a
            hidden and an output layer of its own; left out, one group.
        generator: Random state of the hidden layers' weights.

    Reference:
        Clive et al., "Control Prefixes", 2021, https://arxiv.org/abs/2110.08329 (shared
        reparameterization); Li & Liang, "Prefix-Tuning", 2021,
        https://arxiv.org/abs/2101.00190 (one network per prefix).
    """

    def __init__(
        self,
        width: int,
        hidden_size: int,
        slot_size: int,
        *,
        column_groups: Sequence[Tensor] = (),
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        groups = list(column_groups) or [torch.arange(slot_size)]
        # Concatenated outputs of the groups -> order of the slot's values.
        self._order: Tensor
        self.register_buffer("_order", torch.argsort(torch.cat(groups)), persistent=False)
        self.hidden, self.output = nn.ModuleList(), nn.ModuleList()
        for columns in groups:
            hidden, output = nn.Linear(width, hidden_size), nn.Linear(hidden_size, len(columns))
            with torch.no_grad():
                weights = torch.randn(hidden_size, width, generator=generator, device="cpu")
                hidden.weight.copy_(weights / width**0.5)
                for zero in (hidden.bias, output.weight, output.bias):
                    zero.zero_()
            self.hidden.append(hidden)
            self.output.append(output)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map embeddings `(num_slots, width)` to values `(num_slots, slot_size)`."""
        outputs = [
            output(torch.tanh(hidden(embeddings)))
            for hidden, output in zip(self.hidden, self.output, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)[:, self._order]
