"""Answers about single clips for many people at once: decoding in processes that may die, one model for all."""
