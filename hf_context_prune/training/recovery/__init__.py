"""Recovery: train a pruned model back on its domain."""
