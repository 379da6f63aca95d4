"""Pretraining and fine-tuning on Hugging Face Trainer."""
