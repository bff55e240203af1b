"""The processes of an instance: agent and rank."""
