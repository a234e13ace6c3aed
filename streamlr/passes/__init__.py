"""The only floor that schedules work on Dask: every row once."""
