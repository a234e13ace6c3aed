"""Model files, read back: checked for format, version, digest, and for what a model needs."""

from __future__ import annotations

import os
from dataclasses import fields

import numpy as np

from streamlr.aggregates.cost import Cost, number_or_array
from streamlr.dataset.tables.coding import MODEL_FORMAT, MODEL_VERSION
from streamlr.descent.stopping import Record
from streamlr.errors import BadFile
from streamlr.files import read_json
from streamlr.model import FittedModel

LATER = ("history", "stopped", "validation")  # what files of version 1 lack


def load_model(path: str | os.PathLike[str]) -> FittedModel:
    """Read a model that `FittedModel.save` wrote, checking its format, version and digest.

    Parameters
    ----------
    path : path
        The file.

    Raises
    ------
    PathNotFound
        No such file.
    BadFile
        Not a model, of a newer version, or altered.

    Examples
    --------
    >>> import pathlib, tempfile, streamlr
    >>> model = streamlr.fit(streamlr.Dataset([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(pathlib.Path(folder) / "m.json")
    ...     again = streamlr.load_model(pathlib.Path(folder) / "m.json")
    >>> (again.coef == model.coef).all()
    np.True_
    """
    content = read_json(path, MODEL_FORMAT, MODEL_VERSION)
    try:
        p = len(content["feature_names"])
        k = len(content["target_names"])
        coef, std_err, intercept = (np.array(content[name], dtype=np.float64) for name in ("coef", "std_err", "intercept"))
        shape = (p,) if k == 1 else (p, k)
        if k == 0 or coef.shape != shape or std_err.shape != shape or intercept.shape != shape[1:]:
            raise ValueError("the coefficients do not fit the features and targets")
        if not (np.isfinite(coef).all() and np.isfinite(intercept).all()):
            raise ValueError("a coefficient is not finite")
        if len(set(content["feature_names"])) != p or type(content["n_rows"]) is not int:
            raise ValueError("feature names that differ and a number of rows are needed")
        facts = {
            field.name: content[field.name] for field in fields(FittedModel) if field.name not in LATER or field.name in content
        }
        facts |= {name: tuple(content[name]) for name in ("feature_names", "target_names")}
        facts |= {"coef": coef, "std_err": std_err, "cost": Cost.of_dict(content["cost"])}
        facts["validation"] = Cost.of_dict(content["validation"]) if content.get("validation") else None
        facts["history"] = tuple(Record.of_dict(record) for record in content.get("history", ()))
        facts["intercept"] = number_or_array(content["intercept"])
        facts["intercept_std_err"] = number_or_array(content["intercept_std_err"], absent=np.nan)
        return FittedModel(**facts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadFile(f"{path} lacks what a model needs ({error!r}); write it again with FittedModel.save") from error
