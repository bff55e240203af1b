"""The OpenAI-compatible front door: HTTP in, requests to pipelines, token log folded into responses."""
