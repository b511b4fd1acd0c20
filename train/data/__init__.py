"""Text, tokens and the blocks a model is trained on."""
