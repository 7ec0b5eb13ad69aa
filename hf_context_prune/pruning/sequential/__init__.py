"""Sequential reconstruction: prune layer by layer against the base model's hidden states."""
