"""Towers of encoders, taken apart for a search over their weights."""
