"""Rows, wherever they live."""
