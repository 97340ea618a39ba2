"""Scores of the answers before and after fine-tuning."""
