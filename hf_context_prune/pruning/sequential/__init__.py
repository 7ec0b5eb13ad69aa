"""Sequential reconstruction: prune layer by layer against the dense hidden states."""
