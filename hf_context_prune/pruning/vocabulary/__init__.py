"""Pruning the vocabulary: the tokenizer, the embedding and the head, to the tokens that a domain needs."""
