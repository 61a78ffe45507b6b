"""Training: one loop for pretraining and classification, and what surrounds it."""
