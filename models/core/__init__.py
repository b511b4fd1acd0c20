"""What every layer that takes the place of a linear one is."""
