"""Tools around training: studies, gradient fidelity, plots, inspection, diagnosis."""
