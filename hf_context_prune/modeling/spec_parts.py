"""Parts of an entry of the table of architectures: input projections of the attention, and mixtures of experts.

This file travels with every saved variable-width model, so it imports nothing but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Projection:
    """An input projection of the attention, and the layout of its output features.

    Attributes:
        path: Module path relative to the layer.
        roles: ``"query"``, ``"key"`` and/or ``"value"``, in the order in which they are stacked.
        interleaved: False: all heads of the first role, then all of the second (GPT-2). True: KV group by KV group,
            each with its heads of all roles (GPT-NeoX, Falcon).
        blocks: Blocks of ``head_dim`` features that each head has: 2 where a gate follows every query (Qwen3.5).
    """

    path: str
    roles: tuple[str, ...]
    interleaved: bool = False
    blocks: int = 1


def separate(prefix: str, query_blocks: int = 1) -> tuple[Projection, ...]:
    """Return the projections of an attention module that has one for queries, one for keys and one for values."""
    query = Projection(f"{prefix}.q_proj", ("query",), blocks=query_blocks)
    return query, Projection(f"{prefix}.k_proj", ("key",)), Projection(f"{prefix}.v_proj", ("value",))


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP, and the layers that have one; the others have the MLP of the entry.

    Attributes:
        block: Module path of the router and the experts together, relative to the layer.
        router: Module that chooses experts, relative to the block: it returns logits, gates and numbers of experts.
        experts: Module that computes them, relative to the block: called with tokens, numbers of experts and gates.
        tensors: (path relative to the block, dimension that has one slice per expert) of parameters and saved buffers;
            one that a model does not have is passed over.
        transposed: Whether the experts' weights are stored as [experts, in_features, out_features], with the gate and
            the other half of every neuron in turns (gpt-oss).
        width: Config attribute with the neurons of an expert.
        shared: Name of the shared expert in the block: an MLP through which every token runs. None: there is none.
        shared_width: Config attribute with its neurons; None: `shared_count` times those of an expert.
        shared_count: Config attribute with the number of experts that it is as wide as.
        shared_gate: Name in the block of a linear layer whose sigmoid scales the shared expert; None: nothing does.
        count: Config attribute with the number of experts.
        per_token: Config attribute with the number of experts that a token is routed to.
        groups: Config attributes with the number of groups of experts, and of those that a token may be routed to; the
            two best experts of a group count. Empty where there are no groups.
        first: Config attribute with the number of the first layer with experts; None: 0.
        last: Config attribute with the number of the last such layer; None: the last layer.
        interval: Config attribute that, where it is n, gives only every n-th layer experts.
        dense_layers: Config attribute that lists layers without experts.
    """

    block: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    tensors: tuple[tuple[str, int], ...] = (
        ("gate.weight", 0),
        ("experts.gate_up_proj", 0),
        ("experts.down_proj", 0),
    )
    transposed: bool = False
    width: str = "moe_intermediate_size"
    shared: str | None = None
    shared_width: str | None = None
    shared_count: str | None = None
    shared_gate: str | None = None
    count: str = "num_experts"
    per_token: str = "num_experts_per_tok"
    groups: tuple[str, ...] = ()
    first: str | None = None
    last: str | None = None
    interval: str | None = None
    dense_layers: str | None = None

    @property
    def prefix(self) -> str:
        """The path of the experts' module, relative to the layer."""
        return f"{self.block}.{self.experts}"
