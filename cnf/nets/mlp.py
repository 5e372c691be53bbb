"""The multilayer perceptron that conditions couplings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from cnf.nets.activations import activation as make_activation
from cnf.nets.products import Linear, linear


class MLP(nn.Module):
    """A fully connected network of x and, where it has one, a context beside it.

    With ``residual`` the first layer maps to the hidden width and every entry of ``hidden`` is a
    block h + L₂(a(L₁(a(h)))) of that width (He et al. 2016, without normalisation).

    Args:
        inputs: the last axis of x.
        outputs: the last axis of the result.
        hidden: widths of the hidden layers, or of the residual blocks; may be empty.
        context_features: the last axis of the context; 0 for none, and what is given is ignored.
        activation: a name from ``cnf.nets.activations``.
        residual: build residual blocks, which all need one width.
        zero_last: start with a last layer of zeros, so that a flow starts as the identity.
        size: how many outputs in a row belong to one feature; compiled code gets them as
            ``(*batch, outputs / size, size)``.

    Example:
        >>> import torch
        >>> MLP(3, 2, context_features=1)(torch.randn(5, 3), torch.randn(5, 1)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int] = (64, 64),
        context_features: int = 0,
        activation: str = "relu",
        residual: bool = False,
        zero_last: bool = True,
        size: int = 1,
    ):
        super().__init__()
        self.size = size
        self.inputs = inputs
        self.outputs = outputs
        self.context_features = context_features
        self.residual = residual
        self.activation = make_activation(activation)
        widths = layer_widths(inputs + context_features, hidden, outputs, residual)
        self.layers = nn.ModuleList(
            Linear(before, after) for before, after in itertools.pairwise(widths)
        )
        if zero_last:
            nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map x to the outputs.

        Args:
            x: ``(*batch, inputs)``.
            context: ``(*batch, context_features)``.

        Returns:
            ``(*batch, outputs)``.

        Raises:
            ValueError: if the network was built with a context and gets none.
        """
        if self.context_features:
            x = torch.cat([x, required(context, self.context_features)], -1)
        layers: list[nn.Linear] = [*self.layers]
        last = len(layers) - 1
        activate, calls = unwatched(self.activation, layers, self.residual)

        def apply(index: int, value: Tensor) -> Tensor:
            if index < last or not side_by_side(self.size):
                return calls[index](value)
            return by_parameter(value, layers[last].weight, layers[last].bias, self.size)

        return wire(x, apply, len(layers), activate, self.residual)


def layer_widths(inputs: int, hidden: Sequence[int], outputs: int, residual: bool) -> list[int]:
    """The widths between the linear layers of ``wire``, from the inputs to the outputs."""
    if any(width < 1 for width in hidden):
        raise ValueError(f"hidden widths must be positive, got {tuple(hidden)}")
    if not residual:
        return [inputs, *hidden, outputs]
    if len(set(hidden)) > 1:
        raise ValueError(
            f"residual blocks need one width for all, got hidden={tuple(hidden)}; plain layers "
            "(residual=False) do not"
        )
    # one layer in, two to a block
    return [inputs, *hidden[:1], *(width for width in hidden for _ in range(2)), outputs]


def wire(
    value: Tensor,
    linear: Callable[[int, Tensor], Tensor],
    layers: int,
    activate: Callable[[Tensor], Tensor],
    residual: bool,
) -> Tensor:
    """Run ``value`` through linear layers 0, …, layers − 1 with activations between them.

    The linear layers come as a function of their index, so that the masked network can compute
    any slice of its units by the same formula.
    """
    last = layers - 1
    if residual and last:
        value = linear(0, value)
        for index in range(1, last, 2):
            value = value + linear(index + 1, activate(linear(index, activate(value))))
    else:
        for index in range(last):
            value = activate(linear(index, value))
    return linear(last, value)


def unwatched(
    activation: nn.Module, layers: Sequence[nn.Module], residual: bool
) -> tuple[Callable[[Tensor], Tensor], list[Callable[[Tensor], Tensor]]]:
    """A network's activation and layers, by shorter ways where nobody sees what they return.

    The layers then go without what ``Module.__call__`` does for hooks. ReLU works in place: its
    derivative is taken from its result, but a hook may keep what a layer returns, a layer that is
    not linear may need it for its own derivative, and residual blocks come back to it.
    """
    if torch.compiler.is_compiling() or _has_any_global_hook():
        return activation, [*layers]
    linear = not residual
    # a loop, because generators take as long as a layer's activation
    for module in (activation, *layers):
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return activation, [*layers]
        linear = linear and (module is activation or isinstance(module, nn.Linear))
    in_place = linear and type(activation) is nn.ReLU
    return torch.relu_ if in_place else activation, [layer.forward for layer in layers]


def side_by_side(size: int) -> bool:
    """Whether ``by_parameter`` pays: where a compiler makes the code around it.

    Without a gradient they lie side by side anyway.
    """
    return size > 1 and torch.is_grad_enabled() and torch.compiler.is_compiling()


def by_parameter(value: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """A linear layer of ``size`` outputs for each feature, ``(*batch, features, size)``.

    What belongs to one parameter lies side by side: compilers make vector code of what follows,
    which then takes a fifth of the time.
    """
    weight = weight.unflatten(0, (-1, size)).transpose(0, 1).flatten(0, 1)
    bias = bias.unflatten(0, (-1, size)).t().flatten()
    return linear(value, weight, bias).unflatten(-1, (size, -1)).mT


def required(context: Tensor | None, features: int) -> Tensor:
    """The context, checked to be there and to have the features the network was built for."""
    if context is None or context.shape[-1] != features:
        got = "none" if context is None else f"shape {tuple(context.shape)}"
        raise ValueError(f"this network needs a context of shape (*batch, {features}), got {got}")
    return context
