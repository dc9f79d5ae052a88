"""What people run around training: studies, the fidelity of estimators, plots, inspection, diagnosis."""
