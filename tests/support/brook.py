"""A causal LM of a package of one's own, in a single file, which also serves as the remote code of a repository.

Nothing in it has the names that models of `transformers` have.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class BrookConfig(PreTrainedConfig):
    model_type = "brook"
    attribute_map = {  # noqa: RUF012 - as configs of transformers have it
        "hidden_size": "d_model",
        "num_hidden_layers": "depth",
        "num_attention_heads": "n_heads",
    }

    vocab_size: int = 500
    d_model: int = 64
    depth: int = 2
    n_heads: int = 4
    bank: int = 200
    max_position_embeddings: int = 128
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index, self.streams = index, config.n_heads
        self.depth_of_stream = config.d_model // config.n_heads
        self.mixed = nn.Linear(config.d_model, 3 * config.d_model)
        self.back = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x, cache):
        batch, length, _ = x.shape
        parts = self.mixed(x).view(batch, length, self.streams, 3, self.depth_of_stream).permute(3, 0, 2, 1, 4)
        query, key, value = parts
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        before = key.shape[2] - length
        allowed = torch.ones(length, key.shape[2], dtype=torch.bool, device=x.device).tril(before)
        given = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return self.back(given.transpose(1, 2).reshape(batch, length, -1))


class Bank(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.rise, self.bend = nn.Linear(config.d_model, config.bank), nn.GELU()
        self.fall = nn.Linear(config.bank, config.d_model)

    def forward(self, x):
        return self.fall(self.bend(self.rise(x)))


class Reach(GradientCheckpointingLayer):
    def __init__(self, config, index):
        super().__init__()
        self.before, self.after = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.attention, self.bank = Attention(config, index), Bank(config)

    def forward(self, x, cache=None):
        x = x + self.attention(self.before(x), cache)
        return x + self.bank(self.after(x))


class BrookPreTrainedModel(PreTrainedModel):
    config_class = BrookConfig
    base_model_prefix = "river"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Reach",)


class BrookModel(BrookPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.d_model)
        self.places = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.reaches = nn.ModuleList(Reach(config, index) for index in range(config.num_hidden_layers))
        self.mouth = nn.LayerNorm(config.d_model)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def set_input_embeddings(self, value):
        self.words = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None, **_):
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        start = 0 if cache is None else cache.get_seq_length()
        x = self.words(input_ids) + self.places(
            torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        )
        for reach in self.reaches:
            x = reach(x, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.mouth(x), cache=cache)


class BrookForCausalLM(BrookPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "river.words.weight"}  # noqa: RUF012 - as above

    def __init__(self, config):
        super().__init__(config)
        self.river = BrookModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **options):
        states = self.river(input_ids, **options)
        logits = self.lm_head(states[0][:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=states.cache)
