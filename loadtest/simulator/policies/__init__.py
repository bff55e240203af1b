"""How a fleet can be run on a capacity trace: ours, the paper's, and its baselines."""
