"""Strategy B: iterative, pure functions of batches or statistics; knows nothing of zarr or Dask."""
