"""What changes layers from step to step."""
