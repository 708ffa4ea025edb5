"""Which elements all ranks together read of a tensor, and of which scales."""
