"""The combinatorial half: gradients of gates, energies, problems, spectra and their solvers; never torch."""
