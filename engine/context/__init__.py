"""Who holds which weights and KV, and how they travel."""
