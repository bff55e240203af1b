"""What the planner does with NATS and sockets."""
