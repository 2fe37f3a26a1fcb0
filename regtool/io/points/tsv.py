"""Tables separated by tabs, else as those separated by commas."""

from __future__ import annotations

from functools import partial

from regtool.io.points.csv import read, write
from regtool.io.points.record import PointFormat

FORMAT = PointFormat(suffixes=(".tsv",), read=read, write=partial(write, delimiter="\t"))
