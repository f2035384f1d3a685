"""The capability panel: what a model can still do, asked beside its original, with intervals."""
