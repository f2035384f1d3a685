"""What a repair is folded into: the last matrix of a sublayer, or the gain of each of its output channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from excise.models.stack import Sublayer
from excise.repair.ridge import Equations, GainEquations, NormalEquations

AUTO = "auto"
FEATURES = ("output", "input")
# Above it, the eigenvectors of the inputs' normal equations cost more than they bring.
WIDEST_INPUT = 8192


@dataclass(frozen=True, eq=False)
class Projection:
    """The last matrix of a sublayer: its output is the sublayer's, or a part of the sum that is.

    Attributes:
        name: of the module, from the model's root.
        module: a linear module with plain floating-point weights.
        sublayer: whose output it makes.
        scale: what that output is multiplied by before it is added to the residual stream.
        gate: the module whose output [tokens, 1] is the logit of a sigmoid by which each token's is multiplied, too, as
            for some shared experts; None where there is no such gate.

    """

    name: str
    module: Any
    sublayer: Sublayer
    scale: float
    gate: nn.Module | None = None

    @property
    def names(self) -> list[str]:
        """Of the parameters that may change."""
        return [f"{self.name}.{name}" for name, _ in self.module.named_parameters(recurse=False)]

    @property
    def matrix(self) -> Tensor:
        """The weight as [in, out]: output = input @ matrix + bias."""
        weight = self.module.weight.data
        return weight if isinstance(self.module, Conv1D) else weight.T

    def stored(self, matrix: Tensor) -> Tensor:
        """Bring a matrix [in, out] into the weight's own layout and dtype."""
        weight = self.module.weight
        layout = matrix if isinstance(self.module, Conv1D) else matrix.T
        return layout.to(weight.dtype).contiguous()

    def features(self, asked: str) -> str:
        """What it is fitted on, "input" or "output", where `Folding.features` asks for this."""
        if asked != AUTO:
            return asked
        return "input" if self.matrix.shape[0] <= WIDEST_INPUT else "output"

    def equations(self, features: str) -> Equations:
        """Sums over no tokens."""
        inner, width = self.matrix.shape
        return NormalEquations.zeros(inner if features == "input" else width, width, self.module.weight.device)

    def folded(self, change: Tensor, features: str) -> dict[str, Tensor]:
        """New weights, by name; the matrix, or its output, is to change by `change` [features, width]."""
        matrix = self.matrix.double()
        bias = getattr(self.module, "bias", None)
        if features == "input":
            # The block multiplies what the projection gives, so the change is divided by that.
            return {f"{self.name}.weight": self.stored(matrix + change / self.scale)}
        new = {f"{self.name}.weight": self.stored(matrix + matrix @ change)}
        if bias is not None:
            wide = bias.data.double()
            new[f"{self.name}.bias"] = (wide + wide @ change).to(bias.dtype)
        return new


@dataclass(frozen=True)
class Channels:
    """A parameter that a sublayer's output is linear in, channel by channel.

    Attributes:
        axis: of the output channels.
        offset: what is added to the parameter before it multiplies: 1 for norms that store their gain less 1.

    """

    axis: int
    offset: float = 0.0

    def scaled(self, parameter: Tensor, factors: Tensor) -> Tensor:
        """The parameter by which every channel c of the output becomes `factors[c]` times what it was."""
        shape = [1] * parameter.ndim
        shape[self.axis] = -1
        wide = (parameter.double() + self.offset) * factors.double().reshape(shape) - self.offset
        return wide.to(parameter.dtype)


@dataclass(frozen=True, eq=False)
class Gain:
    """The output channels of a sublayer that no one matrix makes: a norm's output, a mixture of experts.

    Attributes:
        name: of the sublayer's module, from the model's root.
        module: the sublayer's.
        sublayer: the sublayer.
        scale: what its output is multiplied by before it is added to the residual stream.
        parameters: by full name, all that the output is linear in: the module it belongs to, and its channels there.

    """

    name: str
    module: Any
    sublayer: Sublayer
    scale: float
    parameters: Mapping[str, tuple[nn.Module, Channels]]

    @property
    def names(self) -> list[str]:
        """Of the parameters that may change."""
        return list(self.parameters)

    def features(self, asked: str) -> str:
        """Always the output, channel by channel."""
        return "gain"

    def equations(self, features: str) -> Equations:
        """Sums over no tokens."""
        (name, (owner, channels)), *_ = self.parameters.items()
        parameter = _own(owner, name)
        return GainEquations.zeros(parameter.shape[channels.axis], parameter.device)

    def folded(self, change: Tensor, features: str) -> dict[str, Tensor]:
        """New weights, by name; channel c of the output is to become 1 + change[c] times what it was."""
        return self.scaled(1 + change)

    def scaled(self, factors: Tensor) -> dict[str, Tensor]:
        """New weights, by name, for factors [width]."""
        new = {}
        for name, (owner, channels) in self.parameters.items():
            parameter = _own(owner, name)
            new[name] = channels.scaled(parameter.data, factors.to(parameter.device))
        return new


def _own(owner: nn.Module, name: str) -> nn.Parameter:
    # By name whenever it is asked for: what waits on disk is another tensor each time it is brought in.
    return owner.get_parameter(name.rpartition(".")[-1])


Fold = Projection | Gain


def as_features(found: Mapping[str, Tensor], features: str, real: Tensor) -> Tensor:
    """Of what a pass recorded at a fold, that which it is fitted on [real tokens, features].

    Args:
        found: what `recorded_at` left.
        features: "input", or another.
        real: which tokens [batch, tokens] are no padding.

    """
    phi = found["input"] if features == "input" else found["output"]
    if "gate" in found:
        phi = phi * found["gate"].sigmoid()
    # Some blocks lay all tokens of a batch in one row.
    return phi.flatten(0, -2)[real.flatten().to(phi.device)]


def probing_factors(width: int, device: torch.device) -> Tensor:
    """Factors [width] that tell every wrong guess at what a gain multiplies from the right one."""
    return torch.linspace(0.25, 1.75, width, device=device)
