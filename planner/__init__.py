"""Hears capacity and load on NATS, and publishes the plan: parallel configuration and migration."""
