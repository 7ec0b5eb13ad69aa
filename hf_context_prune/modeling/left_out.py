"""Families that `transformers` has and this package does not prune, each with the line of its code that forbids it."""

from __future__ import annotations

LEFT_OUT = {
    "bloom": "its MLP is always four times as wide as the hidden state (`BloomMLP`: `nn.Linear(hidden_size, 4 * "
    "hidden_size)`), so no config can hold another width, and ALiBi gives every head a slope by its number",
    "falcon_h1": "attention and Mamba of a layer are scaled and added before the residual stream "
    "(`FalconH1DecoderLayer`: `mamba_hidden_states + attention_hidden_states`), and gate and output of the MLP have "
    "factors of their own (`FalconH1MLP`: `gate_multiplier`, `down_multiplier`)",
    "gemma3n_text": "its MLPs keep the neurons above a quantile of all of them (`Gemma3nTextMLP`, "
    "`activation_sparsity`), so that removing one changes the others, and hidden states run in several streams "
    "(`Gemma3nTextAltUp`)",
}
"""Why a family is refused, by model type: the end of a sentence."""
