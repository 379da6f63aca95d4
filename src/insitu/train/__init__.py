"""Training language models with Hugging Face's Trainer: what ``insitu train`` runs."""
