"""What the gateway does with NATS and tokenizers."""
