"""Evaluation: metrics over whole data sets, and what feeds them."""
