"""Model families: what their config.json means and which Hugging Face tensors their parameters are made of."""
