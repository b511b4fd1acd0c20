"""Training: the command line, data, and runs on the Hugging Face Trainer."""
