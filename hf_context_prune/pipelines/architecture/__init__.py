"""Whether an unknown architecture can be pruned: a proposed table entry, tested on a tiny copy of the model."""
