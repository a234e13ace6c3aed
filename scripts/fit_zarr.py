"""Fit yesterday's rows, refuse a bad fit, predict today's: `python scripts/fit_zarr.py TRAIN.zarr NEW.zarr OUT.zarr`."""

import sys

import streamlr
from streamlr.errors import StreamlrError


def main(train: str, new: str, out: str) -> None:
    rows, held_out = streamlr.open_dataset(train, missing="drop").split(0.1, seed=0)
    model = streamlr.fit(rows)
    cost = streamlr.evaluate(model, held_out)
    print(model.summary(), f"held out: {cost}", sep="\n\n")
    if not cost.r2 > 0.1:
        sys.exit(f"the model explains {cost.r2:.0%} of rows it has not seen; nothing was predicted")
    model.save("model.json", overwrite=True)
    streamlr.predict(model, streamlr.open_dataset(new, missing="drop"), out, overwrite=True)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:4])
    except StreamlrError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
