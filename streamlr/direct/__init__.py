"""Strategy A: the closed form; pure functions of statistics."""
