"""FFNs that use, for each token, some blocks of their neurons: in both passes, or in the backward pass alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops import gpu
from sparsepeft.ops.registry import Implementation, Operator
from sparsepeft.ops.routed_ffn.blockwise import routed_ffn_blockwise
from sparsepeft.ops.routed_ffn.exact import exact_ffn_blockwise
from sparsepeft.ops.routed_ffn.projections import (
    Activation,
    LowRank,
    Projection,
    check_projection,
    project,
    resolve_activation,
)
from sparsepeft.ops.routed_ffn.pytorch import MakeProducts, choose_torch_products
from sparsepeft.ops.routed_ffn.reference import exact_ffn_reference, routed_ffn_reference
from sparsepeft.ops.routed_ffn.routing import Routing, compute_dtype, route

__all__ = ["LowRank", "Projection", "Routing", "exact_ffn", "project", "route", "routed_ffn"]


class FFNArguments(NamedTuple):
    """What the choice of an implementation depends on; see :func:`routed_ffn`."""

    x: Tensor
    dtype: torch.dtype  # of the products
    block_size: int  # neurons in a block, I / G


def _bind_routed(x: Tensor, up: Projection, down: Projection, routing: Routing, **_: Any) -> FFNArguments:
    return FFNArguments(x, _product_dtype(x, up), up.weight.shape[0] // routing.logits.shape[-1])


def _bind_exact(x: Tensor, up: Projection, down: Projection, *, num_blocks: int, **_: Any) -> FFNArguments:
    return FFNArguments(x, _product_dtype(x, up), up.weight.shape[0] // num_blocks)


def _product_dtype(x: Tensor, up: Projection) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return compute_dtype(x)
    return torch.promote_types(x.dtype, up.weight.dtype)


def _why_not_exported(_: FFNArguments) -> str | None:
    return (
        "an exported graph cannot have products whose sizes depend on data" if torch.compiler.is_exporting() else None
    )


def _why_not_triton_by_itself(arguments: FFNArguments) -> str | None:
    return _why_not_exported(arguments) or gpu.why_not_triton_by_itself(arguments.x)


_IMPLEMENTATIONS = [
    Implementation("reference", 0, "the definition, which alone can be exported"),
    Implementation("torch", 10, "tokens are batched by block, on every device", why_not_automatic=_why_not_exported),
    Implementation(
        "triton",
        30,
        "gathering and scattering of tokens is part of the products",
        why_unavailable=gpu.why_no_triton,
        why_not=lambda arguments: gpu.why_not_triton(arguments.x, dtype=arguments.dtype),
        why_not_automatic=_why_not_triton_by_itself,
    ),
]
ROUTED = Operator("routed_ffn", _bind_routed, _IMPLEMENTATIONS)
EXACT = Operator("exact_ffn", _bind_exact, _IMPLEMENTATIONS)


def routed_ffn(
    x: Tensor,
    up: Projection,
    down: Projection,
    routing: Routing,
    *,
    gate: Projection | None = None,
    activation: str | Activation,
    dropout: float = 0.0,
    recompute: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Compute an FFN with, for each token, only the blocks of neurons that a router chose.

    The I neurons are cut into G blocks of I / G neighbours. With S the token's chosen blocks and U_g, V_g, D_g the rows
    of the up and gate projections and the columns of the down projection that belong to block g,

    plain:  y = sum_{g in S} r_g D_g act(U_g x + b_g) + d
    gated:  y = sum_{g in S} r_g D_g (act(V_g x + c_g) * (U_g x + b_g)) + d,

    where r_g = w_g / stop_gradient(w_g) is 1 and carries the gradient of the router's probability w_g:
    d loss / d log w_g = <grad_y, the block's output>. So with all blocks chosen y is the dense FFN. No token is ever
    dropped, however many choose the same block.

    Source: arXiv:2312.10365, section 4.2. Differs: the paper's code scales blocks by twice a sigmoid; here values stay
    the FFN's own. Gated FFNs, biases and low-rank updates inside are ours.

    Dtypes: products are taken in the common dtype of ``x`` and ``up.weight``, or in autocast's where it is on; low-rank
    updates are rounded to it, and a token's blocks are summed in float32 at least.

    For backward, ReLU in a plain FFN whose down projection is frozen keeps one bit for each of a token's N G' I / G
    neurons; anything else keeps what enters the activation, or with ``recompute`` nothing. Frozen weights cost no
    gradient product. Dropout masks are drawn again.

    Args:
        x: hidden states, (..., D), N tokens in all.
        up: weight (I, D).
        down: weight (D', I); D' is D in a Transformer.
        routing: what :func:`route` chose for the N tokens, of G blocks.
        gate: weight (I, D), for a gated FFN.
        activation: a Hugging Face name (``"relu"``, ``"gelu_new"``, ``"silu"``, ...) or an elementwise function. It is
            called again in backward, so it must not depend on a random generator.
        dropout: probability of zeroing an activation, as T5 does; drawn anew in each call.
        recompute: whether backward takes the first products again instead of keeping what enters the activation.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or, on a GPU, ``"triton"``; see :func:`sparsepeft.ops.explain`.

    Returns:
        Tensor (..., D'), in the dtype of ``x``, or autocast's where it is on.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes do not fit, G does not divide I, the activation or ``impl`` is unknown, or the chosen
            implementation does not take these dtypes.
        RuntimeError: this machine does not have ``impl``.

    Example:
        >>> import torch
        >>> from sparsepeft.ops import Projection, route
        >>> x = torch.randn(2, 7, 32)  # (B, T, D)
        >>> up, down = Projection(torch.randn(64, 32)), Projection(torch.randn(32, 64))
        >>> routing = route(x, torch.randn(8, 32), num_active=4)  # 4 of 8 blocks
        >>> routed_ffn(x, up, down, routing, activation="relu").shape
        torch.Size([2, 7, 32])
    """
    function = resolve_activation(activation)
    _check(x, up, down, gate, routing.logits.shape[-1], dropout)
    _check_routing(x, routing)
    arguments = _bind_routed(x, up, down, routing)
    impl = ROUTED.choose(impl, arguments)
    tokens = x.reshape(-1, x.shape[-1]).to(arguments.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if impl == "reference":
            output = routed_ffn_reference(tokens, up, down, gate, function, routing, dropout)
        else:
            make_products = _products(impl, arguments)
            output = routed_ffn_blockwise(
                tokens, up, down, gate, function, routing, dropout, make_products=make_products, recompute=recompute
            )
    return _like(output, x, arguments)


def exact_ffn(
    x: Tensor,
    up: Projection,
    down: Projection,
    *,
    num_blocks: int,
    num_active: int,
    gate: Projection | None = None,
    activation: str | Activation,
    dropout: float = 0.0,
    recompute: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Compute a dense FFN, with gradients through each token's largest blocks of neurons alone.

    The I neurons are cut into G blocks of I / G neighbours. With a what enters the down projection (after dropout) and
    d_i the columns of that, a token's chosen blocks S are the G' with the largest sum of a_i^2 ||d_i||^2; of equal ones
    the lowest. The value is the dense FFN's, y = D a + d. The gradient is that of

    y' = D (m * a) + d,  m_i = 1 if neuron i belongs to a chosen block, else 0, held constant.

    So with all blocks chosen gradients are the dense FFN's, too. For a low-rank update of D, B (A a), the same holds of
    what A reads; B's gradient is the dense one, as is the bias's.

    A dense FFN takes three passes: forward, backward for the inputs, and backward for weights where these are trained.
    The first costs the same here, the others G' / G of it. For backward, ReLU in a plain FFN whose down projection is
    frozen keeps one bit for each of a token's N G' I / G neurons; anything else keeps what enters the activation, or
    with ``recompute`` nothing. Dropout keeps one more bit. All (N, I) activations never exist at once.

    Source: ours; after meProp, arXiv:1706.06197, whose backward pass is sparse under an exact forward pass. Differs:
    chosen are blocks, and by activations, so that what backward does not need is not kept.

    Dtypes: products are taken in the common dtype of ``x`` and ``up.weight``, or in autocast's where it is on; low-rank
    updates are rounded to it; gradients of ``x`` are summed over blocks in float32 at least.

    Args:
        x: hidden states, (..., D), N tokens in all.
        up: weight (I, D).
        down: weight (D', I); D' is D in a Transformer.
        num_blocks: G, a divisor of I.
        num_active: G', blocks per token that backward goes through, 1 <= G' <= G.
        gate: weight (I, D), for a gated FFN.
        activation: a Hugging Face name (``"relu"``, ``"gelu_new"``, ``"silu"``, ...) or an elementwise function. It is
            called again in backward, so it must not depend on a random generator.
        dropout: probability of zeroing an activation, as T5 does; drawn anew in each call.
        recompute: whether backward takes the first products of chosen blocks again instead of keeping what enters the
            activation.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or, on a GPU, ``"triton"``; see :func:`sparsepeft.ops.explain`.

    Returns:
        Tensor (..., D'), in the dtype of ``x``, or autocast's where it is on.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes do not fit, G does not divide I, ``num_active`` is out of range, the activation or ``impl``
            is unknown, or the chosen implementation does not take these dtypes.
        RuntimeError: this machine does not have ``impl``.

    Example:
        >>> import torch
        >>> from sparsepeft.ops import Projection, exact_ffn
        >>> x = torch.randn(2, 7, 32, requires_grad=True)  # (B, T, D)
        >>> up, down = Projection(torch.randn(64, 32)), Projection(torch.randn(32, 64))
        >>> y = exact_ffn(x, up, down, num_blocks=8, num_active=2, activation="relu")
        >>> dense = torch.relu(x @ up.weight.T) @ down.weight.T
        >>> torch.allclose(y, dense, atol=1e-4)
        True
    """
    function = resolve_activation(activation)
    _check(x, up, down, gate, num_blocks, dropout)
    if not 1 <= num_active <= num_blocks:
        raise ValueError(
            f"num_active is {num_active}, but there are {num_blocks} blocks: choose 1 <= num_active <= {num_blocks}."
        )
    arguments = _bind_exact(x, up, down, num_blocks=num_blocks)
    impl = EXACT.choose(impl, arguments)
    tokens = x.reshape(-1, x.shape[-1]).to(arguments.dtype)
    with torch.autocast(x.device.type, enabled=False):
        values = tokens, up, down, gate, function, num_blocks, num_active, dropout
        if impl == "reference":
            output = exact_ffn_reference(*values)
        else:
            output = exact_ffn_blockwise(*values, make_products=_products(impl, arguments), recompute=recompute)
    return _like(output, x, arguments)


def _like(output: Tensor, x: Tensor, arguments: FFNArguments) -> Tensor:
    """Return the output with the leading dimensions and the dtype that the caller expects."""
    dtype = arguments.dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
    return output.view(*x.shape[:-1], output.shape[-1]).to(dtype)


def _products(impl: str, arguments: FFNArguments) -> MakeProducts:
    if impl == "triton":
        from sparsepeft.ops.routed_ffn.triton import TritonProducts  # Triton is optional, and slow to import

        return TritonProducts
    return choose_torch_products(arguments.x.device.type, arguments.dtype, arguments.block_size)


def _check(
    x: Tensor, up: Projection, down: Projection, gate: Projection | None, num_blocks: int, dropout: float
) -> None:
    if x.ndim < 1:
        raise ValueError("x is a scalar; expected hidden states of shape (..., D).")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; expected a floating-point tensor: convert it first.")
    for name, projection in (("up", up), ("down", down)):
        if projection.weight.ndim != 2:
            raise ValueError(
                f"{name}.weight has shape {tuple(projection.weight.shape)}; expected (out, in), as nn.Linear."
            )
    hidden, inner = x.shape[-1], up.weight.shape[0]
    check_projection("up", up, inner, hidden)
    check_projection("down", down, down.weight.shape[0], inner)
    if gate is not None:
        check_projection("gate", gate, inner, hidden)
    if num_blocks < 1 or inner % num_blocks:
        divisors = ", ".join(str(n) for n in range(1, 65) if inner % n == 0)
        raise ValueError(
            f"the inner size {inner} cannot be cut into {num_blocks} equal blocks: choose a divisor, one of {divisors}."
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; expected a probability, 0 <= p < 1.")


def _check_routing(x: Tensor, routing: Routing) -> None:
    num_tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if routing.blocks.ndim != 2 or routing.blocks.shape[0] != num_tokens:
        raise ValueError(
            f"routing.blocks has shape {tuple(routing.blocks.shape)}, but x has {num_tokens} tokens: route the same x."
        )
