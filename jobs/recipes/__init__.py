"""Recipes that made every part of the shipped weights, one module per part; `jobs/prepare_demo.py` runs them."""
