"""Linear regression on data larger than memory."""
