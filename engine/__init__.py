"""What runs on an instance: the agent, its ranks, and the backends that decode."""
