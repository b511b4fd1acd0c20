"""A run's model, layers, optimizer and callbacks, from its configuration."""
