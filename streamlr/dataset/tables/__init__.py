"""Tables on their way to rows: files, batches with the place of every cell, and the coding of cells into numbers."""
