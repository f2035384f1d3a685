"""From a model and samples to numbers: gradients of gates, losses and divergences of removals."""
