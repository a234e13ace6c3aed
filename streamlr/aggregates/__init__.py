"""What one pass leaves behind: pure NumPy, no reading, no scheduling."""
