"""Calibration: from a data source to tokenised samples, and from samples to batches of similar length."""

from excise.data.answers import own_answers
from excise.data.batches import Batch, make_batches
from excise.data.fit import Fit
from excise.data.samples import Sample, Samples, load_samples, split_samples

__all__ = ["Batch", "Fit", "Sample", "Samples", "load_samples", "make_batches", "own_answers", "split_samples"]
